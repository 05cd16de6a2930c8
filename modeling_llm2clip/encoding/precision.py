"""Runs an LLM's later layers in a lower precision, its early ones in their own.

A few early layers decide which token takes the massive activations that later layers rest on
(Sun et al., 2024, arXiv 2402.17762). A small error there can hand them to another token, and the
caption's vector is another one. After that decision the same error is only noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from .layers import Forward, find_layers, wrapped_forwards


@dataclass(frozen=True)
class LowerPrecision:
    """Autocast of an LLM's layers, from one of them on.

    Attributes:
        dtype: what products are computed in; weights and the residual stream stay what they are.
        first_layer: the first layer that it concerns; 0 for the whole LLM.
    """

    dtype: torch.dtype
    first_layer: int = 0

    def __post_init__(self) -> None:
        """Refuse what autocast would ignore or count from the end."""
        if not self.dtype.is_floating_point or self.dtype.itemsize != 2:
            raise ValueError(f"dtype={self.dtype} is no lower precision: give bfloat16 or float16.")
        if self.first_layer < 0:
            raise ValueError(f"first_layer={self.first_layer} counts from 0, the lowest layer.")


@contextmanager
def lowered_precision(
    model: LLM2CLIPModel | LLM2CLIPTextModel, precision: LowerPrecision | None
) -> Iterator[None]:
    """Encode in a lower precision inside; None changes nothing.

    Raises: ValueError when the LLM has no such layer.
    """
    if precision is None:
        yield
        return
    layers = list(find_layers(model.text_model)[1].children())
    if precision.first_layer >= len(layers):
        raise ValueError(
            f"first_layer={precision.first_layer}, and the LLM has {len(layers)} layers, counted "
            "from 0. Pass precision=None to keep all of them as they are."
        )
    device_type, dtype = model.device.type, precision.dtype

    def autocast(forward: Forward) -> Forward:
        def run(*arguments: Any, **settings: Any) -> Any:
            with torch.autocast(device_type, dtype=dtype):
                return forward(*arguments, **settings)

        return run

    with wrapped_forwards(layers[precision.first_layer :], autocast):
        yield
