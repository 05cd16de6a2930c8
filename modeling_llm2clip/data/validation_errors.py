"""Collects the errors of a dataset, so that all are reported at once and before anything costly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .._suggestions import counted

_PLACES_SHOWN = 5
_NO_COLUMN = "no column '"


class DataValidationError(ValueError):
    """A dataset has errors: how many of each kind, and where the first of them are.

    Args:
        source: Name or path of the dataset.
        counts: Kind of error to how many there are.
        places: Kind of error to the first places, such as `captions.jsonl line 3`.
        advice: Further advice; may be empty.

    Attributes:
        source: Name or path of the dataset.
        counts: Kind of error to how many there are.
        places: Kind of error to the first places.
        advice: Further advice.
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
        total = sum(self.counts.values())
        lines = [f"{source} has {counted(total, 'error')}:"]
        lines += describe_errors(self.counts, self.places)
        lines.append("Correct or remove these; nothing was skipped.")
        if any(kind.startswith("unknown field") for kind in self.counts):
            lines.append("Name a field that is meant to be there: ignore_fields.")
        if any(kind.startswith(_NO_COLUMN) for kind in self.counts):
            lines.append(
                "Write the columns into those files too; null says that a record has no such field."
            )
        if advice:
            lines.append(advice)
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[DataValidationError], tuple[object, ...]]:
        # Pickle would call the class with the message alone.
        return DataValidationError, (self.source, self.counts, self.places, self.advice)


def describe_errors(counts: Mapping[str, int], places: Mapping[str, Sequence[str]]) -> list[str]:
    """Describe errors in a line per kind: how many there are, and where the first of them are."""
    return [
        f"  {kind}: {count} ({', '.join(places[kind])}{', …' if count > len(places[kind]) else ''})"
        for kind, count in counts.items()
    ]


@dataclass
class ErrorCollector:
    """Counts errors and rows that are not records, by kind; keeps the first places of each."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    # Names of columns to how many files have exactly these, and the first of the files.
    _files: dict[tuple[str, ...], tuple[int, list[str]]] = field(default_factory=dict, init=False)

    def add(self, kind: str, place: str) -> None:
        """Add one error."""
        self._add_all(kind, 1, [place])

    def _add_all(self, kind: str, count: int, first: Sequence[str]) -> None:
        self.counts[kind] += count
        places = self.places.setdefault(kind, [])
        places += first[: _PLACES_SHOWN - len(places)]

    def skip(self, reason: str) -> None:
        """Count a row of the source that is not a record, which is not an error."""
        self.skipped[reason] += 1

    def note_columns(self, columns: Iterable[str], file: str) -> None:
        """Note the columns of a file, which are compared by `compare_columns`."""
        self._note_files(tuple(sorted(columns)), 1, [file])

    def _note_files(self, columns: tuple[str, ...], count: int, files: Sequence[str]) -> None:
        before, first = self._files.get(columns, (0, []))
        self._files[columns] = before + count, [*first, *files][:_PLACES_SHOWN]

    def compare_columns(self, ignored: Iterable[str] = ()) -> None:
        """Add the files that lack a column which another file of the source has.

        Their records would silently get the default of a field that was forgotten.
        """
        for column in sorted(
            {column for columns in self._files for column in columns} - {*ignored}
        ):
            having = next(files for columns, (_, files) in self._files.items() if column in columns)
            kind = f"{_NO_COLUMN}{column}', which {having[0]} has"
            for columns, (count, files) in self._files.items():
                if column not in columns:
                    self._add_all(kind, count, files)
        self._files.clear()

    def extend(self, other: ErrorCollector) -> None:
        """Add the errors of another collector."""
        for kind, count in other.counts.items():
            self._add_all(kind, count, other.places[kind])
        self.skipped.update(other.skipped)
        for columns, (count, files) in other._files.items():
            self._note_files(columns, count, files)

    def without(self, *kinds: str) -> ErrorCollector:
        """Return a collector of the other errors."""
        kept = Counter({kind: n for kind, n in self.counts.items() if kind not in kinds})
        return ErrorCollector(kept, {kind: [*self.places[kind]] for kind in kept})

    @property
    def total(self) -> int:
        """Number of errors."""
        return self.counts.total()

    def raise_if_any(self, source: str, *, advice: str = "") -> None:
        """Raise everything that was collected."""
        if self.counts:
            raise DataValidationError(source, self.counts, self.places, advice)
