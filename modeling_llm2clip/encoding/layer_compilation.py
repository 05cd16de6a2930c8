"""Compiles the layers of towers, which fuses many small kernels into a few."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..vision_llm2clip import list_towers

_MAX_GRAPHS = 64  # for modes, precisions, towers and absent masks, not for lengths


def compile_layers(model: nn.Module, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the layers of a model's towers in place, for inputs of any length.

    Identical layers share compiled code, so the first batch waits a few seconds for one layer to
    compile, not for all layers of the tower.

    Args:
        model: A whole, text-only or vision-only model; a tower that is absent is skipped. LoRAs
            must be added before.
        backend: As in `torch.compile`.

    Raises:
        ValueError: A tower has no list of layers with a known name.
    """
    from torch._dynamo import config  # slow to import

    # Layers of all towers in transformers share one forward, so torch counts their graphs together.
    config.cache_size_limit = max(config.cache_size_limit, _MAX_GRAPHS)
    towers = [getattr(model, name, None) for name in ("text_model", "vision_model")]
    # The placeholder of a tower that does not run is empty.
    running = [tower for tower in towers if tower is not None and [*tower.children()]]
    lists = [find_layers(each)[1] for tower in running for each in list_towers(tower)]
    lock: Callable[[], AbstractContextManager[Any]]
    lock = getattr(model, "text_forward_lock", nullcontext)
    # The lock keeps passes of other threads from running while only some layers are compiled.
    # Replacing the forward, not the module, keeps the names of weights and the module's hooks.
    with lock():
        for layer in (layer for layers in lists for layer in layers.children()):
            layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def find_layers(tower: nn.Module) -> tuple[str, nn.Module]:
    """Find a tower's list of layers, and the name of that list in the tower."""
    # Several lists may have such a name, for example the stages and the layers in each of them.
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
            "stages, so its layers cannot be handled one by one. Set layer_decay to 1, and do "
            "not compile the tower."
        )
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
