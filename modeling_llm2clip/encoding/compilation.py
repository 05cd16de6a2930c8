"""Finds the layers of a tower, and compiles those of an LLM for encoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel

_LAYER_LISTS = ("blocks", "layer", "layers", "stages")
_Forward: TypeAlias = Callable[..., Any]


def find_layers(tower: nn.Module) -> tuple[str, nn.Module]:
    """Find the list of a tower's layers.

    Args:
        tower: A vision tower or an LLM.

    Returns:
        The name of the list in the tower, and the list, whose children are the layers, the lowest
        first.

    Raises:
        ValueError: The tower has no list of layers with a known name.
    """
    found = [
        (name, module)
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and name.split(".")[-1] in _LAYER_LISTS
        and len(module) > 1
    ]
    if not found:
        raise ValueError(
            f"{type(tower).__name__} has no list of layers named {' or '.join(_LAYER_LISTS)}, so "
            "its layers cannot be treated one by one. Set layer_decay to 1, and encode uncompiled."
        )
    return max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


@contextmanager
def compiled_layers(
    model: LLM2CLIPModel | LLM2CLIPTextModel, *, backend: str | Callable[..., Any] = "inductor"
) -> Iterator[None]:
    """Run the layers of the LLM compiled inside, for texts of any length.

    Many small kernels become few. Equal layers share what is compiled, so the first batch waits
    some seconds for one layer, not for the depth of the LLM. It needs what `torch.compile` needs:
    on a CPU a C++ compiler, on a GPU Triton. Enter it once, around all threads that encode.

    Args:
        model: A model with a text tower.
        backend: As in `torch.compile`.

    Raises:
        ValueError: The LLM has no list of layers with a known name.
    """
    layers = list(find_layers(model.text_model)[1].children())
    # Wrapping the forward, not hooking the module, keeps the surroundings out of the graph. The
    # lock lets no pass of another thread meet some layers compiled and others not.
    with model.text_forward_lock():
        before = [(layer, layer.__dict__.get("forward")) for layer in layers]
        for layer, _ in before:
            layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)
    try:
        yield
    finally:
        with model.text_forward_lock():
            for layer, own in before:
                _restore_forward(layer, own)


def _restore_forward(layer: nn.Module, own: _Forward | None) -> None:
    if own is None:
        layer.__dict__.pop("forward", None)  # the class's own is visible again
    else:
        layer.forward = own
