"""Captions that mean the same image, and the pairs that a language model learns from."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .json_objects import iterate_lines, parse_object
from .records import CaptionedImage, clean_text

_ERRORS_SHOWN = 5
_WITHOUT_PAIRS = (
    "Data without second captions needs no caption tuning: build the model from a caption-tuned "
    "LLM (a released one, or the LoRA of one by llm2clip build --caption-lora), or leave this "
    "stage out and go on with llm2clip extract."
)


@dataclass(frozen=True)
class CaptionGroup:
    """All captions of one group, in one language or several, short and long."""

    group_id: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class TextPair:
    """Two texts that mean the same.

    Attributes:
        group_id: what they mean; pairs of one group are never each other's negatives.
        negatives: texts that are close and mean something else.
    """

    group_id: str
    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()


def group_captions(records: Iterable[CaptionedImage]) -> list[CaptionGroup]:
    """Put the captions of each group together, every text once, in the order of the records.

    Raises: ValueError when groups have fewer than two captions: how many, the first of them, and
        where they are written.
    """
    records = list(records)
    captions = _collect_captions(records)
    if not captions:
        raise ValueError("There are no captions. Give a data set with at least two images.")
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
    """Leave out the records of each group that has one caption only.

    Returns: the other records, and how many groups were left out.
    Raises: ValueError when none is left.
    """
    captions = _collect_captions(records)
    kept = [record for record in records if len(captions[record.group_id]) > 1]
    if captions and not kept:
        raise ValueError(
            f"All {len(captions)} images have one caption only, so that skipping these leaves "
            f"none. {_WITHOUT_PAIRS}"
        )
    return kept, len(captions) - len({record.group_id for record in kept})


def _collect_captions(records: Iterable[CaptionedImage]) -> dict[str, dict[str, None]]:
    """Texts of each group, every one once, in the order of the records."""
    captions: dict[str, dict[str, None]] = {}
    for record in records:
        texts = captions.setdefault(record.group_id, {})
        texts.update(dict.fromkeys((*record.captions, *record.long_captions)))
    return captions


def hold_out_groups(
    groups: Sequence[CaptionGroup], count: int, *, seed: int
) -> tuple[list[CaptionGroup], list[CaptionGroup], int]:
    """Split off `count` groups at random; a caption in both halves leaves the larger one.

    Returns: groups to train on, groups held out, and how many captions training lost.
    Raises: ValueError when fewer than two groups remain on a side.
    """
    if not 2 <= count <= len(groups) - 2:
        raise ValueError(
            f"Cannot hold out {count} of {len(groups)} images: each side needs at least two. "
            "Choose another number (--held-out), or give more images."
        )
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    chosen = set(order[:count])
    held_out = [groups[i] for i in sorted(chosen)]
    seen = {caption for group in held_out for caption in group.captions}
    remaining, num_lost = [], 0
    for index, group in enumerate(groups):
        if index in chosen:
            continue
        kept = tuple(caption for caption in group.captions if caption not in seen)
        num_lost += len(group.captions) - len(kept) if len(kept) > 1 else len(group.captions)
        if len(kept) > 1:
            remaining.append(CaptionGroup(group.group_id, kept))
    if len(remaining) < 2:
        raise ValueError("Nearly every caption is held out too; too few remain to train on.")
    return remaining, held_out, num_lost


def leave_out_texts(
    pairs: Sequence[TextPair], groups: Sequence[CaptionGroup]
) -> tuple[list[TextPair], int]:
    """Drop pairs that hold a caption of these groups; also returns how many were dropped."""
    seen = {caption for group in groups for caption in group.captions}
    kept = [p for p in pairs if not seen & {p.anchor, p.positive, *p.negatives}]
    return kept, len(pairs) - len(kept)


def sample_pairs(groups: Sequence[CaptionGroup], *, seed: int, pairings: int = 1) -> list[TextPair]:
    """Split each group's captions into pairs at random, as often as there are `pairings`.

    In a pairing each caption is in one pair; one left over by an odd count is paired with a random
    other one of its group.
    """
    generator = random.Random(seed)
    pairs = []
    for group in [*groups] * pairings:
        captions = list(group.captions)
        generator.shuffle(captions)
        if len(captions) % 2:
            captions.append(captions[generator.randrange(len(captions) - 1)])
        for first, second in zip(captions[::2], captions[1::2], strict=True):
            pairs.append(TextPair(group.group_id, first, second))
    return pairs


def read_text_pairs(file: str | Path) -> list[TextPair]:
    """Read pairs of other texts: JSON lines with `query`, `positive` and, if wanted, `negatives`.

    `negatives` is a list of texts, equally long in every line. Lines with the same query share a
    group. Texts are cleaned as captions are, so that the same text is found again.

    Raises: ValueError once, with every broken line.
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
        errors.append(f"between {counts[0]} and {counts[-1]} negatives a line; give equally many")
    if errors or not pairs:
        shown = "; ".join(errors[:_ERRORS_SHOWN]) or "no lines"
        raise ValueError(f"{path}: {len(errors)} errors: {shown}.")
    return pairs


def _parse_pair(line: bytes) -> TextPair | str:
    """A pair, or what is wrong with the line."""
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
