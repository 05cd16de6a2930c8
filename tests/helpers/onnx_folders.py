"""A tiny model and its ONNX graphs, which many tests share and none may change.

The processes of one run of the tests make them once, which takes ten seconds, into a folder of the
run (`conftest.py`).
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from tiny import draw_noise, tiny_model
from tiny_folders import RUN_FOLDER

from modeling_llm2clip import ExportConfig, export_model
from modeling_llm2clip.model_folders.model_writing import save_model

ALL_WEIGHTS = ("float32", "int8", "int4")


@cache
def shared_source() -> Path:
    """Folder of a model whose layers do not amplify the rounding of weights, as strong ones do."""
    folder = Path(os.environ[RUN_FOLDER]) / "model"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            model, processor = tiny_model(max_text_length=128)
            with torch.no_grad():
                for parameter in model.text_model.layers.parameters():
                    parameter.mul_(0.5)
            save_model(
                model, processor, folder,
                instructions={"query": "Find an image: "}, name="owner/model",
            )  # fmt: skip
    return folder


def write_small_data(folder: Path) -> str:
    """Write a few captioned images, with which the check of an export takes no time."""
    folder.mkdir()
    names = [f"{number}.png" for number in range(4)]
    for number, name in enumerate(names):
        draw_noise(40 + number, 50, seed=number).save(folder / name)
    lines = [json.dumps({"image": name, "captions": [f"noise, image {name}"]}) for name in names]
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


@cache
def shared_graphs() -> Path:
    """Folder of its graphs, with the text tower in all weights."""
    source, folder = shared_source(), Path(os.environ[RUN_FOLDER]) / "graphs"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():  # which has this name once it is whole
            data = write_small_data(folder.with_name("data-of-the-check"))
            config = ExportConfig(
                onnx=True, onnx_weights=ALL_WEIGHTS, onnx_data=data, max_recall_loss=1
            )
            export_model(source, folder, config)
    return folder
