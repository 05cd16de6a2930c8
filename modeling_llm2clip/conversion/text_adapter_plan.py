"""The text adapter and the temperature, which are named alike in every official layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..heads_llm2clip import MAX_LOG_SCALE
from .key_mapping import Rule, rename
from .lazy_tensors import LazyTensor

TEMPERATURE = "logit_scale.log_scale"
# Training clamps to ln 100; a checkpoint in half precision holds it rounded up.
_LARGEST_LOG_SCALE = float(torch.tensor(MAX_LOG_SCALE, dtype=torch.float16)) + 1e-6
_FAMILIES_BY_WIDTH = {
    2048: "Llama-3.2-1B (official: LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned)",
    4096: "Llama-3-8B and Llama-3.1-8B (official: LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned, or "
    "the LoRA LLM2CLIP-Llama-3.1-8B on Llama-3.1-8B-Instruct)",
}


@dataclass(frozen=True)
class AdapterSizes:
    """Sizes of an adapter, read off its weights."""

    llm_width: int
    projection_dim: int
    num_layers: int
    expansion: int


def adapter_rules(prefix: str, tensors: Mapping[str, LazyTensor]) -> list[Rule]:
    """Rules for `Sequential(block, …, LayerNorm, Linear)` under a prefix.

    A block is `Sequential(Linear, GELU, Dropout, Linear)` as `fn`, and a LayerNorm as `ln`.
    """
    start, num_layers = re.escape(prefix), _count_blocks(prefix, tensors)
    part = r"(weight|bias)"
    return [
        rename(rf"{start}(\d+)\.fn\.0\.{part}", r"text_adapter.blocks.\1.up.\2"),
        rename(rf"{start}(\d+)\.fn\.3\.{part}", r"text_adapter.blocks.\1.down.\2"),
        rename(rf"{start}(\d+)\.ln\.{part}", r"text_adapter.blocks.\1.norm.\2"),
        rename(rf"{start}{num_layers}\.{part}", r"text_adapter.norm.\1"),
        rename(rf"{start}{num_layers + 1}\.{part}", r"text_projection.\1"),
        rename(r"logit_scale", TEMPERATURE, _reshape_temperature),
    ]


def read_sizes(prefix: str, tensors: Mapping[str, LazyTensor], *, source: str) -> AdapterSizes:
    """Read an adapter's sizes off its keys.

    Raises: ValueError when there is no adapter.
    """
    num_layers = _count_blocks(prefix, tensors)
    last = tensors.get(f"{prefix}{num_layers + 1}.weight")
    if last is None or not num_layers:
        raise ValueError(
            f"{source} has no text adapter under {prefix!r}: it is a bare vision tower, from which "
            "no LLM2CLIP model can be converted. Give the checkpoint that has it (the official "
            "EVA02 repositories keep it in their .pt file)."
        )
    inner, width = tensors[f"{prefix}0.fn.0.weight"].shape
    return AdapterSizes(width, last.shape[0], num_layers, inner // width)


def require_width(sizes: AdapterSizes, llm_width: int, *, source: str, llm: str) -> None:
    """Raise ValueError when an LLM's embeddings do not fit the adapter."""
    if sizes.llm_width == llm_width:
        return
    fitting = _FAMILIES_BY_WIDTH.get(sizes.llm_width, "the one it was trained with")
    raise ValueError(
        f"The adapter of {source} takes embeddings of {sizes.llm_width}, but {llm} gives "
        f"{llm_width}. "
        f"LLMs of {sizes.llm_width}: {fitting}. Give the LLM that the checkpoint was trained with."
    )


def require_temperature(log_scale: float, *, source: str) -> None:
    """Raise ValueError when the inverse temperature is not one that training leaves."""
    if not 0.0 <= log_scale <= _LARGEST_LOG_SCALE:
        raise ValueError(
            f"{source} has logit_scale {log_scale:.4g}, but training keeps it between 0 and ln 100 "
            f"= {MAX_LOG_SCALE:.4f}. The run diverged, or the file is not an LLM2CLIP checkpoint."
        )


def _count_blocks(prefix: str, tensors: Mapping[str, LazyTensor]) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.fn\.0\.weight")
    return sum(1 for key in tensors if pattern.fullmatch(key))


def _reshape_temperature(log_scale: Tensor) -> Tensor:
    return log_scale.reshape(1).float().clamp(max=MAX_LOG_SCALE)
