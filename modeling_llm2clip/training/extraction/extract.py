"""The work of an extraction, captions or images: shard after shard, by any number of processes.

Under `accelerate launch` or `torchrun` every process takes shards in turn, and then those that
others have not begun. A run on its own that meets one that already works on the same store helps
it in the same way. No process waits for another but to see the last shards done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from ...data.embedding_store import STORED_DTYPES, EmbeddingStore
from ...data.embedding_store_writer import EmbeddingStoreWriter, pack_index
from ...data.records import CaptionedImage
from ...encoding.devices import find_device
from ..distributed import join_processes
from ..graceful_stop import StopRequest

# Rows to compute, and whom to tell of each batch how much it was; returns their embeddings (rows,
# D).
ComputeRows = Callable[[range, Callable[[int], object]], torch.Tensor]
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_COUNTS = 10.0  # which look at every shard


@dataclass(frozen=True)
class ExtractionArguments:
    """How to extract; none of it but `device`, `num_workers`, `show_progress` may change midway.

    Attributes:
        dtype: of the stored embeddings: `"float16"`, `"bfloat16"` or `"float32"`. Embeddings that
            float16 cannot hold are refused, never clipped.
        rows_per_shard: what is computed again after a kill is at most this.
        token_budget: most tokens of a batch of captions, padding included; default by device.
        batch_size: images of a batch; default by device.
        num_workers: threads that decode images.
        device: see `find_device`.
    """

    dtype: str = "float16"
    rows_per_shard: int = 2048
    token_budget: int | None = None
    batch_size: int | None = None
    num_workers: int = 1
    device: str = "auto"
    show_progress: bool = False

    def __post_init__(self) -> None:
        errors = []
        if self.dtype not in STORED_DTYPES:
            errors.append(f"dtype={self.dtype!r} must be one of {tuple(STORED_DTYPES)}")
        for name in ("rows_per_shard", "token_budget", "batch_size", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                errors.append(f"{name}={value} must be at least 1")
        if errors:
            raise ValueError("ExtractionArguments: " + "; ".join(errors) + ".")
        if self.device != "auto":
            find_device(self.device)


@dataclass(frozen=True)
class ExtractionReport:
    """What a run came to.

    Attributes:
        folder: the store.
        complete: False where a signal stopped the run first; the same call goes on.
        num_items, num_rows, dim: of the complete store.
        num_computed: rows that this process computed now.
        counts: of the whole data set, as in the manifest.
    """

    folder: Path
    complete: bool
    num_items: int
    num_rows: int
    dim: int
    num_computed: int
    counts: dict[str, int]


def choose_device(arguments: ExtractionArguments) -> torch.device:
    """Return the device asked for, of several processes this one's; joins it to the others."""
    device = find_device(arguments.device)
    join_processes(cpu=device.type == "cpu")
    return device


def pack_records(
    records: Sequence[CaptionedImage],
    *,
    short: Sequence[Sequence[int]],
    long: Sequence[Sequence[int]],
) -> bytes:
    """Content of the index: item i is record i, with its rows of either kind."""
    return pack_index(
        {
            "names": [r.name for r in records],
            "group_ids": [r.group_id for r in records],
            "langs": [r.lang for r in records],
        },
        {"short": short, "long": long},
    )


class StoreProgress:
    """A bar over a whole store, whoever computes it; what an earlier run computed is no speed.

    Args:
        unit: what is counted.
        sizes: how much of it each row is, where rows cost unlike much; one each unless given.
        shown: whether there is a bar, in one process of each machine.
    """

    def __init__(
        self,
        writer: EmbeddingStoreWriter,
        *,
        unit: str = " rows",
        sizes: Sequence[int] | None = None,
        shown: bool = False,
    ) -> None:
        self._writer = writer
        self._ends = None if sizes is None else [0, *accumulate(sizes)]
        self._total = self._measure(range(writer.manifest.num_rows))
        self._bar = tqdm(
            total=self._total,
            initial=self._count_done(writer.list_missing()),
            unit=unit,
            unit_scale=sizes is not None,
            disable=not (shown and PartialState().is_local_main_process),
        )
        self._counted = time.monotonic()

    def add(self, amount: int) -> None:
        """Note what this process has computed."""
        self._bar.update(amount)

    def recount(self, missing: Sequence[int] | None = None) -> None:
        """Take in what other processes have done; without `missing`, not more often than needed."""
        if missing is None:
            if time.monotonic() - self._counted < _SECONDS_BETWEEN_COUNTS:
                return
            missing = self._writer.list_missing()
        self._counted = time.monotonic()
        self._bar.n = self._count_done(missing)
        self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _count_done(self, missing: Sequence[int]) -> int:
        rows_of_shard = self._writer.manifest.rows_of_shard
        return self._total - sum(self._measure(rows_of_shard(shard)) for shard in missing)

    def _measure(self, rows: range) -> int:
        return len(rows) if self._ends is None else self._ends[rows.stop] - self._ends[rows.start]


def write_missing_shards(
    writer: EmbeddingStoreWriter,
    compute: ComputeRows,
    *,
    stop: StopRequest | None,
    progress: StoreProgress,
) -> ExtractionReport:
    """Compute every shard that is missing, then complete the manifest.

    Args:
        compute: gives the same embeddings for the same rows, whatever was computed before.
        stop: looked at between shards.
        progress: told of every batch, in its unit.
    Raises:
        OSError: the disk is full; whole shards stay.
        ValueError: the store was complete and is damaged now.
    """
    manifest = writer.manifest
    missing = writer.list_missing()
    num_computed = 0
    while missing and not (stop and stop.signal):
        num_now = _work_through(writer, compute, missing, stop, progress)
        num_computed += num_now
        missing = writer.list_missing()
        progress.recount(missing)
        if missing and not num_now:  # other processes are at work on all of them
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    progress.close()
    complete = not missing and writer.finish()
    if complete:
        EmbeddingStore.open(writer.folder)  # a store of an earlier run may have lost files since
    return ExtractionReport(
        folder=writer.folder,
        complete=complete,
        num_items=manifest.num_items,
        num_rows=manifest.num_rows,
        dim=manifest.dim,
        num_computed=num_computed,
        counts=manifest.counts,
    )


def _work_through(
    writer: EmbeddingStoreWriter,
    compute: ComputeRows,
    shards: Sequence[int],
    stop: StopRequest | None,
    progress: StoreProgress,
) -> int:
    """Compute those shards that nobody holds; returns how many rows that were."""
    num_computed = 0
    for shard in _in_turn(shards):
        if stop and stop.signal:
            break
        with writer.claim(shard) as ours:
            if ours:
                rows = writer.manifest.rows_of_shard(shard)
                writer.write_shard(shard, compute(rows, progress.add))
                num_computed += len(rows)
        progress.recount()
    return num_computed


def _in_turn(shards: Sequence[int]) -> list[int]:
    """Own shards from the first on, then the others' from the last, which they reach last."""
    state = PartialState()
    own = [s for s in shards if s % state.num_processes == state.process_index]
    return own + sorted(set(shards) - set(own), reverse=True)
