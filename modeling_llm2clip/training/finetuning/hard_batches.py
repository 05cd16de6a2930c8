"""Groups whose captions a model still confuses share a batch: hard negatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.nn import functional as F

from .nearest_groups import EXACT_UP_TO, find_nearest_groups

Array: TypeAlias = np.ndarray[Any, Any]

_GROUPS_AT_ONCE = 4096  # of each process


def encode_groups(encode: Callable[[list[str]], Tensor], groups: Sequence[list[str]]) -> Tensor:
    """Compute one embedding per group: the mean of its captions' unit embeddings."""
    units = F.normalize(encode([text for captions in groups for text in captions]).float(), dim=-1)
    return torch.stack([part.mean(0) for part in units.split([len(g) for g in groups])])


def encode_groups_together(
    encode: Callable[[list[str]], Tensor], groups: Iterable[list[str]]
) -> Iterator[Tensor]:
    """Compute `encode_groups` by all processes, an equal share each, some thousand at a time."""
    state, remaining = PartialState(), iter(groups)
    while some := list(islice(remaining, _GROUPS_AT_ONCE * state.num_processes)):
        yield _encode_shares(encode, some, state)


def _encode_shares(
    encode: Callable[[list[str]], Tensor], groups: Sequence[list[str]], state: PartialState
) -> Tensor:
    """Encode some groups, every process those of its turn."""
    # With fewer groups than processes, some encode the last one for nothing.
    own = groups[state.process_index :: state.num_processes] or groups[-1:]
    encoded = encode_groups(encode, own).to(state.device)
    if state.num_processes == 1:
        return encoded
    longest = -(-len(groups) // state.num_processes)
    padded = torch.zeros(longest, encoded.shape[1], device=state.device)
    padded[: len(own)] = encoded
    shares = [torch.empty_like(padded) for _ in range(state.num_processes)]
    dist.all_gather(shares, padded)
    return torch.stack(shares, dim=1).flatten(0, 1)[: len(groups)]


def write_nearest_groups(
    encode: Callable[[list[str]], Tensor],
    groups: Iterable[list[str]],
    num_groups: int,
    top_k: int,
    file: Path,
) -> dict[str, Any]:
    """Encode all groups, and write the nearest ones of each, which a resumed run reads.

    All processes encode, the main one compares and writes. Embeddings are in a temporary file
    beside the target, in float16 if they are not compared exactly.
    """
    state = PartialState()
    scratch, unfinished = (file.with_name(f".{file.name}.{n}") for n in ("embeddings", "tmp"))
    embeddings: Array | None = None
    report: dict[str, Any] = {}
    start = 0
    try:
        for encoded in encode_groups_together(encode, groups):
            if not state.is_main_process:
                continue
            if embeddings is None:
                dtype = np.float32 if num_groups <= EXACT_UP_TO else np.float16
                shape = (num_groups, encoded.shape[1])
                embeddings = np.memmap(scratch, dtype, "w+", shape=shape)
            # Unit length, so that float16 holds them.
            embeddings[start : start + len(encoded)] = F.normalize(encoded, dim=-1).cpu().numpy()
            start += len(encoded)
        if embeddings is not None:
            out = np.lib.format.open_memmap(unfinished, "w+", np.int32, (num_groups, top_k))
            report = find_nearest_groups(embeddings, top_k, device=state.device, out=out)[1]
            out.flush()
            unfinished.replace(file)
    finally:
        if state.is_main_process:
            scratch.unlink(missing_ok=True)
            unfinished.unlink(missing_ok=True)
    return report


def read_nearest_groups(file: Path) -> Array:
    """Map the nearest groups of each group."""
    return np.load(file, mmap_mode="r")  # type: ignore[no-any-return]
