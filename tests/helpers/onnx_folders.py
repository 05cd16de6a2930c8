"""A tiny model and its ONNX graphs, which many tests share and none may change."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
from tiny import tiny_model

from modeling_llm2clip import ExportConfig, export_model
from modeling_llm2clip.model_folders.model_writing import save_model

ALL_WEIGHTS = ("float32", "int8", "int4")
_FOLDERS = tempfile.TemporaryDirectory(prefix="llm2clip-onnx-")  # removed when the process ends


@cache
def shared_source() -> Path:
    """Folder of a model whose layers do not amplify the rounding of weights, as strong ones do."""
    model, processor = tiny_model(max_text_length=128)
    with torch.no_grad():
        for parameter in model.text_model.layers.parameters():
            parameter.mul_(0.5)
    return save_model(model, processor, Path(_FOLDERS.name) / "model")


@cache
def shared_graphs() -> Path:
    """Folder of its graphs, with the text tower in all weights."""
    config = ExportConfig(onnx=True, onnx_weights=ALL_WEIGHTS, max_recall_loss=1)
    return export_model(shared_source(), Path(_FOLDERS.name) / "graphs", config)
