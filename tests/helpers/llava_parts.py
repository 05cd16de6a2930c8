"""Tiny parts of the LLaVA recipe: a tower, an LLM, images and talk about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aligning import write_data
from llava_model import build_llava
from tiny_folders import save_tiny_llm, save_tiny_vision
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "examples" / "scripts" / "llava"
TEMPLATE = (RECIPE / "vicuna.jinja").read_text(encoding="utf-8")
TURNS = (("<image>\nWhat is it?", "a red car"), ("Is it new?", "yes"))


def save_parts(folder: Path) -> Path:
    """A tower, an LLM with its head, captioned images, and instructions about them."""
    save_tiny_vision(folder / "tower")
    llm = save_tiny_llm(folder / "llm")
    AutoModelForCausalLM.from_pretrained(llm).save_pretrained(llm)
    write_data(folder / "data", count=12)
    entries = [make_entry(number) for number in range(12)]
    (folder / "instructions.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


def make_entry(number: int, **changed: Any) -> dict[str, Any]:
    lines = [
        {"from": speaker, "value": text}
        for turn in TURNS
        for speaker, text in zip(("human", "gpt"), turn, strict=True)
    ]
    return {"id": str(number), "image": f"{number:02}.jpg", "conversations": lines, **changed}


def build(parts: Path) -> tuple[Any, Any]:
    return build_llava(parts / "tower", parts / "llm", chat_template=TEMPLATE)
