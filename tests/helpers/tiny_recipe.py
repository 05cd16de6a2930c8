"""A recipe on tiny towers and two dozen images, for the tests of `train`."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from aligning import write_data
from tiny_encoders import save_tiny_encoder
from tiny_folders import save_tiny_llm, save_tiny_vision

from modeling_llm2clip.configs.config_fields import read_config
from modeling_llm2clip.configs.train_config import TrainConfig

# Few steps, with a checkpoint before the last one.
SHORT: dict[str, Any] = {
    "device": "cpu",
    "build": {"prompt": "none", "projection_dim": 16, "max_text_length": 64},
    "finetune": {"max_steps": 4, "per_device_train_batch_size": 4, "num_held_out": 4,
                 "save_steps": 2},
    "extract": {"rows_per_shard": 16, "show_progress": False},
    "align": {"max_steps": 6, "global_batch_size": 4, "held_out_ratio": 0.2, "save_steps": 2,
              "eval_steps": 2},
}  # fmt: skip
# Folders with weights that must not depend on how often a run was stopped.
WEIGHTS = ("built", "fine-tuned/lora", "fine-tuned/model", "captions", "images", "teacher",
           "aligned/model", "model")  # fmt: skip


def prepare_sources(folder: Path) -> Path:
    """Write the towers and the data that the recipes of `write_recipe` name."""
    save_tiny_vision(folder / "vision")
    save_tiny_llm(folder / "llm")
    write_data(folder / "data", count=30)
    return folder


def prepare_proclip(folder: Path) -> dict[str, Any]:
    """Write a tiny CLIP, and return the recipe options that ProCLIP's terms need."""
    return {
        "vision_model": str(save_tiny_encoder("clip", folder / "clip")),
        "finetune": None,
        "inherit": True,
        "build": {"projection_dim": None, "keep_projection": True, "text_adapter_layers": 1},
        "align": {"vision_training": "full", "distillation_weight": 1.0, "inherit_steps": 4},
    }


def write_recipe(sources: Path, file: Path, *, output: Path | str, **changed: Any) -> Path:
    """Write a recipe, with changed sections merged into those of `SHORT`."""
    recipe = {
        "vision_model": str(sources / "vision"),
        "text_model": str(sources / "llm"),
        "data": str(sources / "data"),
        "output": str(output),
        **SHORT,
    }
    for name, value in changed.items():
        before = recipe.get(name)
        is_section = isinstance(value, dict) and isinstance(before, dict)
        recipe[name] = {**before, **value} if is_section else value  # type: ignore[dict-item]
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return file


def make_recipe(sources: Path, output: Path, **changed: Any) -> TrainConfig:
    """Write a recipe, and read it back from its file."""
    file = write_recipe(sources, output.with_suffix(".yaml"), output=output, **changed)
    return read_config(file, TrainConfig)


def read_files(folder: Path, *, parts: tuple[str, ...] = ("",)) -> dict[str, bytes]:
    """Return the content of every file in the given folders of a run, by path."""
    files = (file for part in parts for file in (folder / part).rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def names_that_differ(one: Path, other: Path) -> list[str]:
    """List the files of models, LoRA and stores that differ between two runs."""
    first, second = read_files(one, parts=WEIGHTS), read_files(other, parts=WEIGHTS)
    assert any(name.startswith("aligned/model/model") for name in first)
    return [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]


@contextmanager
def signal_at(file: Path) -> Iterator[None]:
    """Send SIGTERM to this process once a file has its first line."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            if file.is_file() and file.read_bytes().count(b"\n"):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
