"""Counts what a stream read and what it lost, and stops it when that is too much."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..validation_errors import ErrorCollector, describe_errors


class TooManyLostError(ValueError):
    """More of a stream was lost than is allowed; the message names what and where."""


@dataclass
class StreamReport:
    """Counts of samples, shards and problems since the epoch began, of one worker or of all.

    Attributes:
        samples: Samples read, those still in the shuffle buffer included.
        lost_samples: Broken samples.
        skipped_samples: Rows of images that were never downloaded, which are not samples.
        excluded_samples: Samples of groups that are held out.
        dropped_samples: Samples read, but dropped with a last batch that was smaller.
        not_resumed_samples: Samples of a `datasets` object that were in a shuffle buffer when a
            state was saved, and did not come again.
        lost_shards: Shards that are missing or ended early.
    """

    samples: int = 0
    lost_samples: int = 0
    skipped_samples: int = 0
    excluded_samples: int = 0
    dropped_samples: int = 0
    not_resumed_samples: int = 0
    shards: int = 0
    lost_shards: int = 0
    retries: int = 0
    problems: ErrorCollector = field(default_factory=ErrorCollector)

    @property
    def numbers(self) -> dict[str, int]:
        """The counts by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}

    def add_lost_sample(self, kind: str, place: str) -> None:
        """Count a broken sample."""
        self.lost_samples += 1
        self.problems.add(kind, place)

    def add_lost_shard(self, place: str, reason: str) -> None:
        """Count a shard that is missing or ended early."""
        self.lost_shards += 1
        self.problems.add("shard lost", f"{place} ({reason})")

    def describe_losses(self) -> str:
        """Describe in one line the samples that were read, and those that were not."""
        parts = [
            f"{self.samples:,} samples read",
            f"{self.lost_samples:,} lost",
            f"{self.dropped_samples:,} of smaller last batches dropped",
            f"{self.lost_shards:,} of {self.shards + self.lost_shards:,} shards lost",
        ]
        if self.not_resumed_samples:
            parts.append(f"{self.not_resumed_samples:,} of a shuffle buffer not resumed")
        return ", ".join(parts)

    def describe(self) -> str:
        """Describe each kind of problem: its count and first places."""
        return "\n".join(describe_errors(self.problems.counts, self.problems.places))

    def merge(self, other: StreamReport) -> None:
        """Add the counts of another worker."""
        for name, value in other.numbers.items():
            setattr(self, name, getattr(self, name) + value)
        self.problems.extend(other.problems)

    def to_state(self) -> dict[str, Any]:
        """Return the report as plain values."""
        places = {kind: [*where] for kind, where in self.problems.places.items()}
        return {**self.numbers, "counts": dict(self.problems.counts), "places": places}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> StreamReport:
        """Make a report from `to_state`."""
        numbers = {name: value for name, value in state.items() if isinstance(value, int)}
        places = {kind: [*where] for kind, where in state["places"].items()}
        return cls(**numbers, problems=ErrorCollector(Counter(state["counts"]), places))
