"""Groups of captions of the same thing, and the pairs that a language model learns from."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .records import CaptionedImage, clean_text
from .sources.json_files import iterate_lines, parse_object

_ERRORS_SHOWN = 5
_WITHOUT_PAIRS = (
    "Data without second captions needs no fine-tuning: build the model from a fine-tuned LLM (a "
    "released one, or with the LoRA of one by llm2clip build --lora), or skip this stage and "
    "continue with llm2clip extract."
)


@dataclass(frozen=True)
class CaptionGroup:
    """All captions of one group.

    Attributes:
        group_id: what the captions describe.
        captions: different texts, in one or several languages, short and long.
    """

    group_id: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class TextPair:
    """Two texts of the same meaning.

    Attributes:
        group_id: what they mean; pairs of one group are never each other's negatives.
        anchor: one of the texts.
        positive: the other one.
        negatives: texts that are close but mean something else.
    """

    group_id: str
    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()


def group_captions(records: Iterable[CaptionedImage]) -> list[CaptionGroup]:
    """Collect the captions of each group.

    Args:
        records: records of a dataset.

    Returns:
        The groups, each text once, in the order of the records.

    Raises:
        ValueError: groups have fewer than two captions: how many, the first of them, and where
            they are written.
    """
    records = list(records)
    captions = _collect_captions(records)
    if not captions:
        raise ValueError("There are no captions. Give a dataset with at least two images.")
    single = [group_id for group_id, texts in captions.items() if len(texts) < 2]
    if single:
        places = {record.group_id: record.place for record in reversed(records)}
        shown = "; ".join(f"{group_id} ({places[group_id]})" for group_id in single[:_ERRORS_SHOWN])
        raise ValueError(
            f"{len(single)} of {len(captions)} images have one caption only, and a pair needs "
            f"two: {shown}{'; …' if len(single) > _ERRORS_SHOWN else ''}. Give them a second (or "
            f"long) caption, or skip them with --skip-single-captions. {_WITHOUT_PAIRS}"
        )
    return [CaptionGroup(group_id, tuple(texts)) for group_id, texts in captions.items()]


def skip_single_captions(
    records: Sequence[CaptionedImage],
) -> tuple[list[CaptionedImage], int]:
    """Skip the groups that have only one caption.

    Args:
        records: records of a dataset.

    Returns:
        The records of the other groups, and how many groups were skipped.

    Raises:
        ValueError: no group is left.
    """
    captions = _collect_captions(records)
    kept = [record for record in records if len(captions[record.group_id]) > 1]
    if captions and not kept:
        raise ValueError(
            f"All {len(captions)} images have one caption only, so none is left to train on. "
            f"{_WITHOUT_PAIRS}"
        )
    return kept, len(captions) - len({record.group_id for record in kept})


def _collect_captions(records: Iterable[CaptionedImage]) -> dict[str, dict[str, None]]:
    """Return the texts of each group, each text once, in the order of the records."""
    captions: dict[str, dict[str, None]] = {}
    for record in records:
        texts = captions.setdefault(record.group_id, {})
        texts.update(dict.fromkeys((*record.captions, *record.long_captions)))
    return captions


def sample_pairs(
    groups: Sequence[CaptionGroup], *, seed: int, num_pairings: int = 1
) -> list[TextPair]:
    """Split each group's captions into pairs at random.

    Args:
        groups: groups of at least two captions.
        seed: another seed gives other pairs.
        num_pairings: how many times to split every group. In each pairing a caption is in one pair;
            the last one of an odd number is paired with a random other one of its group.

    Returns:
        The pairs, one pairing after the other.
    """
    generator = random.Random(seed)
    pairs = []
    for group in [*groups] * num_pairings:
        captions = list(group.captions)
        generator.shuffle(captions)
        if len(captions) % 2:
            captions.append(captions[generator.randrange(len(captions) - 1)])
        for first, second in zip(captions[::2], captions[1::2], strict=True):
            pairs.append(TextPair(group.group_id, first, second))
    return pairs


def read_text_pairs(file: str | Path) -> list[TextPair]:
    """Read text pairs: JSON lines with `query`, `positive` and optionally `negatives`.

    `negatives` is a list of texts, of the same length in every line. Lines with the same query are
    one group. Texts are cleaned like captions, so that equal texts are recognized.

    Args:
        file: JSON lines, UTF-8.

    Returns:
        At least one pair, in the order of the lines.

    Raises:
        ValueError: lines have errors, all of which are counted, or there is no line.
    """
    path = Path(file)
    pairs: list[TextPair] = []
    errors: list[str] = []
    for number, line in iterate_lines(path):
        pair = _parse_pair(line)
        if isinstance(pair, str):
            errors.append(f"line {number}: {pair}")
        else:
            pairs.append(pair)
    counts = sorted({len(pair.negatives) for pair in pairs})
    if len(counts) > 1:
        errors.append(
            f"between {counts[0]} and {counts[-1]} negatives per line; give the same number"
        )
    if errors or not pairs:
        shown = "; ".join(errors[:_ERRORS_SHOWN]) or "no lines"
        raise ValueError(f"{path}: {len(errors)} errors: {shown}.")
    return pairs


def _parse_pair(line: bytes) -> TextPair | str:
    """Return a pair, or the error of the line."""
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
