"""A tiny evaluation, and the tables of its results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny_encoders import TEXTS, save_tiny_images

from modeling_llm2clip.configs.evaluation_config import EvaluatedDataset, EvaluationConfig
from modeling_llm2clip.evaluation.results import Result, write_result
from modeling_llm2clip.model_folders.fingerprint import fingerprint_model

TASKS = ("retrieval", "cra", "length")


def write_data(folder: Path) -> Path:
    """Eight images with two captions each, in English and in German."""
    lines = [
        {"image": path.name, "captions": [f"{text} {lang}", f"again {text}"], "lang": lang}
        for lang in ("en", "de")
        for path, text in zip(save_tiny_images(folder, len(TEXTS)), TEXTS, strict=True)
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


def read_table(text: str, title: str) -> list[dict[str, str]]:
    """The rows of one table of a Markdown text, each cell by its heading."""
    _, found = text.split(f"**{title[0].upper()}{title[1:]}**\n\n")
    lines = found.partition("\n\n")[0].strip().splitlines()
    heads, _, *rows = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def arguments(output: Path, folder: str, *sources: str, **changes: Any) -> dict[str, Any]:
    """Arguments of `evaluate` for the English captions of such data, with some changes."""
    chosen = {
        "models": sources,
        "data": EvaluatedDataset(name="folder", folder=folder),
        "tasks": TASKS,
        "config": EvaluationConfig(languages=("en",), output=output, show_progress=False),
    }
    return change(chosen, **changes)


def change(chosen: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Change models, data, tasks, or options of the config."""
    of_call = {name: changes.pop(name) for name in ("models", "data", "tasks") if name in changes}
    return {**chosen, **of_call, "config": replace(chosen["config"], **changes)}


def save_scores(file: Path, scores: dict[str, Any], folder: Path, **fingerprint: str) -> Path:
    """A result on COCO of the model in a folder, unless its fingerprint is to change."""
    found = {**fingerprint_model(folder), **fingerprint}
    protocol = {"data": {"lang": "en"}, "model": {"dtype": found.pop("dtype")}, "task": {}}
    result = Result(
        model="m", task="retrieval", dataset="COCO", scores=scores, protocol=protocol,
        counts={"images": 8, "texts": 40}, fingerprint=found,
    )  # fmt: skip
    file.unlink(missing_ok=True)  # which a result of another model may not replace
    write_result(file, result)
    return file
