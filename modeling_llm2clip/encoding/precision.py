"""Runs an LLM's later layers in a lower precision, its early ones in their own.

A few early layers decide which token takes the massive activations that later layers rest on
(Sun et al., 2024, arXiv 2402.17762). A small error there can hand them to another token, and the
caption's embedding is another one. After that decision the same error is only noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from .layers import Forward, list_text_layers, wrapped_forwards


@dataclass(frozen=True)
class LowerPrecision:
    """Autocast of an LLM's layers, from one of them on.

    Attributes:
        dtype: what products are computed in; the residual stream stays what it is.
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


class LoweredLayers:
    """The later layers of an LLM in a lower precision: prepared once, in effect for some passes.

    For encoding only. It rounds the weights as they are now, knows no gradients, and while it is in
    effect the model must not be saved. Not with FSDP's first version, which stores what it is lent.

    Raises: ValueError when the LLM has no such layer.
    """

    def __init__(self, model: LLM2CLIPModel | LLM2CLIPTextModel, precision: LowerPrecision) -> None:
        """Round the layers' weights; of float32 ones this takes half as much memory once more."""
        if not isinstance(precision, LowerPrecision):
            raise ValueError(f"precision={precision!r}; give LowerPrecision(torch.bfloat16).")
        self._model, self._precision = model, precision
        self._layers = _choose_layers(model, precision)
        with model.text_forward_lock():  # another thread may have swapped them
            self._rounded = _round_weights(self._layers, precision.dtype)

    @contextmanager
    def in_effect(self) -> Iterator[None]:
        """Compute in the lower precision inside; passes of other threads wait for the end."""
        with (
            self._model.text_forward_lock(),
            wrapped_forwards(self._model, self._layers, self._autocast),
            _swapped_weights(self._rounded),
        ):
            yield

    def _autocast(self, forward: Forward) -> Forward:
        autocast = torch.autocast(self._model.device.type, dtype=self._precision.dtype)
        return autocast(forward)  # type: ignore[no-any-return]


def _choose_layers(
    model: LLM2CLIPModel | LLM2CLIPTextModel, precision: LowerPrecision
) -> list[nn.Module]:
    layers = list_text_layers(model)
    if precision.first_layer >= len(layers):
        raise ValueError(
            f"first_layer={precision.first_layer}, and the LLM has {len(layers)} layers, counted "
            "from 0. Pass precision=None to keep all of them as they are."
        )
    return layers[precision.first_layer :]


def _round_weights(
    layers: list[nn.Module], dtype: torch.dtype
) -> list[tuple[nn.Linear, nn.Parameter]]:
    """Round what autocast would round anew in every pass.

    Weights that are quantized, sharded or kept elsewhere until they are needed stay as they are.
    """
    return [
        (module, nn.Parameter(module.weight.detach().to(dtype), requires_grad=False))
        for layer in layers
        for module in layer.modules()
        if type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.shape == (module.out_features, module.in_features)
        and not module.weight.is_meta
        and module.weight.dtype != dtype
    ]


@contextmanager
def _swapped_weights(rounded: list[tuple[nn.Linear, nn.Parameter]]) -> Iterator[None]:
    own = [module.weight for module, _ in rounded]
    try:
        for module, weight in rounded:
            module.weight = weight
        yield
    finally:
        for (module, _), before in zip(rounded, own, strict=True):
            module.weight = before
