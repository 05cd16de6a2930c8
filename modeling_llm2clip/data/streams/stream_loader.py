"""Loads the batches of a stream, and keeps the last state of each worker.

StatefulDataLoader keeps only states that come with a batch. Samples that a worker drops or loses
after its last batch, and shards that end early there, would be in no state. So each worker sends a
last mark with its final state, and this loader does not pass the mark on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

from .stream_run import PartEnd, share_batch


class StreamLoader(StatefulDataLoader):  # type: ignore[misc]
    """Yields the batches of a dataset that makes them, and a `PartEnd` behind a worker's last."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], **options: Any) -> None:
        super().__init__(
            dataset, batch_size=None, collate_fn=partial(_collate, collate=collate), **options
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration go on from a state."""
        if state_dict:
            num_workers = _count_workers(state_dict)
            if num_workers != self.num_workers:
                raise ValueError(
                    f"The state is of a loader with num_workers={num_workers}, and this one has "
                    f"{self.num_workers}. Each worker has shards of its own: use as many."
                )
        super().load_state_dict(state_dict)

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if not isinstance(batch, PartEnd):
                yield batch


def _count_workers(state: dict[str, Any]) -> int:
    if "_num_yielded" in state:  # of a loader without worker processes
        return 0
    try:
        return int(state["_snapshot"]["_main_snapshot"]["_num_workers"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            "This is not the state of a loader. Give what its state_dict() returned."
        ) from error


def _collate(batch: Any, *, collate: Callable[[list[Any]], Any]) -> Any:
    return batch if isinstance(batch, PartEnd) else share_batch(collate(batch))
