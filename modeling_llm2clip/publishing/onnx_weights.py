"""Rounds the language model's linear layers in an ONNX graph to 8 or 4 bits.

Everything else stays float32: token embeddings, norms, text adapter and projection. Activations are
float32 too. Each block of weights has its own scale and zero point.

What rounding each of the model's layers (attention and MLP) does to embeddings adds up over the
layers. So where rounding all of them does too much, those that do most of it stay float32.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..encoding.encode import encode_texts
from ..processing_llm2clip import LLM2CLIPProcessor
from .onnx_graphs import save_graph

BLOCK_SIZE = 16
_FLOAT32 = 1  # level of accuracy in which the operator computes; see its documentation
# Where torch's exporter notes the modules that a node comes from.
_SCOPES = "pkg.torch.onnx.name_scopes"
_LLM_SCOPE = "model.text_model."


def write_rounded_graph(
    source: Path, file: Path, *, bits: int, exact_layers: Collection[str] = ()
) -> int:
    """Write a text graph whose language model has rounded weights.

    Args:
        source: The float32 graph.
        file: File to write.
        bits: 8 or 4.
        exact_layers: Names of the model's layers that stay float32, from `measure_layers`.

    Returns:
        Number of linear layers that were rounded.

    Raises:
        ValueError: The graph has no linear layer of a language model.
    """
    import onnx
    import onnx_ir

    model = onnx.load(source)
    products = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    layers = [node.name for node in _iterate_linear_layers(model.graph, exact_layers)]
    if not layers:
        raise ValueError(f"{source} has no linear layers of a language model to round.")
    with _quiet_quantizer():
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        config = nbits.DefaultWeightOnlyQuantConfig(
            block_size=BLOCK_SIZE, is_symmetric=False, accuracy_level=_FLOAT32, bits=bits
        )
        others = sorted({*products} - {*layers})
        quantizer = nbits.MatMulNBitsQuantizer(model, nodes_to_exclude=others, algo_config=config)
        quantizer.process()
    save_graph(onnx_ir.from_proto(quantizer.model.model), file)
    return len(layers)


@torch.no_grad()
def measure_layers(
    model: Any, processor: LLM2CLIPProcessor, texts: Sequence[str], *, bits: int
) -> dict[str, float]:
    """Measure what rounding each layer of the language model alone does to embeddings.

    Args:
        model: A model with a text tower; left as it is.
        processor: Its processor.
        texts: Texts to encode once for each layer.
        bits: 8 or 4.

    Returns:
        Name of each layer in the language model → one minus the mean cosine; empty where the model
        has no list of layers.
    """
    wanted = encode_texts(model, processor, texts).double()
    errors = {}
    for name, layer in _list_layers(model.text_model).items():
        linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        kept = [module.weight.data for module in linear]
        for module in linear:
            module.weight.data = _round(module.weight.data, bits)
        found = encode_texts(model, processor, texts).double()
        for module, weight in zip(linear, kept, strict=True):
            module.weight.data = weight
        errors[name] = float(1 - (found * wanted).sum(dim=1).mean())
    return errors


def choose_exact_layers(errors: Mapping[str, float], *, share: float) -> list[str]:
    """Choose the fewest layers to keep float32, those with the largest errors first.

    Args:
        errors: Of each layer, from `measure_layers`.
        share: How much of the sum of all errors the others may have.
    """
    order = sorted(errors, key=lambda name: -errors[name])
    left, allowed = sum(errors.values()), share * sum(errors.values())
    exact = []
    for name in order:
        if left <= allowed:
            break
        exact.append(name)
        left -= errors[name]
    return exact


def _list_layers(text_model: nn.Module) -> dict[str, nn.Module]:
    """Return the longest list of modules of a language model, by their names in it."""
    lists = {name: m for name, m in text_model.named_modules() if isinstance(m, nn.ModuleList)}
    if not lists:
        return {}
    name = max(lists, key=lambda found: len(lists[found]))
    return {f"{name}.{number}": layer for number, layer in enumerate(lists[name])}


def _round(weight: Tensor, bits: int) -> Tensor:
    """Round as ONNX Runtime's quantizer does: a scale and a zero point for each block of a row."""
    rows, width = weight.shape
    padded = F.pad(weight, (0, -width % BLOCK_SIZE))
    blocks = padded.reshape(rows, -1, BLOCK_SIZE)
    low = blocks.amin(dim=-1, keepdim=True).clamp(max=0)
    high = blocks.amax(dim=-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(weight.dtype).tiny)
    zero = (-low / scale).round()
    whole = ((blocks / scale).round() + zero).clamp(0, 2**bits - 1)
    rounded: Tensor = (whole - zero) * scale
    return rounded.reshape(rows, -1)[:, :width]


@contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Undo what the quantizer's module does to the root logger, which then shows every node."""
    root, own = logging.getLogger(), logging.getLogger("onnxruntime.quantization")
    level, handlers = root.level, [*root.handlers]
    own.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def _iterate_linear_layers(graph: Any, exact_layers: Collection[str]) -> Iterator[Any]:
    """Yield the language model's products with a constant matrix."""
    constant = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constant:
            scopes = {entry.key: entry.value for entry in node.metadata_props}.get(_SCOPES, "")
            is_exact = any(f"{_LLM_SCOPE}{name}." in scopes for name in exact_layers)
            if _LLM_SCOPE in scopes and not is_exact:
                yield node
