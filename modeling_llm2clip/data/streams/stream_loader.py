"""Loads the batches of a stream, and keeps the final state of each worker.

StatefulDataLoader only receives a worker's state along with a batch. Samples that a worker drops or
loses after its last batch would be missing from the report, as would shards that end early after
it. So each worker ends with a `PartEnd` that carries its final state, and this loader filters out
the `PartEnd`s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

from .stream_run import PartEnd, share_batch


class StreamLoader(StatefulDataLoader):  # type: ignore[misc]
    """Yields the batches that a dataset makes, without the `PartEnd` of each worker."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], **options: Any) -> None:
        super().__init__(
            dataset, batch_size=None, collate_fn=partial(_collate, collate=collate), **options
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the next iteration from a state."""
        if state_dict:
            num_workers = _count_workers(state_dict)
            if num_workers != self.num_workers:
                raise ValueError(
                    f"The state was saved with num_workers={num_workers}, but this loader has "
                    f"{self.num_workers}. Use the same number: each worker has its own shards."
                )
        super().load_state_dict(state_dict)

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if not isinstance(batch, PartEnd):
                yield batch


def _count_workers(state: dict[str, Any]) -> int:
    if "_num_yielded" in state:  # the loader had no worker processes
        return 0
    try:
        return int(state["_snapshot"]["_main_snapshot"]["_num_workers"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            "This is not the state of a loader. Pass the return value of the loader's state_dict()."
        ) from error


def _collate(batch: Any, *, collate: Callable[[list[Any]], Any]) -> Any:
    return batch if isinstance(batch, PartEnd) else share_batch(collate(batch))
