"""Compiles the layers of towers, which turns many small kernels into few."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def compile_layers(model: nn.Module, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the layers of a model's towers in place, for inputs of any length.

    Equal layers share what is compiled, so the first batch waits some seconds for one layer, not
    for the depth of the tower.

    Args:
        model: A whole, text-only or vision-only model.
        backend: As in `torch.compile`.

    Raises:
        ValueError: A tower has no list of layers with a known name.
    """
    towers = [getattr(model, name, None) for name in ("text_model", "vision_model")]
    lists = [find_layers(tower)[1] for tower in towers if tower is not None]
    lock: Callable[[], AbstractContextManager[Any]]
    lock = getattr(model, "text_forward_lock", nullcontext)
    # The lock lets no pass of another thread meet some layers compiled and others not. Replacing
    # the forward, not the module, keeps names of weights and the hooks around it.
    with lock():
        for layer in (layer for layers in lists for layer in layers.children()):
            layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def find_layers(tower: nn.Module) -> tuple[str, nn.Module]:
    """Find a tower's list of layers, the lowest one first, and its name in the tower."""
    # Several lists may have a usual name, such as lists of stages.
    lists = [
        (name, module)
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and name.split(".")[-1] in ("blocks", "layer", "layers", "stages")
        and len(module) > 1
    ]
    if not lists:
        raise ValueError(
            f"{type(tower).__name__} has no list of layers named blocks, layer, layers or "
            "stages, so its layers cannot be treated one by one. Set layer_decay to 1, and do "
            "not compile it."
        )
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
