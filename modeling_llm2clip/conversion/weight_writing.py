"""Writes weights into files of limited size, of which memory holds one at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .lazy_tensors import LazyTensor
from .text_adapter_plan import TEMPERATURE

# Room for configuration, tokenizer and card beside the weights.
_OTHER_FILES_BYTES = 64 << 20


def count_bytes(name: str, tensor: LazyTensor, dtype: torch.dtype) -> int:
    """Size of a weight as it is written."""
    return prod(tensor.shape) * (torch.float32 if name == TEMPERATURE else dtype).itemsize


def require_space(weights: Mapping[str, LazyTensor], dtype: torch.dtype, folder: Path) -> None:
    """Raise OSError when the disk has no room for the weights."""
    needed = sum(count_bytes(n, t, dtype) for n, t in weights.items()) + _OTHER_FILES_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 1e9:.2f} GB free, the model takes {needed / 1e9:.2f} GB. Free "
            "space, choose another disk, or a dtype of half the size (bfloat16)."
        )


def write_weights(
    weights: Mapping[str, LazyTensor], folder: Path, *, dtype: torch.dtype, shard_bytes: int
) -> None:
    """Write `model.safetensors`, or numbered shards and their index.

    Args:
        weights: read one shard at a time, and cast; the temperature stays float32.
        shard_bytes: most bytes of a shard, unless one weight alone has more.
    Raises: OSError when a file cannot be written.
    """
    shards = _plan_shards(weights, dtype, shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for file, keys in zip(names, shards, strict=True):
        _write_shard({key: weights[key] for key in keys}, folder / file, dtype)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(count_bytes(n, t, dtype) for n, t in weights.items())},
            "weight_map": {k: file for file, keys in zip(names, shards, strict=True) for k in keys},
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _plan_shards(
    weights: Mapping[str, LazyTensor], dtype: torch.dtype, shard_bytes: int
) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in weights.items():
        size = count_bytes(name, tensor, dtype)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_shard(weights: Mapping[str, LazyTensor], path: Path, dtype: torch.dtype) -> None:
    # Cloned: thirds of one matrix, and pieces of one mapped file, have their storage in common.
    tensors = {
        name: tensor.read()
        .to(torch.float32 if name == TEMPERATURE else dtype)
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{path.name} could not be written ({error}). Nothing is left behind; free space or "
            "choose another disk, and convert again."
        ) from error
    path.chmod(0o644)  # safetensors writes for its owner alone
