"""A tiny model and its ONNX graphs, which many tests share and none may change."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from tiny_folders import export_tiny_model

from modeling_llm2clip import ExportConfig, export_model

ALL_WEIGHTS = ("float32", "int8", "int4")
_FOLDERS = tempfile.TemporaryDirectory(prefix="llm2clip-onnx-")  # removed when the process ends


@cache
def shared_source() -> Path:
    """Folder of a model."""
    return export_tiny_model(Path(_FOLDERS.name) / "model")


@cache
def shared_graphs() -> Path:
    """Folder of its graphs, with the text tower in all weights."""
    config = ExportConfig(onnx=True, onnx_weights=ALL_WEIGHTS, max_recall_loss=1)
    return export_model(shared_source(), Path(_FOLDERS.name) / "graphs", config)
