"""Find each group's nearest groups by cosine, as hard negatives that a model still confuses.

The search is exact for up to `EXACT_UP_TO` groups, or if all embeddings fit on the GPU. Otherwise
FAISS clusters the groups and compares each group only with the groups in the nearest clusters.
Recall is measured against an exact search for a sample of groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor
from torch.nn import functional as F

from ..._extras import ANN, require
from ...data.key_arrays import Array
from ...encoding.devices import has_room
from ...encoding.precision import float32_as_such

EXACT_UP_TO = 20_000
_ROWS_PER_TILE = 1024
_ROWS_AT_ONCE = 2**15
_SAMPLE = 1000
_GROUPS_AT_ONCE = 4096  # per process
_POINTS_PER_CLUSTER = 32  # more do not improve the clusters of a million embeddings
_SHARE_SEARCHED = 1 / 16  # share of clusters searched


def find_nearest_groups(
    embeddings: Array,
    top_k: int,
    *,
    device: torch.device | str = "cpu",
    is_resident: bool | None = None,
) -> tuple[Array, dict[str, Any]]:
    """Find each row's nearest other rows, nearest first, and report the method.

    Returns row numbers, (N, top_k), and the report. The embeddings may be memory-mapped.
    `is_resident` moves the embeddings to the device for an exact search; None does so if the device
    is a GPU that has room for the embeddings.
    """
    rows, device = np.arange(len(embeddings)), torch.device(device)
    if is_resident is None:
        is_resident = device.type == "cuda" and has_room(device, embeddings.nbytes)
    report: dict[str, Any] = {"method": "exact"}
    if is_resident or len(embeddings) <= EXACT_UP_TO:
        held = _hold(embeddings, device) if is_resident else embeddings
        blocks = _search_exactly(held, rows, top_k, device)
    else:
        require_search(len(embeddings))
        index, report = _build_index(embeddings, top_k, device)
        blocks = _search_index(index, embeddings, rows, top_k)
    with float32_as_such():
        return np.concatenate([block.astype(np.int32) for block in blocks]), report


def require_search(num_groups: int) -> None:
    """Require FAISS if there are too many groups for an exact search."""
    if num_groups > EXACT_UP_TO:
        require(ANN)


def _hold(embeddings: Array, device: torch.device) -> Tensor:
    """Copy embeddings to a device in their own dtype, block by block."""
    dtype = torch.from_numpy(np.array(embeddings[:1])).dtype
    held = torch.empty(embeddings.shape, dtype=dtype, device=device)
    for start in range(0, len(embeddings), _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        held[block] = torch.from_numpy(np.array(embeddings[block]))
    return held


def _search_exactly(
    embeddings: Array | Tensor, rows: Array, top_k: int, device: torch.device | str
) -> Iterator[Array]:
    """Yield the rows nearest to the given rows in blocks of (M, top_k), in bounded memory."""
    for start in range(0, len(rows), _ROWS_PER_TILE):
        tile = rows[start : start + _ROWS_PER_TILE]
        query_rows = torch.from_numpy(tile).to(device)
        queries = _take_units(embeddings, tile, device)
        scores = torch.empty(len(tile), 0, device=device)
        nearest = torch.empty(len(tile), 0, dtype=torch.int64, device=device)
        for first in range(0, len(embeddings), _ROWS_AT_ONCE):
            last = min(first + _ROWS_AT_ONCE, len(embeddings))
            others = torch.arange(first, last, device=device)
            cosines = queries @ _take_units(embeddings, slice(first, last), device).T
            cosines[query_rows[:, None] == others] = -torch.inf
            scores = torch.cat([scores, cosines], dim=1)
            nearest = torch.cat([nearest, others.expand(len(tile), -1)], dim=1)
            scores, places = scores.topk(min(top_k, scores.shape[1]), dim=1)
            nearest = nearest.gather(1, places)
        yield nearest.cpu().numpy()


def _take_units(
    embeddings: Array | Tensor, rows: Array | slice, device: torch.device | str
) -> Tensor:
    if isinstance(embeddings, Tensor):
        return F.normalize(embeddings[rows].float(), dim=-1)
    # A copy, because PyTorch warns about a read-only array.
    return F.normalize(torch.from_numpy(np.array(embeddings[rows], np.float32)).to(device), dim=-1)


def _build_index(
    embeddings: Array, top_k: int, device: torch.device | str
) -> tuple[Any, dict[str, Any]]:
    """Build a FAISS inverted file index, and measure its recall.

    The index takes one byte per dimension of each embedding.
    """
    import faiss

    number, dim = embeddings.shape
    num_clusters = int(4 * math.sqrt(number))
    index: Any = faiss.index_factory(dim, f"IVF{num_clusters},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.nprobe = math.ceil(_SHARE_SEARCHED * num_clusters)
    points, sample = (
        np.sort(np.random.default_rng(0).choice(number, min(number, size), replace=False))
        for size in (_POINTS_PER_CLUSTER * num_clusters, _SAMPLE)
    )
    index.train(_take_units(embeddings, points, "cpu").numpy())
    for start in range(0, number, _ROWS_AT_ONCE):
        index.add(_take_units(embeddings, slice(start, start + _ROWS_AT_ONCE), "cpu").numpy())
    nearest = np.concatenate([*_search_exactly(embeddings, sample, top_k, device)])
    ranked = np.concatenate([*_search_index(index, embeddings, sample, top_k)])
    return index, {
        "method": "faiss IVF,SQ8",
        "clusters": num_clusters,
        "clusters_searched": index.nprobe,
        "recall": float((ranked[:, :, None] == nearest[:, None]).any(2).mean()),
        "recall_sample": len(sample),
    }


def _search_index(index: Any, embeddings: Array, rows: Array, top_k: int) -> Iterator[Array]:
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        tile = rows[start : start + _ROWS_AT_ONCE]
        near = index.search(_take_units(embeddings, tile, "cpu").numpy(), top_k + 1)[1]
        # A row finds itself first, or not at all if many rows are equal to it.
        is_other = near != tile[:, None]
        is_other[is_other.all(axis=1), -1] = False
        near = near[is_other].reshape(len(tile), top_k)
        # Clusters with too few groups leave gaps (-1), filled here with the following rows.
        following = (tile[:, None] + 1 + np.arange(top_k)) % len(embeddings)
        yield np.where(near < 0, following, near)


def encode_groups(encode: Callable[[list[str]], Tensor], groups: Sequence[list[str]]) -> Tensor:
    """Compute one embedding per group: the mean of its captions' unit embeddings."""
    units = F.normalize(encode([text for captions in groups for text in captions]).float(), dim=-1)
    return torch.stack([part.mean(0) for part in units.split([len(g) for g in groups])])


