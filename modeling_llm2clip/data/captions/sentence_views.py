"""Views of long captions: some of the sentences after the first (DeBias-CLIP, arXiv:2602.22419).

The first sentence of a long caption usually sums it up, so a model can learn to ignore the other
sentences. A view leaves the first sentence out. The choice of sentences depends only on the
caption's text, so `extract` and `align` make the same views on any number of processes. In a
record, views follow the long captions. `RULE` is recorded in a store's manifest, and changes
whenever the choice of views changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from random import Random

import pyarrow as pa  # type: ignore[import-untyped]

from ..records.record_columns import CAPTION_COLUMNS, TEXTS, make_text_keys
from ..records.record_table import RecordTable

RULE = "1"
_CLOSING = r"""["'”’»)\]}」』）】]"""
# Without spaces between sentences, a full stop ends one, unless a closing quote follows.
_WIDE = "。！？｡।॥۔።។"
_END = re.compile(rf"([.!?…؟]+){_CLOSING}*\s+(?=\S)|[{_WIDE}]+(?!{_CLOSING}|[{_WIDE}])\s*")
_OPENING = "\"'“‘«([{¿¡„"
# English, German, French and Spanish. Single letters, as in "e.g.", and numbers need no entry.
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st jr sr mt ft no nos nr vs etc approx ca cf fig vol inc ltd co corp dept "
    "est ave blvd bzw usw bspw ggf str inkl mme mlle sra dra ud uds pág núm".split()
)
_SHORT = re.compile(r"(?:\w\.)*\w|\d+")


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences; joining them restores the text.

    A sentence continues if its end is unclear, as after an abbreviation.
    """
    sentences, start = [], 0
    for end in _END.finditer(text):
        if _is_end(text[start : end.start()], end[1], text[end.end() : end.end() + 2]):
            sentences.append(text[start : end.end()])
            start = end.end()
    return [*sentences, text[start:]] if start < len(text) else sentences


def _is_end(before: str, mark: str | None, after: str) -> bool:
    """Return whether a sentence ends at `mark`, which is None for marks that need no whitespace."""
    words = before.rsplit(None, 1)
    if not words or mark is None:
        return bool(words)
    word = words[-1].lstrip(_OPENING).casefold()
    is_short = word in _ABBREVIATIONS or _SHORT.fullmatch(word) is not None
    return not (after.lstrip(_OPENING)[:1].islower() or (mark == "." and is_short))


def list_views(caption: str, num_views: int) -> list[str]:
    """List at most `num_views` distinct views of a caption; a single sentence has no views.

    The number of sentences in a view is random, from one to all but the first, and the sentences
    keep their order.
    """
    others = split_sentences(caption)[1:] if num_views else []
    views: dict[str, None] = {}
    for number in range(num_views) if others else ():
        seed = blake2b(f"{number} {caption}".encode(), digest_size=8).digest()
        sample = Random(int.from_bytes(seed, "little")).random  # same in every Python version
        size = 1 + int(sample() * len(others))
        ranks = [sample() for _ in others]
        chosen = sorted(sorted(range(len(others)), key=ranks.__getitem__)[:size])
        views["".join(others[position] for position in chosen).strip()] = None
    return list(views)


def with_views(long_captions: Sequence[str], num_views: int) -> tuple[str, ...]:
    """Return long captions followed by their views."""
    views = (view for caption in long_captions for view in list_views(caption, num_views))
    return (*long_captions, *views)


def add_views(batch: pa.RecordBatch, num_views: int) -> pa.RecordBatch:
    """Append views to a batch's long captions, and the views' keys to `text_keys`, if present."""
    if not num_views:
        return batch
    short, long = (batch.column(name).to_pylist() for name in CAPTION_COLUMNS)
    viewed = [with_views(texts, num_views) for texts in long]
    columns = {"long_captions": pa.array(viewed, TEXTS)}
    if "text_keys" in batch.schema.names:
        columns["text_keys"] = make_text_keys(
            [(*texts, *more) for texts, more in zip(short, viewed, strict=True)]
        )
    for name, column in columns.items():
        batch = batch.set_column(batch.schema.get_field_index(name), name, column)
    return batch


def require_views(records: RecordTable, num_views: int) -> None:
    """Raise ValueError if views are requested but no long caption has two sentences."""
    captions = (
        caption
        for batch in records.iterate_columns(("long_captions",))
        for caption in batch.column(0).flatten().to_pylist()
    )
    if num_views and not any(len(split_sentences(caption)) > 1 for caption in captions):
        raise ValueError(
            f"sentence_views={num_views}: no long caption has two sentences. Use data with long "
            "captions, or leave sentence_views out."
        )


def describe_views(num_views: int) -> dict[str, str]:
    """Describe a store's views, for the plan in its manifest."""
    return {"sentence_views": str(num_views), "sentence_rule": RULE} if num_views else {}


def read_num_views(plan: Mapping[str, str]) -> int:
    """Return the number of views per long caption from the plan in a store's manifest."""
    num_views, rule = int(plan.get("sentence_views", 0)), plan.get("sentence_rule", RULE)
    if rule != RULE:
        raise ValueError(
            f"The store's sentence views follow rule {rule!r}, but this version of the package "
            f"makes them by rule {RULE!r}. Extract the captions again."
        )
    return num_views
