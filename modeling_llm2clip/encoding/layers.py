"""Finds the layers of a tower, and runs them in other surroundings for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel

Forward = Callable[..., Any]
_LAYER_LISTS = ("blocks", "layer", "layers", "stages")


def find_layers(tower: nn.Module) -> tuple[str, nn.Module]:
    """Find the list of a tower's layers: its name, and the list.

    Raises: ValueError where there is none.
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
            "its layers cannot be treated one by one. Set layer_decay to 1, and encode in the "
            "model's own precision, uncompiled."
        )
    return max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def list_text_layers(model: LLM2CLIPModel | LLM2CLIPTextModel) -> list[nn.Module]:
    """List the layers of the LLM, the lowest first; errors as `find_layers`."""
    return list(find_layers(model.text_model)[1].children())


@contextmanager
def wrapped_forwards(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    layers: Iterable[nn.Module],
    wrap: Callable[[Forward], Forward],
) -> Iterator[None]:
    """Replace the forward of each of the LLM's layers, and put it back at the end.

    Wrapping the forward, not hooking the module, keeps the surroundings out of what is compiled.
    No pass of another thread meets some layers wrapped and others not.
    """
    with model.text_forward_lock():
        before = [(layer, layer.__dict__.get("forward")) for layer in layers]
        for layer, _ in before:
            layer.forward = wrap(layer.forward)
    try:
        yield
    finally:
        with model.text_forward_lock():
            for layer, own in before:
                _put_back(layer, own)


def _put_back(layer: nn.Module, own: Forward | None) -> None:
    if own is None:
        layer.__dict__.pop("forward", None)  # the class's own shows again
    else:
        layer.forward = own