def encode_groups_together(
    encode: Callable[[list[str]], Tensor], groups: Iterable[list[str]]
) -> Iterator[Tensor]:
    """Compute `encode_groups` on all processes in equal shares, a few thousand groups at a time."""
    state, remaining = PartialState(), iter(groups)
    while some := list(islice(remaining, _GROUPS_AT_ONCE * state.num_processes)):
        # If there are fewer groups than processes, some processes encode the last one needlessly.
        share = some[state.process_index :: state.num_processes] or some[-1:]
        encoded = encode_groups(encode, share).to(state.device)
        longest = -(-len(some) // state.num_processes)
        gathered: Tensor = gather(F.pad(encoded, (0, 0, 0, longest - len(encoded))))
        in_turn = gathered.unflatten(0, (state.num_processes, longest)).transpose(0, 1)
        yield in_turn.flatten(0, 1)[: len(some)]


def write_nearest_groups(
    encode: Callable[[list[str]], Tensor],
    groups: Iterable[list[str]],
    num_groups: int,
    top_k: int,
    file: Path,
) -> dict[str, Any]:
    """Encode all groups; write each group's nearest groups to a file that resumed runs read.

    All processes encode; the main process compares and writes. Embeddings go to a temporary file
    next to the target, in float16 if there are more than `EXACT_UP_TO` groups.
    """
    state = PartialState()
    dtype = np.float32 if num_groups <= EXACT_UP_TO else np.float16
    with TemporaryFile(dir=file.parent) as scratch:
        for encoded in encode_groups_together(encode, groups):
            if state.is_main_process:  # at unit length, they fit the range of float16
                F.normalize(encoded, dim=-1).cpu().numpy().astype(dtype).tofile(scratch)
        if not state.is_main_process:
            return {}
        scratch.flush()
        embeddings = np.memmap(scratch, dtype, "r").reshape(num_groups, -1)
        nearest, report = find_nearest_groups(embeddings, top_k, device=state.device)
    np.save(file, nearest)
    return report
