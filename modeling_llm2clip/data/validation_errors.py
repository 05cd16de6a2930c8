"""Collects what is wrong with a data set, so that it is told at once and before anything costly."""

from __future__ import annotations

from collections.abc import Mapping

_PLACES_SHOWN = 5


class DataValidationError(ValueError):
    """A data set has errors: how many of each kind, and where the first of them are.

    Attributes:
        counts: kind of error to how many there are.
        places: kind of error to the first places, such as `captions.jsonl line 3`.
    """

    def __init__(
        self, source: str, counts: Mapping[str, int], places: Mapping[str, list[str]]
    ) -> None:
        self.source = source
        self.counts = dict(counts)
        self.places = {kind: list(where) for kind, where in places.items()}
        total = sum(self.counts.values())
        lines = [f"{source} has {total} {'error' if total == 1 else 'errors'}:"]
        for kind, count in self.counts.items():
            more = ", …" if count > len(self.places[kind]) else ""
            lines.append(f"  {kind}: {count} ({', '.join(self.places[kind])}{more})")
        lines.append("Correct or remove these; nothing was skipped.")
        if any(kind.startswith("unknown field") for kind in self.counts):
            lines.append(
                "A field that is meant to be there may be named: ignored_fields, --ignore-fields."
            )
        if "class name repeated" in self.counts:
            lines.append(
                "Give each class a name of its own (class_names, --class-names), or let images "
                "of these count as wrong (allow_repeated_class_names, "
                "--allow-repeated-class-names)."
            )
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[DataValidationError], tuple[object, ...]]:
        # An exception is rebuilt from its message alone unless told otherwise.
        return DataValidationError, (self.source, self.counts, self.places)


class ErrorCollector:
    """Counts errors by kind and remembers the first places of each."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._places: dict[str, list[str]] = {}

    def add(self, kind: str, place: str) -> None:
        """Note one error."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        places = self._places.setdefault(kind, [])
        if len(places) < _PLACES_SHOWN:
            places.append(place)

    def extend(self, other: ErrorCollector) -> None:
        """Take over what another collector noted."""
        for kind, count in other._counts.items():
            self._counts[kind] = self._counts.get(kind, 0) + count
            places = self._places.setdefault(kind, [])
            places += other._places[kind][: _PLACES_SHOWN - len(places)]

    @property
    def counts(self) -> dict[str, int]:
        """Kind of error to how many were noted."""
        return dict(self._counts)

    @property
    def total(self) -> int:
        """How many errors were noted."""
        return sum(self._counts.values())

    def raise_if_any(self, source: str) -> None:
        """Raise DataValidationError with everything that was noted."""
        if self._counts:
            raise DataValidationError(source, self._counts, self._places)
