"""Rounds the language model's linear layers in an ONNX graph to 8 or 4 bits.

Everything else stays float32: token embeddings, norms, text adapter and projection. Activations are
float32 too. Each block of weights has its own scale and zero point.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .onnx_graphs import save_graph

BITS = {"int8": 8, "int4": 4}
BLOCK_SIZE = 16
_FLOAT32 = 1  # level of accuracy in which the operator computes; see its documentation
# Where torch's exporter notes the modules that a node comes from.
_SCOPES = "pkg.torch.onnx.name_scopes"
_LLM_SCOPE = "model.text_model."


def write_rounded_graph(source: Path, file: Path, *, bits: int) -> int:
    """Write a text graph whose language model has rounded weights.

    Args:
        source: The float32 graph.
        file: File to write.
        bits: 8 or 4.

    Returns:
        Number of layers that were rounded.

    Raises:
        ValueError: The graph has no linear layer of a language model.
    """
    import onnx
    import onnx_ir

    model = onnx.load(source)
    products = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    layers = [node.name for node in _iterate_linear_layers(model.graph)]
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


def _iterate_linear_layers(graph: Any) -> Iterator[Any]:
    """Yield the language model's products with a constant matrix."""
    constant = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constant:
            scopes = {entry.key: entry.value for entry in node.metadata_props}.get(_SCOPES, "")
            if _LLM_SCOPE in scopes:
                yield node
