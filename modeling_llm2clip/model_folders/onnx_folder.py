"""Find the files in a folder of ONNX graphs, and open the graphs.

Files are laid out as in transformers.js: graphs in `onnx/`, named by tower and type of weights,
next to the tokenizer, `preprocessor_config.json` and `config.json`. torch is imported only to open
or fingerprint graphs.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._extras import ONNX_RUNTIME, require
from ..configs.encoding_config import TextWeights
from .model_folder import ONNX_RECORD, find_model_folder, read_json_object

if TYPE_CHECKING:
    from ..encoding.onnx_encoding import OnnxEncoder

GRAPHS = "onnx"
# transformers.js calls these weights fp32, q8 and q4, and looks for files with these suffixes.
SUFFIXES: dict[TextWeights, str] = {"float32": "", "int8": "_quantized", "int4": "_q4"}
DTYPES: dict[TextWeights, str] = {"float32": "fp32", "int8": "q8", "int4": "q4"}
_TOWERS = {"text": "text_model", "image": "vision_model"}


def graph_file(
    folder: Path, modality: str, weights: TextWeights = "float32", *, is_only: bool = False
) -> Path:
    """Return the file of a graph; TEI reads a text graph that is the folder's only tower."""
    name = "model" if is_only and modality == "text" else _TOWERS[modality]
    return folder / GRAPHS / f"{name}{SUFFIXES[weights]}.onnx"


def data_file(graph: Path) -> Path:
    """Return the weight file of a graph that is too large for a single file."""
    return graph.with_name(f"{graph.name}_data")


def read_onnx_record(folder: Path) -> dict[str, Any]:
    file = folder / ONNX_RECORD
    record = read_json_object(file) if file.is_file() else None
    if record is None:
        raise ValueError(
            f"{folder} has no readable {ONNX_RECORD}, so it is not a folder of ONNX graphs. Export "
            "one with llm2clip export MODEL OUTPUT --onnx."
        )
    return record


def find_onnx_folder(source: str | Path, *, revision: str | None = None) -> Path:
    only = None if Path(source).is_dir() else ["*.json", "*.jinja", f"{GRAPHS}/*"]
    folder = find_model_folder(source, revision=revision, only=only)
    read_onnx_record(folder)
    return folder


def load_onnx_encoder(
    source: str | Path,
    *,
    weights: TextWeights | None = None,
    revision: str | None = None,
    modalities: Collection[str] = ("text", "image"),
    num_threads: int | None = None,
) -> OnnxEncoder:
    """Open a folder that `llm2clip export --onnx` wrote, for ONNX Runtime on the CPU.

    Args:
        source: Folder of ONNX graphs, or Hub id.
        weights: Precision of the weights of the language model's linear layers; None for the most
            exact available.
        revision: Branch, tag or commit of the Hub repository.
        modalities: Graphs to open, if the folder has them: `"text"`, `"image"`.
        num_threads: Threads per graph; None for ONNX Runtime's default.

    Returns:
        An encoder for texts, images, or both.

    Raises:
        MissingExtraError: `onnxruntime` is not installed.
        ValueError: The folder does not contain ONNX graphs, or none with these weights or for these
            modalities.

    Examples:
        >>> encoder = load_onnx_encoder("my-onnx-model")  # doctest: +SKIP
        >>> encoder.encode_texts(["a dog"]).shape == (1, 32)  # doctest: +SKIP
        True
    """
    require(ONNX_RUNTIME)
    import torch

    from ..encoding.onnx_encoding import OnnxEncoder
    from ..heads_llm2clip import LogitRule
    from ..processing_llm2clip import LLM2CLIPProcessor

    folder = find_onnx_folder(source, revision=revision)
    record = read_onnx_record(folder)
    there = [name for name in modalities if _list_graphs(folder, name)]
    graphs = {name: choose_graph(folder, name, weights) for name in there or modalities}
    sessions = {n: open_session(graph, num_threads=num_threads) for n, graph in graphs.items()}
    processor = LLM2CLIPProcessor.from_pretrained(folder, local_files_only=True)
    scale = record["logit_scale"]
    rule = None if scale is None else LogitRule(torch.tensor(scale))
    return OnnxEncoder(processor, sessions, rule)


def choose_graph(folder: Path, modality: str, weights: TextWeights | None) -> Path:
    """Return the graph for texts, or for images (always float32).

    With `weights=None`, the most exact weights available are chosen.
    """
    graphs = _list_graphs(folder, modality)
    if not graphs:
        raise ValueError(f"{folder} has no graph for {modality}s. Export the whole model.")
    chosen = next(iter(graphs)) if weights is None or modality == "image" else weights
    if chosen not in graphs:
        raise ValueError(
            f"{folder} has text graphs with {', '.join(graphs)} weights, but none with {chosen}. "
            "Choose one of these, or export the model again with --onnx-weights."
        )
    return graphs[chosen]


def _list_graphs(folder: Path, modality: str) -> dict[TextWeights, Path]:
    """Return the files of a modality's graphs by their weights, the most exact first."""
    files = (
        (weights, graph_file(folder, modality, weights, is_only=is_only))
        for weights in SUFFIXES
        for is_only in (False, True)
    )
    return {weights: file for weights, file in files if file.is_file()}


def fingerprint_graph(folder: Path, modality: str, weights: TextWeights | None) -> dict[str, str]:
    """Describe everything that determines a graph's embeddings.

    The fingerprint combines the exported model's fingerprint with the SHA-256 of `graph` and of
    `tokenizer and settings`, which may have changed since the export.
    """
    from ..data.atomic_files import hash_file, hash_json
    from .fingerprint import hash_model_files  # imports torch

    graph = choose_graph(folder, modality, weights)
    files = [file for file in (graph, data_file(graph)) if file.is_file()]
    return {
        **read_onnx_record(folder)["source"][modality],
        "graph": hash_json([hash_file(file) for file in files]),
        "tokenizer and settings": hash_model_files(folder, ["*.json"]),
    }


def open_session(graph: Path, *, num_threads: int | None = None) -> Any:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    options = onnxruntime.SessionOptions()
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    # Spinning threads would take cores from torch and from other graphs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors; warnings are about optimizations that do not apply
    try:
        return onnxruntime.InferenceSession(
            os.fspath(graph), options, providers=["CPUExecutionProvider"]
        )
    except (errors.Fail, errors.InvalidProtobuf, errors.InvalidGraph, errors.NoSuchFile,
            errors.NotImplemented, errors.InvalidArgument) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        raise ValueError(f"ONNX Runtime cannot open {graph}: {reason} Export it again.") from error
