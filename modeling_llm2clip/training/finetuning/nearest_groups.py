"""The nearest groups of each group by cosine, for hard batches: groups that a model still confuses.

Few groups are compared with all. From `EXACT_UP_TO` groups on, an inverted file of FAISS
is searched instead: groups are sorted into clusters, and a group is compared with those of the
nearest clusters. How many clusters are searched is chosen by the recall on a sample of groups,
which is searched exactly, too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.nn import functional as F

from ..._extras import ANN, require
from ...data.key_arrays import Array

EXACT_UP_TO = 20_000
WANTED_RECALL = 0.95
_ROWS_PER_TILE = 1024
_ROWS_AT_ONCE = 2**15
_SAMPLE = 1000
_SEED = 0
_GROUPS_AT_ONCE = 4096  # of each process
# Of FAISS, measured with a million embeddings of 384 numbers: more make the clusters no better.
_POINTS_PER_CLUSTER = 32
_ITERATIONS = 5
_FIRST_SEARCHED = 4
_COMPARED_AGAIN = 4.0  # times as many as are wanted
_LEAST_DIM_OF_PARTS = 128
_SMALL_GAIN = 0.01


def find_nearest_groups(
    embeddings: Array, top_k: int, *, device: torch.device | str = "cpu", out: Array | None = None
) -> tuple[Array, dict[str, Any]]:
    """Find the nearest other rows of each row, nearest first, and report how they were found.

    They are (N, top_k) integers, in `out` if it is given. The embeddings may be mapped.
    """
    found = np.empty((len(embeddings), top_k), np.int32) if out is None else out
    report: dict[str, Any] = {"method": "exact"}
    if len(embeddings) <= EXACT_UP_TO:
        blocks = _search_exactly(embeddings, np.arange(len(embeddings)), top_k, device)
    else:
        require_search(len(embeddings))
        index = _ClusteredIndex(embeddings)
        report = index.choose_clusters(embeddings, top_k, device)
        blocks = index.search(embeddings, np.arange(len(embeddings)), top_k)
    start = 0
    for block in blocks:
        found[start : start + len(block)] = block
        start += len(block)
    return found, report


def require_search(num_groups: int) -> None:
    """Require FAISS where so many groups are not compared exactly."""
    if num_groups > EXACT_UP_TO:
        require(ANN)


def _search_exactly(
    embeddings: Array, rows: Array, top_k: int, device: torch.device | str
) -> Iterator[Array]:
    """Yield the nearest rows of some rows, (M, top_k) at a time, in bounded memory."""
    for start in range(0, len(rows), _ROWS_PER_TILE):
        tile = rows[start : start + _ROWS_PER_TILE]
        own = torch.from_numpy(tile).to(device)
        queries = _take_units(embeddings, tile, device)
        scores = torch.empty(len(tile), 0, device=device)
        found = torch.empty(len(tile), 0, dtype=torch.int64, device=device)
        for first in range(0, len(embeddings), _ROWS_AT_ONCE):
            last = min(first + _ROWS_AT_ONCE, len(embeddings))
            others = torch.arange(first, last, device=device)
            cosines = queries @ _take_units(embeddings, slice(first, last), device).T
            cosines[own[:, None] == others] = -torch.inf
            scores = torch.cat([scores, cosines], dim=1)
            found = torch.cat([found, others.expand(len(tile), -1)], dim=1)
            scores, places = scores.topk(min(top_k, scores.shape[1]), dim=1)
            found = found.gather(1, places)
        yield found.cpu().numpy()


def _take_units(embeddings: Array, rows: Array | slice, device: torch.device | str) -> Tensor:
    taken = torch.from_numpy(np.asarray(embeddings[rows], np.float32))
    return F.normalize(taken.to(device), dim=-1)


class _ClusteredIndex:
    """An inverted file of FAISS, in a byte and an eighth a number of all embeddings.

    Clusters are scanned by product quantization of 4 bits for 4 numbers; the best are compared
    again in 8 bits a number. Measured with 50,000 embeddings of 384 numbers on two threads, for the
    same recall: 9 seconds, 26 with 8 bits alone, 39 in float16 or float32.

    Args:
        embeddings: (N, D), N at least a few hundred.
    """

    def __init__(self, embeddings: Array) -> None:
        import faiss

        number, dim = embeddings.shape
        self.num_clusters = int(4 * math.sqrt(number))
        # Fast scans take an even number of parts; few parts tell too little apart.
        is_refined = dim >= _LEAST_DIM_OF_PARTS and dim % 8 == 0
        self.codes = f"PQ{dim // 4}x4fs" if is_refined else "SQ8"
        self.index: Any = faiss.index_factory(
            dim, f"IVF{self.num_clusters},{self.codes}", faiss.METRIC_INNER_PRODUCT
        )
        self.clusters = faiss.extract_index_ivf(self.index)
        self.clusters.cp.niter = _ITERATIONS
        self.clusters.cp.seed = _SEED
        self.clusters.cp.min_points_per_centroid = 1
        if is_refined:
            self._exact = faiss.IndexScalarQuantizer(
                dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
            )
            self._scan = self.index
            self.index = faiss.IndexRefine(self._scan, self._exact)
            self.index.k_factor = _COMPARED_AGAIN
        wanted = min(number, _POINTS_PER_CLUSTER * self.num_clusters)
        sample = np.random.default_rng(_SEED).choice(number, wanted, replace=False)
        with _all_threads():
            self.index.train(_take_units(embeddings, np.sort(sample), "cpu").numpy())
            for start in range(0, number, _ROWS_AT_ONCE):
                rows = slice(start, start + _ROWS_AT_ONCE)
                self.index.add(_take_units(embeddings, rows, "cpu").numpy())

    def choose_clusters(
        self, embeddings: Array, top_k: int, device: torch.device | str
    ) -> dict[str, Any]:
        """Search ever more clusters until the recall on a sample is as wanted."""
        number = len(embeddings)
        generator = np.random.default_rng(_SEED)
        sample = np.sort(generator.choice(number, min(number, _SAMPLE), replace=False))
        wanted = np.concatenate([*_search_exactly(embeddings, sample, top_k, device)])
        num_searched, recall = _FIRST_SEARCHED, 0.0
        while True:
            self.clusters.nprobe = min(num_searched, self.num_clusters)
            found = np.concatenate([*self.search(embeddings, sample, top_k)])
            before, recall = recall, float((found[:, :, None] == wanted[:, None]).any(2).mean())
            if recall >= WANTED_RECALL or num_searched >= self.num_clusters:
                break
            if recall - before < _SMALL_GAIN and self.codes != "SQ8":
                self.index.k_factor *= 4  # more clusters do not help
            num_searched *= 2
        return {
            "method": f"faiss IVF,{self.codes}",
            "clusters": self.num_clusters,
            "clusters_searched": self.clusters.nprobe,
            "recall": recall,
            "recall_sample": len(sample),
        }

    def search(self, embeddings: Array, rows: Array, top_k: int) -> Iterator[Array]:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            tile = rows[start : start + _ROWS_AT_ONCE]
            with _all_threads():
                queries = _take_units(embeddings, tile, "cpu").numpy()
                found = self.index.search(queries, top_k + 1)[1]
            # A row finds itself first, or not at all beside many equal ones.
            is_other = found != tile[:, None]
            is_other[is_other.all(axis=1), -1] = False
            yield _fill_gaps(found[is_other].reshape(len(tile), top_k), tile, len(embeddings))


def _fill_gaps(found: Array, rows: Array, number: int) -> Array:
    """Replace what clusters with too few groups leave open, -1, by rows that follow."""
    gaps = found < 0
    if gaps.any():
        following = (rows[:, None] + 1 + np.arange(found.shape[1])) % number
        found = np.where(gaps, following, found)
    return found


@contextmanager
def _all_threads() -> Iterator[None]:
    """Let FAISS use all processors, since the other processes of the run wait."""
    import faiss

    number = faiss.omp_get_max_threads()
    available = getattr(os, "sched_getaffinity", None)
    faiss.omp_set_num_threads(len(available(0)) if available else os.cpu_count() or 1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(number)


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
        # With fewer groups than processes, some encode the last one for nothing.
        own = some[state.process_index :: state.num_processes] or some[-1:]
        encoded = encode_groups(encode, own).to(state.device)
        if state.num_processes > 1:
            longest = -(-len(some) // state.num_processes)
            padded = torch.zeros(longest, encoded.shape[1], device=state.device)
            padded[: len(own)] = encoded
            shares = [torch.empty_like(padded) for _ in range(state.num_processes)]
            dist.all_gather(shares, padded)
            encoded = torch.stack(shares, dim=1).flatten(0, 1)[: len(some)]
        yield encoded


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
