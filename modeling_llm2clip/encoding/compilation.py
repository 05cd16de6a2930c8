"""Compiles the layers of an LLM for encoding: one kernel where there were many small ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from .layers import Forward, list_text_layers, wrapped_forwards


@contextmanager
def compiled_layers(
    model: LLM2CLIPModel | LLM2CLIPTextModel, *, backend: str = "inductor"
) -> Iterator[None]:
    """Run the LLM's layers compiled inside, for texts of any length.

    Equal layers share what is compiled, so the first batch waits some seconds for one layer, not
    for the depth of the LLM. A lower precision is another compilation. Needs what `torch.compile`
    needs: on a processor a C++ compiler, on a GPU Triton. Enter it once, around all threads that
    encode.
    """

    def compile_forward(forward: Forward) -> Forward:
        return torch.compile(forward, dynamic=True, backend=backend)

    with wrapped_forwards(model, list_text_layers(model), compile_forward):
        yield
