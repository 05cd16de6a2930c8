"""Texts as the processor prepares or rejects them, its options, and saving and loading it."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from breaking import edit_json
from shared_models import fresh_processor, shared_model
from tiny import draw_noise, tiny_model, tiny_tokenizer
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor

from modeling_llm2clip import LLM2CLIPProcessor

LONG_TEXT = " ".join(["dog"] * 50)  # the maximum is 32 tokens


@pytest.fixture
def processor() -> LLM2CLIPProcessor:
    """A fresh processor, because it counts truncated texts."""
    return fresh_processor()


@cache
def prompt() -> tuple[list[int], list[int]]:
    config = shared_model()[0].config
    return config.prompt_prefix_ids, config.prompt_suffix_ids


def untruncated_ids(texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = fresh_processor().tokenizer(texts, truncation=False)["input_ids"]
    return ids


# Texts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (["a dog", None], r"number 2 is NoneType, not str"),
        ([b"a dog"], r"number 1 is bytes, not str"),
        ([["a dog"], ["a cat"]], r"2 are not: number 1 is list, not str; number 2 is list"),
        ([1.5], r"number 1 is float, not str"),
        ([], r"the list is empty"),
        (["a dog", "a \ud800 dog"], r"1 are not: number 2 has an unpaired surrogate: 'a \\ud800"),
        ([1] * 20, r"20 are not: number 1 is int.*number 8 is int.*; …"),
        (None, "neither images nor text"),
    ],
)
def test_invalid_captions_are_named(processor: LLM2CLIPProcessor, text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(text=text)


@pytest.mark.parametrize("blank", ["", " \n\t"])
def test_a_blank_text_warns_and_has_the_ids_of_the_prompt_alone(
    processor: LLM2CLIPProcessor, blank: str
) -> None:
    prefix, suffix = prompt()
    for text in (blank, ["a dog", blank]):
        with pytest.warns(UserWarning, match="A text is blank: .* only the prompt") as seen:
            batch = processor(text=text)
        assert len(seen) == 1
        real = batch["attention_mask"][-1].bool()
        assert batch["input_ids"][-1][real].tolist() == prefix + suffix
        with torch.no_grad():
            assert shared_model()[0](**batch).text_embeds.isfinite().all()
        with pytest.raises(ValueError, match=r"1 are not: number . is blank"):
            processor.list_ids([text] if text is blank else text)


def test_strings_iterables_and_whitespace_around_a_caption_give_equal_ids(
    processor: LLM2CLIPProcessor,
) -> None:
    ids = processor(text="a dog")["input_ids"]
    for text in (["a dog"], (text for text in ["a dog"]), " \n a dog\t "):
        assert torch.equal(ids, processor(text=text)["input_ids"])  # type: ignore[arg-type]


def test_texts_are_padded_right_to_the_longest(processor: LLM2CLIPProcessor) -> None:
    batch = processor(text=["a dog", "two red apples on a wooden table"])
    lengths = batch["attention_mask"].sum(dim=1)
    assert lengths[0] < lengths[1] == batch["input_ids"].shape[1]
    assert batch["attention_mask"][0, : lengths[0]].all()
    assert (batch["input_ids"][0, lengths[0] :] == processor.tokenizer.pad_token_id).all()


def test_a_long_caption_is_truncated_before_the_suffix_and_counted(
    processor: LLM2CLIPProcessor,
) -> None:
    prefix, suffix = prompt()
    ids = processor(text=[LONG_TEXT, "a dog"])["input_ids"][0].tolist()
    assert len(ids) == processor.max_text_length == 32
    assert ids[: len(prefix)] == prefix and ids[-len(suffix) :] == suffix
    full = processor.tokenizer(LONG_TEXT, truncation=False, verbose=False)["input_ids"]
    assert ids[: -len(suffix)] == full[: 32 - len(suffix)]
    assert processor.num_truncated_texts == 1
    processor(text=[LONG_TEXT, "a dog", LONG_TEXT])
    assert processor.num_truncated_texts == 3


def test_a_caption_that_just_fits_is_not_truncated(processor: LLM2CLIPProcessor) -> None:
    prefix, suffix = prompt()
    room = processor.max_text_length - len(prefix) - len(suffix)
    text = "x" + "~" * (room - 1)  # characters that no merge of the tokenizer joins
    assert processor(text=text)["input_ids"].shape == (1, 32)
    assert processor.num_truncated_texts == 0
    processor(text=text + "~")
    assert processor.num_truncated_texts == 1


def test_long_captions_raise_an_error_that_names_them_if_requested(
    processor: LLM2CLIPProcessor,
) -> None:
    texts = ["a dog", LONG_TEXT, "a cat"]
    for truncation in (True, False):
        with pytest.raises(ValueError, match=r"1 of 3 texts have more than 32 tokens .*number 2"):
            processor(text=texts, truncation=truncation, on_long_text="error")
    assert processor(text=texts, truncation=False)["input_ids"].shape[1] > 32
    assert processor.num_truncated_texts == 0
    processor(text=["a dog", "a cat"], on_long_text="error")


@pytest.mark.parametrize("kwargs", [{"max_length": 14}, {"text_kwargs": {"max_length": 14}}])
def test_truncation_to_a_given_length_is_counted_too(
    processor: LLM2CLIPProcessor, kwargs: Any
) -> None:
    text = "two red apples on a wooden table"
    assert processor(text=[text, "a dog"], **kwargs)["input_ids"].shape == (2, 14)
    assert processor.num_truncated_texts == 1
    with pytest.raises(ValueError, match="more than 14 tokens"):
        processor(text=[text, "a dog"], on_long_text="error", **kwargs)


def test_options_may_be_flat_or_nested(processor: LLM2CLIPProcessor) -> None:
    flat = processor(text=["a dog", "x"], padding="max_length", return_tensors="np")
    nested = processor(
        text=["a dog", "x"],
        text_kwargs={"padding": "max_length"},
        common_kwargs={"return_tensors": "np"},
    )
    for batch in (flat, nested):
        assert type(batch["input_ids"]) is np.ndarray
        assert batch["input_ids"].shape == (2, 32)
    assert (flat["input_ids"] == nested["input_ids"]).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"on_long_texts": "error"}, "on_long_texts"),
        ({"max_lenght": 20}, "max_lenght"),
        ({"text_kwargs": {"max_lenght": 20}}, "max_lenght"),
        ({"txt_kwargs": {"max_length": 20}}, "txt_kwargs"),
        ({"images_kwargs": {"do_resise": False}}, "do_resise"),
        ({"images_kwargs": {"truncation": False}}, "truncation"),  # known, but at another level
        ({"common_kwargs": {"return_tensor": "np"}}, "return_tensor"),
        ({"pad": None}, "pad"),
    ],
)
def test_an_unknown_option_is_rejected_with_the_known_ones(
    processor: LLM2CLIPProcessor, settings: Any, named: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"has no options \['{named}'\].*Known: .*'max_length', .*'on_long"
    ):
        processor(text="a dog", images=draw_noise(), **settings)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"on_long_text": "ignore"}, r"'truncate' or 'error', got 'ignore'"),
        ({"return_attention_mask": False}, "return_attention_mask=False: the model needs"),
        ({"text_kwargs": {"return_attention_mask": False}}, "=False: the model needs"),
        *((more, "each row must be one caption or one image") for more in (
            {"text_pair": "a cat"},
            {"text_kwargs": {"is_split_into_words": True}},
            {"return_overflowing_tokens": True},
            {"videos": [draw_noise()]},
        )),
    ],
)  # fmt: skip
def test_options_that_would_change_what_a_row_is_are_rejected(
    processor: LLM2CLIPProcessor, settings: Any, error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        processor(text="a dog", **settings)


def test_options_that_callers_pass_to_any_processor_change_nothing(
    processor: LLM2CLIPProcessor,
) -> None:
    wanted = processor(text=["a dog", "a cat on a mat"], images=[draw_noise()] * 2)
    found = processor(
        text=["a dog", "a cat on a mat"],
        images=[draw_noise()] * 2,
        videos=None,
        audio=None,
        text_pair=None,
        text_kwargs={"padding": True, "truncation": "longest_first", "max_length": None},
        images_kwargs={"do_resize": True},
        audio_kwargs={"padding": True, "sampling_rate": 16000},
        videos_kwargs={"fps": 2},
        common_kwargs={"return_tensors": "pt"},
        add_special_tokens=True,
        padding_side="right",
        return_attention_mask=True,
    )
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_options_of_the_image_processor_take_effect() -> None:
    processor = tiny_model("siglip2")[1]
    patches = processor(images=draw_noise(), max_num_patches=4)["pixel_values"]
    assert patches.shape[1] == 4 < processor(images=draw_noise())["pixel_values"].shape[1]


@pytest.mark.parametrize(
    "text", [5, {"a": 1}, 1.5, b"a dog", object(), {"a dog"}, np.array([["a dog", "a cat"]])]
)
def test_an_input_of_another_type_is_rejected_by_its_name(
    processor: LLM2CLIPProcessor, text: Any
) -> None:
    name = type(text).__name__
    with pytest.raises(
        ValueError, match=f"text must be one non-blank string or a list of them, not {name}"
    ):
        processor(text=text)


def test_a_length_without_room_for_a_caption_is_rejected(processor: LLM2CLIPProcessor) -> None:
    prefix, suffix = prompt()
    least = len(prefix) + len(suffix) + 1
    for length in (2, least - 1):
        with pytest.raises(ValueError, match=rf"max_length={length} leaves no room.* {least}\."):
            processor(text=LONG_TEXT, max_length=length)
    assert processor(text=LONG_TEXT, max_length=least)["input_ids"].shape == (1, least)


@pytest.mark.parametrize("length", ["20", 20.0, True, 0, -1])
def test_a_length_that_is_not_a_positive_integer_is_rejected(
    processor: LLM2CLIPProcessor, length: Any
) -> None:
    with pytest.raises(ValueError, match=rf"max_length={length!r} must be a positive integer"):
        processor(text="a dog", max_length=length)
    with pytest.raises(ValueError, match=rf"max_text_length={length!r} must be a positive integer"):
        LLM2CLIPProcessor(processor.image_processor, processor.tokenizer, length)


def test_threads_with_different_lengths_can_share_a_processor(processor: LLM2CLIPProcessor) -> None:
    texts = ["two red apples on a wooden table", "x", LONG_TEXT]
    jobs: list[Callable[[], Any]] = [
        lambda: processor(text=texts)["input_ids"].tolist(),
        lambda: processor(text=texts, max_length=14)["input_ids"].tolist(),
        lambda: processor(text=texts[:2], padding="max_length")["input_ids"].tolist(),
        lambda: processor.list_ids(texts),
    ]
    wanted = [job() for job in jobs]
    processor.num_truncated_texts = 0
    # Without the lock, some of these turns differed or raised in every run that was tried.
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda turn: jobs[turn % 4](), range(400)))
    assert all(ids == wanted[turn % 4] for turn, ids in enumerate(found))
    # Each of 100 turns of the first job truncates one text, and of the second job two.
    assert processor.num_truncated_texts == 100 + 100 * sum(
        len(ids) > 14 for ids in untruncated_ids(texts)
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_is_forked_while_a_thread_tokenizes_can_tokenize(
    processor: LLM2CLIPProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its locks may be held by a thread that the new process lacks."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    texts, ended = ["two red apples", "a dog", LONG_TEXT], Event()
    wanted = processor.list_ids(texts)

    def tokenize() -> None:
        while not ended.is_set():
            processor(text=texts * 20)

    with ThreadPoolExecutor(2) as pool:
        threads = [pool.submit(tokenize) for _ in range(2)]
        codes = [run_in_fork(lambda: processor.list_ids(texts) == wanted) for _ in range(5)]
        ended.set()
        assert [thread.result() for thread in threads] == [None, None]
    assert codes == [0] * 5


def run_in_fork(is_right: Callable[[], bool]) -> int:
    """Return 0 for a forked process that is right, and a negative number for one that waits."""
    if (process := os.fork()) == 0:
        signal.alarm(20)  # kills this process
        os._exit(0 if is_right() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_list_ids_returns_the_ids_of_a_call() -> None:
    processor = copy.deepcopy(fresh_processor())
    texts = ["a dog\n\n", "\x1f a cat ", LONG_TEXT]
    for longest in (512, 20):  # set by sentence-transformers' max_seq_length
        processor.tokenizer.model_max_length = longest
        called = processor(text=texts)
        listed, is_truncated = processor.list_ids(texts)
        lengths = called["attention_mask"].sum(dim=1).tolist()
        assert listed == [
            row[:length] for row, length in zip(called["input_ids"].tolist(), lengths, strict=True)
        ]
        assert is_truncated == [False, False, True]
    with pytest.raises(ValueError, match=r"Got one string \('a dog'\)\. Pass a list"):
        processor.list_ids("a dog")
    processor.tokenizer.model_max_length = sum(map(len, prompt()))  # all texts would be alike
    with pytest.raises(ValueError, match="leaves no room for a caption"):
        processor.list_ids(["a dog"])


def test_rows_keep_their_lengths_without_padding(processor: LLM2CLIPProcessor) -> None:
    texts = ["a dog", "two red apples", LONG_TEXT]
    rows = processor(text=texts, padding=False, return_tensors=None)["input_ids"]
    padded = processor(text=texts)["attention_mask"].sum(dim=1).tolist()
    assert [len(row) for row in rows] == padded


# Saving and loading


def test_a_saved_and_loaded_processor_gives_equal_inputs(tmp_path: Path) -> None:
    before = LLM2CLIPProcessor(
        CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False),
        shared_model()[1].tokenizer,
        20,
    )
    before.save_pretrained(tmp_path)
    after = AutoProcessor.from_pretrained(tmp_path)
    assert type(after) is LLM2CLIPProcessor and after.max_text_length == 20
    inputs = {"text": ["a dog", LONG_TEXT], "images": [draw_noise(), draw_noise(33, 64)]}
    wanted, found = before(**inputs), after(**inputs)
    assert wanted.keys() == found.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert after.num_truncated_texts == 1


def test_a_missing_length_is_rejected_and_may_be_passed(
    tmp_path: Path, processor: LLM2CLIPProcessor
) -> None:
    processor(text=LONG_TEXT)  # counted, and not saved
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    assert "num_truncated_texts" not in path.read_text()
    content = json.loads(path.read_text())
    content["max_txt_length"] = content.pop("max_text_length")
    path.write_text(json.dumps(content))
    for auto_class in (LLM2CLIPProcessor, AutoProcessor):
        with pytest.raises(ValueError, match=r"lacks max_text_length.*'max_txt_length'"):
            auto_class.from_pretrained(tmp_path)
        loaded = auto_class.from_pretrained(tmp_path, max_text_length=20)
        assert (loaded.max_text_length, loaded.num_truncated_texts) == (20, 0)


@pytest.mark.parametrize(
    ("name", "field", "shown"),
    [
        ("processor_config.json", "image_processor", r"processor_config\.json .* \(\w+Error: "),
        ("tokenizer_config.json", "bos_token", r"tokenizer_config\.json has .* bos_token has to"),
        ("tokenizer.json", "version", r"tokenizer\.json .* expected a string at line 1.*Restore"),
    ],
)
def test_a_field_of_another_type_is_refused_with_its_file(
    name: str, field: str, shown: str, tmp_path: Path, processor: LLM2CLIPProcessor
) -> None:
    processor.save_pretrained(tmp_path)
    edit_json(name, lambda content: content.update({field: -1}))(tmp_path)
    for trust_remote_code in (None, True):
        with pytest.raises(ValueError, match=shown):
            LLM2CLIPProcessor.from_pretrained(tmp_path, trust_remote_code=trust_remote_code)


def test_an_argument_that_is_refused_is_named(tmp_path: Path, processor: LLM2CLIPProcessor) -> None:
    processor.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"or this call has an argument \(image_processor\),.*TypeError"
    ):
        LLM2CLIPProcessor.from_pretrained(tmp_path, image_processor=3)


def test_the_tokenizer_alone_gives_the_same_ids(
    tmp_path: Path, processor: LLM2CLIPProcessor
) -> None:
    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["  a dog ", LONG_TEXT, '東京 "x"']
    ids = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, processor(text=texts)["input_ids"])
    # Without the prompt, which is part of the tokenizer, they differ.
    bare = LLM2CLIPProcessor(processor.image_processor, tiny_tokenizer(), 32)
    assert bare(text=texts)["input_ids"].tolist() != ids.tolist()


TOO_LARGE = r"images would be too large.* at most"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"size": {"height": 30_000, "width": 30_000}}, TOO_LARGE),
        ({"size": {"shortest_edge": 10**9}}, TOO_LARGE),
        ({"crop_size": {"height": 10**6, "width": 224}}, TOO_LARGE),
        ({"max_num_patches": 10**9}, TOO_LARGE),
        ({"image_std": [0.3, 0.3]}, r"image_std=.* green and blue.*processor_config\.json"),
    ],
)
def test_settings_of_images_that_no_tower_takes_are_refused_before_an_image_is_made(
    settings: dict[str, Any], error: str, tmp_path: Path
) -> None:
    shared_model()[1].save_pretrained(tmp_path)
    edit_json("processor_config.json", lambda c: c["image_processor"].update(settings))(tmp_path)
    with pytest.raises(ValueError, match=error):
        LLM2CLIPProcessor.from_pretrained(tmp_path)
