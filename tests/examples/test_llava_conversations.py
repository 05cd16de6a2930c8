"""What the LLaVA recipe learns of a conversation, and which conversations it refuses."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import write_data
from llava_batches import ConversationDataset, PadOnTheRight
from llava_conversations import (
    Conversation,
    conversations_of_captions,
    hash_conversations,
    read_conversations,
)
from llava_model import build_llava, find_tokens_of
from llava_parts import TURNS, build, make_entry

from modeling_llm2clip.data.images.image_sources import ImageSource, ParquetImage, TarImage
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.validation_errors import DataValidationError

build_once = cache(build)  # no test changes the model or its processor
NUM_PATCHES = 16  # 32 pixels, patches of 8


def make_dataset(
    parts: Path, conversations: list[Conversation], **settings: Any
) -> ConversationDataset:
    model, processor = build_once(parts)
    chosen = {"wording": "chat", "max_length": 128, **settings}
    return ConversationDataset(conversations, processor, find_tokens_of(model, processor), **chosen)


# What is learned


@pytest.mark.parametrize(
    ("wording", "turns"), [("chat", TURNS), ("plain", (("<image>", "a car"),))]
)
def test_only_the_answers_are_learned(parts: Path, wording: str, turns: Any) -> None:
    image = parts / "data" / "00.jpg"
    dataset = make_dataset(parts, [Conversation("c", image, turns)], wording=wording)
    item = dataset[0]
    learned = item["labels"] != -100
    assert torch.equal(item["labels"][learned], item["input_ids"][learned])
    # Every answer with the token that ends it, and nothing of questions, template or image.
    space = " " if wording == "chat" else ""
    said = dataset.tokenizer.decode(item["labels"][learned])
    assert said == "".join(f"{space}{answer}<|end|>" for _, answer in turns)
    is_image = item["input_ids"] == dataset.image_token_id
    assert int(is_image.sum()) == NUM_PATCHES
    assert not (learned & is_image).any()


def test_padding_is_not_learned_and_not_looked_at(parts: Path) -> None:
    image = parts / "data" / "00.jpg"
    conversations = [Conversation("a", image, TURNS), Conversation("b", None, (("Hi", "yes"),))]
    dataset = make_dataset(parts, conversations)
    batch = PadOnTheRight(0)([dataset[0], dataset[1]])
    padding = batch["attention_mask"] == 0
    assert int(padding.sum()) == len(dataset[0]["input_ids"]) - len(dataset[1]["input_ids"]) > 0
    assert (batch["labels"][padding] == -100).all()
    assert batch["pixel_values"].shape == (1, 3, 32, 32)


def test_the_ids_are_those_that_the_processor_makes_of_the_same_text(parts: Path) -> None:
    image = parts / "data" / "00.jpg"
    dataset = make_dataset(parts, [Conversation("c", image, TURNS)])
    model, processor = build_once(parts)
    messages = [
        {"role": role, "content": text}
        for turn in TURNS
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    theirs = processor(
        images=[str(image)], text=[text], add_special_tokens=False, return_tensors="pt"
    )
    assert torch.equal(theirs["input_ids"][0], dataset[0]["input_ids"])
    with torch.no_grad():
        assert model(**theirs).logits.isfinite().all()


def test_a_conversation_cut_before_its_answer_is_refused_and_a_cut_answer_counted(
    parts: Path,
) -> None:
    conversations = [Conversation("long", None, (("one two three", "four five six"),))]
    whole = len(make_dataset(parts, conversations).encode(conversations[0])[0])
    assert make_dataset(parts, conversations, max_length=whole).num_truncated == 0
    assert make_dataset(parts, conversations, max_length=whole - 1).num_truncated == 1
    with pytest.raises(DataValidationError, match=r"no answer within 5 tokens: 1 \(long\)"):
        make_dataset(parts, conversations, max_length=5)


def test_what_only_tokens_show_can_be_skipped_and_is_counted(parts: Path) -> None:
    image = parts / "data" / "00.jpg"
    conversations = [
        Conversation("long", None, (("one two three " * 40, "yes"),)),
        Conversation("kept", image, TURNS),
        Conversation("token", image, (("<image>", "an <image>"),)),
    ]
    dataset = make_dataset(parts, conversations, skip_invalid=True)
    assert dataset.skipped == {"no answer within 128 tokens": 1, "<image> in a text": 1}
    assert [conversation.name for conversation in dataset.conversations] == ["kept"]
    assert len(dataset) == 1 and dataset[0]["pixel_values"].shape == (3, 32, 32)
    assert dataset.num_truncated == 0  # of what is kept


def test_a_chat_template_that_rewrites_earlier_turns_is_refused(parts: Path) -> None:
    model, processor = build_llava(
        parts / "tower", parts / "llm", chat_template="{{ messages | length }} {{ messages }}"
    )
    conversations = [Conversation("c", None, (("Hi", "yes"),))]
    with pytest.raises(ValueError, match="words earlier turns anew"):
        ConversationDataset(
            conversations, processor, find_tokens_of(model, processor), wording="chat"
        )


# The data


def test_every_error_of_the_instructions_is_reported_at_once(tmp_path: Path) -> None:
    write_data(tmp_path / "data", count=12)
    (tmp_path / "data" / "01.jpg").write_bytes(b"no image")
    human, gpt = {"from": "human", "value": "<image> a?"}, {"from": "gpt", "value": "a"}
    entries: list[Any] = [
        make_entry(0),
        make_entry(1),
        make_entry(1, id="again"),
        make_entry(2, image="lost.jpg"),
        make_entry(3, image=" "),
        make_entry(4, conversations=[human]),
        make_entry(5, conversations=[gpt, human]),
        make_entry(6, conversations=[human, {**gpt, "value": " "}]),
        make_entry(7, conversations=[{**human, "value": "no placeholder"}, gpt]),
        make_entry(8, conversations=[human, {**gpt, "value": "<image>"}]),
        make_entry(9, image=None),
        make_entry(10, conversation=[]),
        make_entry(11, conversations=[{"from": "human"}]),
        "text",
    ]
    file = tmp_path / "instructions.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(DataValidationError) as caught:
        read_conversations(file, tmp_path / "data", check_images=True)
    counts = {
        "image missing": 1,
        "'image' is not a non-blank text": 1,
        "a question without an answer": 1,
        "speakers are not 'human' and 'gpt' in turn": 1,
        "blank turn": 1,
        "<image> wanted once, in the first question": 1,
        "<image> in an answer": 1,
        "<image> wanted nowhere without an image": 1,
        "unknown field 'conversation'": 1,
        "'conversations' is not a list of {'from': …, 'value': …}": 1,
        "not an object": 1,
        "no turns": 1,
        "image unreadable": 2,  # conversations, not images
    }
    assert caught.value.counts == counts
    kept, skipped = read_conversations(
        file, tmp_path / "data", check_images=True, skip_invalid=True
    )
    assert [conversation.name for conversation in kept] == ["0"]
    assert skipped == counts


def hash_images(*images: ImageSource) -> str:
    turns = (("<image>", "a car"),)
    return hash_conversations([Conversation("c", image, turns) for image in images])


def test_the_hash_of_conversations_distinguishes_images_and_knows_a_moved_folder(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("old/coco", "old/gqa"):
        shutil.copytree(parts / "data", tmp_path / folder)
    old, new = tmp_path / "old", tmp_path / "new"
    names = [Path("coco/00.jpg"), Path("gqa/01.jpg")]
    before = hash_images(*(old / name for name in names))
    assert before != hash_images(*(old / name for name in reversed(names)))
    assert before != hash_images(old / "gqa" / "00.jpg", old / "coco" / "01.jpg")
    assert before != hash_images(old / names[0])
    monkeypatch.chdir(tmp_path)
    assert before == hash_images(*(Path("old") / name for name in names))
    shutil.move(old, new)
    assert before == hash_images(*(new / name for name in names))
    (new / names[0]).write_bytes(b"another")
    assert before != hash_images(*(new / name for name in names))


def test_the_hash_of_conversations_distinguishes_packed_images(tmp_path: Path) -> None:
    file = tmp_path / "packed"
    file.write_bytes(b"images")
    images = [
        TarImage(file, "a.jpg", 0, 4), TarImage(file, "b.jpg", 4, 4),
        ParquetImage(file, "image", 0), ParquetImage(file, "image", 1), file,
    ]  # fmt: skip
    assert len({hash_images(image) for image in images}) == len(images)


def test_captions_of_a_language_that_is_not_there_are_refused_with_those_that_are(
    parts: Path,
) -> None:
    with pytest.raises(ValueError, match=r"in the language 'fr'; there are \['en'\]"):
        conversations_of_captions(load_records(parts / "data"), lang="fr")


def test_a_file_that_is_not_a_list_or_a_missing_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "instructions.json"
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a folder"):
        read_conversations(file, tmp_path / "lost")
    with pytest.raises(ValueError, match=r"instructions\.json is not JSON"):
        read_conversations(file, tmp_path)
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no list"):
        read_conversations(file, tmp_path)
