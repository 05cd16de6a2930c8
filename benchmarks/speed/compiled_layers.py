"""Compiles the layers of an LLM for encoding, which `encoding_speed.py` measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from modeling_llm2clip.encoding.layer_compilation import find_layers
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel

_Forward: TypeAlias = Callable[..., Any]


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
            for layer, forward in before:
                _restore_forward(layer, forward)


def _restore_forward(layer: nn.Module, forward: _Forward | None) -> None:
    if forward is None:
        layer.__dict__.pop("forward", None)  # the class's own is visible again
    else:
        layer.forward = forward
