"""Makes a CPU take the ways of a GPU through this version of the package and earlier ones."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PACKAGE = "modeling_llm2clip"
# Functions that tell whether a device runs ahead of Python, by the modules that call them.
_ASKED = (
    ("training.finite_steps", "runs_ahead"),
    ("training.trainer_mixins", "runs_ahead"),
    ("training.alignment.alignment_trainer", "runs_ahead"),
    ("training.alignment.sampling", "runs_ahead"),
    ("training.alignment.inheritance", "runs_ahead"),
    ("training.finetuning.finetune_trainer", "runs_ahead"),
    ("encoding.encode", "runs_ahead"),
    ("encoding.encode", "computes_beside"),  # its earlier name
)


@contextmanager
def gpu_branches() -> Iterator[None]:
    """Take the ways of a GPU while the context runs, with packs where the version has them."""
    with ExitStack() as stack:
        for module, name in _ASKED:
            stack.enter_context(_replaced_in(module, name, lambda *_, **__: True))
        model = f"{_PACKAGE}.modeling_llm2clip"
        mixin = importlib.import_module(model)._TextMixin
        if hasattr(mixin, "varlen_kernel"):
            from modeling_llm2clip.attention_llm2clip import VarlenKernel

            kernel = VarlenKernel(_attend, 256, (torch.float32, torch.bfloat16))
            stack.enter_context(replaced(mixin, "varlen_kernel", kernel))
            stack.enter_context(
                replaced(mixin, "_encode_texts", _look_at_once(mixin._encode_texts))
            )
        else:
            stack.enter_context(_replaced_in("modeling_llm2clip", "splits_batches", _refuse))
        tally = importlib.import_module(f"{_PACKAGE}.model_folders.training_images").ImageTally
        if hasattr(tally, "add_on_device"):
            stack.enter_context(replaced(tally, "add", tally.add_on_device))
        yield


def _look_at_once(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Copy ids and mask that are on the device to the host first, as on a GPU."""

    def encode_texts(model: Any, ids: Tensor, mask: Tensor | None, *args: Any, **named: Any) -> Any:
        return encode(model, ids.cpu(), None if mask is None else mask.cpu(), *args, **named)

    return encode_texts


def _refuse(*_: Any, **__: Any) -> bool:
    return False


@contextmanager
def _replaced_in(module: str, name: str, value: Any) -> Iterator[None]:
    """Replace a name of a module; versions that lack it have no such way."""
    try:
        owner = importlib.import_module(f"{_PACKAGE}.{module}")
    except ModuleNotFoundError:
        yield
        return
    if hasattr(owner, name):
        with replaced(owner, name, value):
            yield
    else:
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute while the context runs."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    *_: Any,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    **__: Any,
) -> Tensor:
    """Attend as torch's `varlen_attn`, (T, heads, d), which a CPU lacks; none of it is counted."""
    with torch._C.DisableTorchFunction():
        parts = []
        bounds = cu_seq_q.tolist()
        for start, stop in itertools.pairwise(bounds):
            text = (side[start:stop].transpose(0, 1)[None] for side in (query, key, value))
            mixed = F.scaled_dot_product_attention(
                *text, scale=scale, is_causal=window_size[1] == 0, enable_gqa=True
            )
            parts.append(mixed[0].transpose(0, 1))
        return torch.cat(parts)
