"""Collects the errors in a dataset, so all are reported at once, before any expensive work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .._suggestions import counted
from .record_fields import list_fields_read

_PLACES_SHOWN = 5
_NO_COLUMN = "no column '"


class DataValidationError(ValueError):
    """A dataset has errors; the message counts each kind and locates the first ones.

    Args:
        source: Name or path of the dataset.
        counts: Number of errors of each kind.
        places: First locations of each kind of error, such as `captions.jsonl line 3`.
        advice: Additional advice; may be empty.

    Attributes:
        source: Name or path of the dataset.
        counts: Number of errors of each kind.
        places: First locations of each kind of error.
        advice: Additional advice.
    """

    def __init__(
        self,
        source: str,
        counts: Mapping[str, int],
        places: Mapping[str, list[str]],
        advice: str = "",
    ) -> None:
        self.source = source
        self.counts = dict(counts)
        self.places = {kind: list(where) for kind, where in places.items()}
        self.advice = advice
        lines = [f"{source} has {counted(sum(self.counts.values()), 'error')}:"]
        lines += describe_errors(self.counts, self.places)
        lines.append("Correct or remove these; nothing was skipped.")
        if any(kind.startswith("unknown field") for kind in self.counts):
            lines.append("If a field is intentional, list it in ignore_fields.")
        if any(kind.startswith(_NO_COLUMN) for kind in self.counts):
            lines.append(
                "Add the columns to those files, with null where a record has no such field."
            )
        if advice:
            lines.append(advice)
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[DataValidationError], tuple[object, ...]]:
        # Pickle would call the class with only the message.
        return DataValidationError, (self.source, self.counts, self.places, self.advice)


def describe_errors(counts: Mapping[str, int], places: Mapping[str, Sequence[str]]) -> list[str]:
    """Describe errors, one line per kind: how many there are and where the first ones are."""
    return [
        f"  {kind}: {count} ({', '.join(places[kind])}{', …' if count > len(places[kind]) else ''})"
        for kind, count in counts.items()
    ]


@dataclass
class ErrorCollector:
    """Counts errors and skipped rows by kind, and keeps the first locations of each error."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    # Column names → number of files with exactly these columns, and the first of the files.
    _files: dict[tuple[str, ...], tuple[int, list[str]]] = field(default_factory=dict, init=False)

    def add(self, kind: str, place: str) -> None:
        self._add_all(kind, 1, [place])

    def _add_all(self, kind: str, count: int, first: Sequence[str]) -> None:
        self.counts[kind] += count
        places = self.places.setdefault(kind, [])
        places += first[: _PLACES_SHOWN - len(places)]

    def skip(self, reason: str) -> None:
        """Count a source row that is not a record; this is not an error."""
        self.skipped[reason] += 1

    def note_columns(self, columns: Iterable[str], file: str) -> None:
        """Note the columns of a file, for `compare_columns`."""
        self._note_files(tuple(sorted(columns)), 1, [file])

    def _note_files(self, columns: tuple[str, ...], count: int, files: Sequence[str]) -> None:
        before, first = self._files.get(columns, (0, []))
        self._files[columns] = before + count, [*first, *files][:_PLACES_SHOWN]

    def compare_columns(self, ignored: Iterable[str] = ()) -> None:
        """Add an error for each file that lacks a column that another file has.

        Otherwise, records in that file would silently get the default for a forgotten field.
        """
        read = {
            columns: list_fields_read({*columns}.difference(ignored)) for columns in self._files
        }
        for column in sorted({column for columns in read.values() for column in columns}):
            having = next(self._files[columns][1] for columns in read if column in read[columns])
            kind = f"{_NO_COLUMN}{column}', which {having[0]} has"
            for columns, (count, files) in self._files.items():
                if column not in read[columns]:
                    self._add_all(kind, count, files)
        self._files.clear()

    def extend(self, other: ErrorCollector) -> None:
        for kind, count in other.counts.items():
            self._add_all(kind, count, other.places[kind])
        self.skipped.update(other.skipped)
        for columns, (count, files) in other._files.items():
            self._note_files(columns, count, files)

    def without(self, *kinds: str) -> ErrorCollector:
        """Return a collector of all errors except certain kinds."""
        kept = Counter({kind: n for kind, n in self.counts.items() if kind not in kinds})
        return ErrorCollector(kept, {kind: [*self.places[kind]] for kind in kept})

    @property
    def total(self) -> int:
        return self.counts.total()

    def raise_if_any(self, source: str, *, advice: str = "") -> None:
        """Raise all collected errors as one `DataValidationError`."""
        if self.counts:
            raise DataValidationError(source, self.counts, self.places, advice)
