"""The script that captions images: by a tiny model, by alt texts, by file names."""

from __future__ import annotations

import json
import runpy
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest
from llava_parts import build, save_parts
from tiny import tiny_images, tiny_tokenizer
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    set_seed,
)

from modeling_llm2clip import load_records

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "scripts" / "write_captions.py"

CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endfor %}"
)


class Done(NamedTuple):
    """The exit code of the script, what it printed, and its errors."""

    returncode: int
    out: str
    err: str


Script: TypeAlias = Callable[..., Done]


@pytest.fixture
def write_captions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Runs the script in this process."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        code, printed = ended.value.code, capsys.readouterr()
        if isinstance(code, str):  # Python would print it
            return Done(1, printed.out, printed.err + code)
        return Done(int(code or 0), *printed)

    return run


def save_images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tiny_images()[0].convert("RGB").save(folder / name)
    return folder


def read_captions(folder: Path) -> dict[str, str]:
    return {record.name: record.captions[0] for record in load_records(folder)}


def save_chat_model(folder: Path) -> Path:
    """A random model that ends its answer after a few tokens."""
    set_seed(0)
    model, processor = build(save_parts(folder / "parts"))
    processor.chat_template = processor.tokenizer.chat_template = CHAT
    model.generation_config.eos_token_id = 2
    # Ids of letters alone, and the end, which soon outweighs them.
    model.generation_config.suppress_tokens = [*range(2), *range(3, 20)]
    model.generation_config.exponential_decay_length_penalty = (4, 1e6)
    return save_captioner(folder / "captioner", model, processor)


def save_blip(folder: Path) -> Path:
    set_seed(0)
    tokenizer = tiny_tokenizer(begins=False)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 32}  # fmt: skip
    ids = {"bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    text = {**size, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    vision = {**size, "image_size": 32, "patch_size": 16}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    return save_captioner(folder / "captioner", model, processor)


def save_captioner(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_model_captions_what_has_no_line_and_continues(
    tmp_path: Path, write_captions: Script
) -> None:
    captioner = save_chat_model(tmp_path)
    images = save_images(tmp_path / "images", "a.png", "b/c.png")
    (images / "broken.png").write_bytes(b"no image")
    line = {"image": "a.png", "captions": ["a cat"]}
    (images / "captions.jsonl").write_text(json.dumps(line) + "\n", "utf-8")
    done = write_captions("model", images, captioner, "--max-new-tokens", "2")
    assert done.returncode == 1, done.err
    assert "b/c.png: truncated by --max-new-tokens: " in done.err
    assert "broken.png" in done.err and "2 images have no caption" in done.err
    assert read_captions(images) == {"a.png": "a cat"}
    (images / "broken.png").unlink()
    done = write_captions("model", images, captioner, "--max-new-tokens", "20")
    assert done.returncode == 0, done.err
    captions = read_captions(images)
    assert captions.pop("a.png") == "a cat"
    # Neither the prompt nor a special token is part of the caption.
    assert "Describe" not in captions["b/c.png"] and "<|" not in captions["b/c.png"]


def test_a_captioner_without_a_chat_template_gets_the_image_alone(
    tmp_path: Path, write_captions: Script
) -> None:
    images = save_images(tmp_path / "images", "a.png")
    done = write_captions("model", images, save_blip(tmp_path), "--max-new-tokens", "4")
    # A random BLIP never ends its caption, and takes no generation config to end it.
    assert done.returncode == 1 and "a.png: truncated by --max-new-tokens: " in done.err


def test_alt_texts_are_found_by_file_name_and_others_are_named(
    tmp_path: Path, write_captions: Script
) -> None:
    images = save_images(tmp_path / "images", "Ein Hund.png", "two.png", "none.png")
    page = tmp_path / "page.html"
    page.write_text(
        '<img src="/media/Ein%20Hund.png?w=300" alt=" A dog\n on a beach &amp; a ball ">'
        '<img src="two.png" alt="one text"><img src="big/two.png" alt="another text">'
        '<img src="none.png" alt="">',
        encoding="utf-8",
    )
    done = write_captions("alt-texts", images, page)
    assert done.returncode == 1
    assert read_captions(images) == {"Ein Hund.png": "A dog on a beach & a ball"}
    assert "none.png: the page has no alt text for it" in done.err
    assert "two.png: several images or alt texts are of two.png" in done.err


def test_file_names_are_split_into_words_and_those_of_cameras_are_none(
    tmp_path: Path, write_captions: Script
) -> None:
    decomposed = unicodedata.normalize("NFD", "Käse don't 'हिन्दी'.png")  # as on macOS
    images = save_images(
        tmp_path / "images", decomposed, "2019-07_red-Kite (3).png", "trip/IMG_0042.png",
        "DSC00017.png", "IMG-20240101-WA0001.png", "3f2a9bcd.png",
        "9b2d0b0a-7d4e-4c7b-8f5a-2d1c3b4a5e6f.png",
    )  # fmt: skip
    done = write_captions("file-names", images)
    assert done.returncode == 1
    assert read_captions(images) == {
        "2019-07_red-Kite (3).png": "red Kite", decomposed: "Käse don't हिन्दी",
    }  # fmt: skip
    assert "trip/IMG_0042.png: its name has no words" in done.err


def test_a_file_whose_last_line_has_no_end_gets_lines_of_its_own(
    tmp_path: Path, write_captions: Script
) -> None:
    images = save_images(tmp_path / "images", "red kite.png", "dog.png")
    line = json.dumps({"image": "dog.png", "captions": ["one\u2028two"]}, ensure_ascii=False)
    (images / "captions.jsonl").write_text(line, encoding="utf-8")
    assert write_captions("file-names", images).returncode == 0
    assert read_captions(images) == {"dog.png": "one two", "red kite.png": "red kite"}


def test_files_that_cannot_be_read_are_named(tmp_path: Path, write_captions: Script) -> None:
    images = save_images(tmp_path / "images", "a dog.png")
    done = write_captions("alt-texts", images, tmp_path / "nowhere.html")
    assert done.returncode == 1 and "nowhere.html" in done.err
    (images / "captions.jsonl").write_text('{"image": ', encoding="utf-8")
    done = write_captions("file-names", images)
    assert done.returncode == 1 and "captions.jsonl line 1: not JSON" in done.err
