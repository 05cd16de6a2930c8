"""Rounds the language model's linear layers in an ONNX graph to 8 or 4 bits.

Everything else stays float32: token embeddings, norms, text adapter and projection. Activations are
float32 too, and each block of 32 weights has its own scale.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .onnx_graphs import save_graph

BITS = {"int8": 8, "int4": 4}
BLOCK_SIZE = 32
# Module path of the language model inside the exported graph's nodes.
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
    raise NotImplementedError
