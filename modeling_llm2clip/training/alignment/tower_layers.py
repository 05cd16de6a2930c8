"""Finds the layers of a tower."""

from __future__ import annotations

from torch import nn

_LAYER_LISTS = ("blocks", "layer", "layers", "stages")


def find_layers(tower: nn.Module) -> tuple[str, nn.Module]:
    """Find the list of a tower's layers."""
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
            "its layers cannot be treated one by one. Set layer_decay to 1."
        )
    return max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
