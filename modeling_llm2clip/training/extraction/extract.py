"""Stage 2: captions or images into an embedding store, shard by shard, by any number of processes.

Under `accelerate launch` or `torchrun` every process takes shards in turn, and then those that
others have not begun. A separate run on the same store helps in the same way. No process waits for
another but for the last shards.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal

from accelerate import PartialState
from tqdm import tqdm

from ...configs.extract_config import ExtractConfig
from ...data.embedding_store import EmbeddingStore, read_manifest
from ...data.embedding_store_writer import EmbeddingStoreWriter
from ...data.records import CaptionedImage
from ..distributed import choose_device
from ..graceful_stop import StopRequest, stop_on_signals
from ..stage_source import Source, open_source
from .caption_extraction import plan_captions
from .extraction_plan import ComputeRows
from .image_extraction import plan_images

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_COUNTS = 10.0  # a count reads the record of every shard


def extract(
    source: Source,
    data: Sequence[CaptionedImage],
    output: str | Path,
    config: ExtractConfig | None = None,
    *,
    modality: Literal["text", "image"],
) -> Path:
    """Compute the embeddings of all captions or images into a store, or continue one.

    The embeddings are for `align`: taken before text adapter and projections. Only the tower that
    is needed is loaded.

    Args:
        source: Folder or Hub id of an LLM2CLIP model, or a loaded (model, processor).
        data: Records; item i of the store is record i.
        output: Folder of the store: new, empty, or of the same store, which is continued.
        config: Options; None for the defaults. `token_budget` is for captions alone, `batch_size`
            and `num_workers` for images alone.
        modality: What is extracted: text or image.

    Returns:
        `output`.

    Raises:
        ValueError: No captions or images, or broken ones; or `output` is a store of another model,
            prompt, dataset or option, with both values.
        OSError: The disk is full; complete shards stay.
        RuntimeError: Another program deleted shards.
        StageInterrupt: SIGINT or SIGTERM stopped the extraction after a shard.

    Examples:
        >>> records = load_records("my-images")
        >>> store = extract("my-model", records, "images", modality="image")
    """
    if modality not in ("text", "image"):
        raise ValueError(f"modality={modality!r} must be text or image.")
    config, output = config or ExtractConfig(), Path(output)
    device = choose_device(config.device)
    with stop_on_signals() as stop, open_source(source, output) as found:
        make_plan = plan_captions if modality == "text" else plan_images
        plan = make_plan(found.folder, data, config, device)
        writer = EmbeddingStoreWriter.open(output, plan.manifest, plan.index)
        progress = StoreProgress(
            writer,
            name=f"extract {modality}",
            unit=plan.unit,
            sizes=plan.sizes,
            shown=config.show_progress,
        )
        if not write_missing_shards(writer, plan.compute, stop=stop, progress=progress):
            stop.raise_interrupt(
                f"Stopped after a shard; the store is in {output}.",
                resume=False,
                is_main_process=PartialState().is_main_process,
            )
            raise RuntimeError(f"{output} lost shards at its end. Run the same command again.")
    return output


def describe_extraction(store: Path) -> list[str]:
    """Describe a complete store in lines for a terminal.

    Args:
        store: Folder of the store.
    """
    manifest = read_manifest(store)
    counts = ", ".join(f"{number} {name}" for name, number in manifest.counts.items())
    return [
        f"Wrote {store}: {manifest.num_rows} embeddings of {manifest.dim} for "
        f"{manifest.num_items} records ({counts})."
    ]


class StoreProgress:
    """A bar over a whole store, whoever computes it; the rate is that of this run.

    Args:
        writer: Of the store.
        name: In front of the bar.
        unit: What is counted.
        sizes: Units of each row, where rows differ in cost; None for one each.
        shown: Whether there is a bar, in one process of each machine.
    """

    def __init__(
        self,
        writer: EmbeddingStoreWriter,
        *,
        name: str = "",
        unit: str = " rows",
        sizes: Sequence[int] | None = None,
        shown: bool = False,
    ) -> None:
        self._writer = writer
        self._ends = None if sizes is None else [0, *accumulate(sizes)]
        self._total = self._measure(range(writer.manifest.num_rows))
        self._bar = tqdm(
            desc=name or None,
            total=self._total,
            initial=self._count_done(writer.list_missing()),
            unit=unit,
            unit_scale=sizes is not None,
            disable=not (shown and PartialState().is_local_main_process),
        )
        self._counted = time.monotonic()

    def add(self, amount: int) -> None:
        """Count what this process has computed.

        Args:
            amount: Units of a batch.
        """
        self._bar.update(amount)

    def recount(self, missing: Sequence[int] | None = None) -> None:
        """Count what other processes have done.

        Args:
            missing: Shards that are missing now; None to look, at most every ten seconds.
        """
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
    stop: StopRequest,
    progress: StoreProgress,
) -> bool:
    """Compute every shard that is missing, then complete the manifest.

    Args:
        writer: Of the store.
        compute: Computes rows; the same embeddings whatever was computed before.
        stop: Checked between shards.
        progress: Counts every batch, in its unit.

    Returns:
        Whether the store is complete; False if a signal came first.

    Raises:
        OSError: The disk is full; complete shards stay.
        ValueError: The store was complete and is damaged now.
    """
    missing = writer.list_missing()
    while missing and not stop.signal:
        num_computed = _work_through(writer, compute, missing, stop, progress)
        missing = writer.list_missing()
        progress.recount(missing)
        if missing and not num_computed:  # other processes are computing all of them
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    progress.close()
    complete = not missing and writer.finish()
    if complete:
        EmbeddingStore.open(writer.folder)  # a store of an earlier run may have lost files since
    return complete


def _work_through(
    writer: EmbeddingStoreWriter,
    compute: ComputeRows,
    shards: Sequence[int],
    stop: StopRequest,
    progress: StoreProgress,
) -> int:
    """Compute those shards that no other process claims; returns how many rows that were."""
    num_computed = 0
    for shard in _in_turn(shards):
        if stop.signal:
            break
        with writer.claim(shard) as is_ours:
            if is_ours:
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
