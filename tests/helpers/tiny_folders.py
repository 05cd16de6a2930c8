"""Tiny towers, models and images as folders, for tests of commands, documents and notebooks."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from tiny import tiny_llm, tiny_model, tiny_tokenizer, tiny_vision

from modeling_llm2clip.model_folders.model_writing import save_model

RUN_FOLDER = "LLM2CLIP_TEST_RUN_FOLDER"  # as in `conftest.py`


def save_tiny_vision(folder: Path) -> Path:
    """Save a vision tower with its image processor, as a Hub repository holds them."""
    model, image_processor = tiny_vision()
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


def save_tiny_llm(folder: Path) -> Path:
    """Save a decoder with its tokenizer."""
    tokenizer = tiny_tokenizer()
    tiny_llm(vocabulary_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export_tiny_model(folder: Path, **settings: Any) -> Path:
    """Export a model with room for labels in sentences, whose tokens are almost single bytes."""
    return Path(shutil.copytree(_export_once(**settings), folder))


@cache
def _export_once(**settings: Any) -> Path:
    model, processor = tiny_model(max_text_length=128, **settings)
    parent = tempfile.mkdtemp(dir=os.environ[RUN_FOLDER])
    return save_model(model, processor, Path(parent) / "model")


def save_captioned_images(folder: Path, *, count: int) -> Path:
    """Save images of colors and heights of their own, every second one with captions twice."""
    lines = []
    for number in range(count):
        Image.new("RGB", (40, 40 + number), (25 * number, 80, 10)).save(folder / f"{number}.png")
        for lang in ("en", "de")[: 1 + number % 2]:
            lines.append({"image": f"{number}.png", "captions": ["it"], "lang": lang})
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")
    return folder


def save_captioned_squares(folder: Path, *, count: int) -> None:
    """Images of one color each, with two captions."""
    folder.mkdir()
    lines = []
    for number in range(count):
        color = (number, 255 - number, number * 7 % 256)
        Image.new("RGB", (32, 32), color).save(folder / f"{number}.png")
        captions = [f"number {number} in one color", f"a square, the {number}th"]
        lines.append(json.dumps({"image": f"{number}.png", "captions": captions}))
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
