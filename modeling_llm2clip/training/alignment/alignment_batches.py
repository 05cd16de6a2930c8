"""The batches of a run as one process sees them: sampled from an index, or taken from a stream.

Both give an endless epoch to the Trainer. Sampled batches are functions of their number, so that a
resumed run skips those before without reading them. Those of a stream are wherever the stream is,
which is saved with every checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainingArguments

from ...configs.align_config import AlignConfig
from ...data.streams.record_streams import make_loader, read_report
from ...data.streams.stream_report import StreamReport
from ...encoding.preparation import default_num_workers
from .alignment_data import AlignmentDataset, keep_batch
from .alignment_stream import AlignmentStream, decode_sample
from .sampling import Array, ResumableBatchSampler


class SampledBatches:
    """Random batches of the items of a dataset.

    Args:
        dataset: The data.
        items: Its items that are trained on.
        config: Options of the alignment.
        batch_size: Of all processes together.
        num_steps: Of the run.
        arguments: Of the Trainer.
    """

    can_skip = True

    def __init__(
        self,
        dataset: AlignmentDataset,
        items: Array,
        *,
        config: AlignConfig,
        batch_size: int,
        num_steps: int,
        arguments: TrainingArguments,
    ) -> None:
        self.dataset = dataset
        self._arguments = arguments
        self._config = config
        self._sampler = ResumableBatchSampler(
            items,
            batch_size=batch_size,
            num_steps=num_steps,
            seed=config.seed,
            rank=arguments.process_index,
            num_processes=arguments.world_size,
        )

    def make_loader(self) -> Any:
        """Make the loader of this process's batches of the whole run."""
        workers = count_workers(
            self._config, self._arguments, decodes=self.dataset.image_store is None
        )
        return DataLoader(
            self.dataset,
            batch_sampler=self._sampler,  # type: ignore[arg-type]  # arrays, not lists
            collate_fn=keep_batch,
            num_workers=workers,
            pin_memory=self._arguments.device.type == "cuda",
            generator=torch.Generator().manual_seed(self._config.seed),
        )

    def epoch_at(self, step: int) -> float:
        """Return the passes over the data after a step."""
        return step / self._sampler.steps_per_epoch

    def save(self, folder: Path) -> None:
        """Save nothing."""

    def load(self, checkpoint: Path) -> None:
        """Load nothing: the Trainer skips the batches."""

    def collect_report(self) -> None:
        """Report nothing: records of an index are checked before the run."""


class StreamedBatches:
    """Batches of a stream, epoch after epoch.

    Args:
        dataset: The stream.
        config: Options of the alignment.
        batch_size: Of all processes together.
        arguments: Of the Trainer.
    """

    can_skip = False

    def __init__(
        self,
        dataset: AlignmentStream,
        *,
        config: AlignConfig,
        batch_size: int,
        arguments: TrainingArguments,
    ) -> None:
        self.dataset = dataset
        self._arguments = arguments
        self._loader = make_loader(
            dataset.stream,
            batch_size=batch_size // arguments.world_size,
            collate=dataset.collate,
            prepare=decode_sample,
            num_workers=count_workers(config, arguments, decodes=True),
            drop_last=True,
            pin_memory=arguments.device.type == "cuda",
        )
        self._epoch = 0
        self._is_resumed = False
        self._resumed_state: Any = None  # of the loader, until it has given a batch
        self._ended: list[StreamReport] = []  # of the epochs before

    def make_loader(self) -> Any:
        """Return an endless iterable of this process's batches."""
        return self

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.dataset.stream.set_epoch(self._epoch)
            num_batches = int(self._is_resumed)  # the epoch may have ended with the checkpoint
            self._is_resumed = False
            for batch in self._loader:
                self._resumed_state = None
                num_batches += 1
                yield batch
            self._end_epoch()
            if not num_batches:
                raise ValueError(
                    "The stream has fewer samples than a batch in each worker. Set a smaller "
                    "global_batch_size, or fewer num_workers."
                )

    def _end_epoch(self) -> None:
        """Keep the report of an epoch, and say what this process lost in it."""
        self._resumed_state = None  # there may have been nothing left behind the checkpoint
        report = self._read_current()
        self._ended.append(report)
        if report.has_losses:
            process = self._arguments.process_index
            of_process = f" of process {process}" if self._arguments.world_size > 1 else ""
            tqdm.write(
                f"epoch {self._epoch}{of_process}: {report.describe_losses()}", file=sys.stderr
            )
        self._epoch += 1

    def _read_current(self) -> StreamReport:
        """Read what this process read and lost in its current epoch."""
        state = self._resumed_state
        return read_report(self._loader.state_dict() if state is None else state)

    def epoch_at(self, step: int) -> float:  # noqa: ARG002
        """Return the whole passes over the data so far, since the length of one is not known."""
        return float(self._epoch)

    def save(self, folder: Path) -> None:
        """Save where the stream of this process is."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "epoch": self._epoch,
            "ended": [report.to_state() for report in self._ended],
            "loader": self._loader.state_dict(),
        }
        torch.save(state, folder / self._name_file())

    def load(self, checkpoint: Path) -> None:
        """Let the batches go on where a checkpoint was saved."""
        state = torch.load(checkpoint / self._name_file(), weights_only=True)
        self._epoch = state["epoch"]
        self._ended = [StreamReport.from_state(report) for report in state["ended"]]
        self._loader.load_state_dict(state["loader"])
        self._is_resumed = True
        self._resumed_state = state["loader"]

    def collect_report(self) -> dict[str, Any]:
        """Return what all processes read and lost in the whole run; all of them call it."""
        own = [report.to_state() for report in (*self._ended, self._read_current())]
        total, epochs = StreamReport(), []
        for states in zip_longest(*gather_object([own])):
            report = StreamReport()
            for state in states:
                if state is not None:  # of a process that is in an earlier epoch
                    report.merge(StreamReport.from_state(state))
            epochs.append(report.numbers)
            total.merge(report)
        # What is broken is so in every epoch.
        places = {kind: list(dict.fromkeys(where)) for kind, where in total.places.items()}
        return {**total.to_state(), "places": places, "epochs": epochs}

    def _name_file(self) -> str:
        return f"stream-{self._arguments.process_index}.pt"


Batches = SampledBatches | StreamedBatches


def count_workers(config: AlignConfig, arguments: TrainingArguments, *, decodes: bool) -> int:
    """Choose how many processes make the batches of this one."""
    if config.num_workers is not None:
        return config.num_workers
    # A CPU has no time to spare, and what is stored needs none.
    return default_num_workers() if decodes and arguments.device.type != "cpu" else 0
