"""Text pairs from files: two texts with the same meaning, and negatives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..record_fields import clean_text
from ..sources.json_files import iterate_lines, parse_object
from ..validation_errors import ErrorCollector


@dataclass(frozen=True)
class TextPair:
    """Two texts with the same meaning, and similar texts that mean something else.

    Pairs of one group are never each other's negatives.
    """

    group_id: str
    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.anchor, self.positive, *self.negatives)


def read_text_pairs(file: str | Path) -> Iterator[TextPair]:
    """Read text pairs: JSON lines with `query`, `positive` and optionally `negatives`.

    `negatives` is a list of texts, equally long in every line. Lines with the same query form one
    group. Texts are cleaned like captions, so equal texts are recognized.
    """
    path = Path(file)
    errors, counts = ErrorCollector(), set[int]()
    for number, line in iterate_lines(path):
        pair = _parse_pair(line)
        if isinstance(pair, str):
            errors.add(pair, f"line {number}")
            continue
        counts.add(len(pair.negatives))
        if len(counts) == 1 and not errors.total:
            yield pair
    if len(counts) > 1:
        errors.add(
            f"between {min(counts)} and {max(counts)} negatives per line, not always the same "
            "number",
            path.name,
        )
    if not counts and not errors.total:
        raise ValueError(f"{path} has no pairs. Write one per line.")
    errors.raise_if_any(str(path))


def _parse_pair(line: bytes) -> TextPair | str:
    fields = parse_object(line)
    if isinstance(fields, str):
        return fields
    if unknown := sorted(set(fields) - {"query", "positive", "negatives"}):
        return f"unknown field {unknown[0]!r}"
    negatives = fields.get("negatives", [])
    texts = [fields.get("query"), fields.get("positive")]
    if not isinstance(negatives, list):
        return "'negatives' is not a list"
    if not all(isinstance(text, str) and text.strip() for text in (*texts, *negatives)):
        return "'query', 'positive' and 'negatives' must be non-blank texts"
    query, positive, *others = map(clean_text, (*texts, *negatives))
    for name, text in (("query", query), ("positive", positive)):
        if text in others:
            return f"the {name} is among its negatives"
    return TextPair(query, query, positive, tuple(others))
