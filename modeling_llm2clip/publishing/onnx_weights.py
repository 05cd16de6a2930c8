"""Rounds the language model's linear layers in an ONNX graph to 8 or 4 bits.

Everything else stays float32: token embeddings, norms, text adapter and projection. Activations are
float32 too, and each block of weights has its own scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .onnx_graphs import save_graph

BITS = {"int8": 8, "int4": 4}
BLOCK_SIZE = 32
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
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    model = onnx.load(source)
    names = [node.name for node in _iterate_linear_layers(model.graph)]
    if not names:
        raise ValueError(f"{source} has no linear layers of a language model to round.")
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK_SIZE, is_symmetric=True, bits=bits)
    quantizer = MatMulNBitsQuantizer(model, nodes_to_include=names, algo_config=config)
    quantizer.process()
    save_graph(onnx_ir.from_proto(quantizer.model.model), file)
    return len(names)


def _iterate_linear_layers(graph: Any) -> Iterator[Any]:
    """Yield the language model's products with a constant matrix."""
    constant = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constant:
            scopes = {entry.key: entry.value for entry in node.metadata_props}.get(_SCOPES, "")
            if _LLM_SCOPE in scopes:
                yield node
