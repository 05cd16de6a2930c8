"""Views of long captions: some sentences after the first one (DeBias-CLIP, arXiv:2602.22419).

The first sentence of a long caption mostly sums it up, so that a model need not read the others. A
view leaves it out. Which sentences a view has depends on the text of its caption alone, so that
`extract` and `align` make the same views on any number of processes. In a record they follow the
long captions. `RULE` is in the manifest of a store, and changes whenever other views are made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from random import Random

import pyarrow as pa  # type: ignore[import-untyped]

from ..records.record_columns import TEXTS, make_text_keys
from ..records.record_table import CAPTION_COLUMNS, RecordTable

RULE = "1"
_CLOSING = r"""["'”’»)\]}」』）】]"""
# In writing without spaces a full stop is enough; in front of a closing quote it may be within one.
_WIDE = "。！？｡।॥۔።។"
_END = re.compile(rf"([.!?…؟]+){_CLOSING}*\s+(?=\S)|[{_WIDE}]+(?!{_CLOSING}|[{_WIDE}])\s*")
_OPENING = "\"'“‘«([{¿¡„"
# Of English, German, French and Spanish. Neither letters, as in "e.g.", nor numbers need an entry.
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st jr sr mt ft no nos nr vs etc approx ca cf fig vol inc ltd co corp dept "
    "est ave blvd bzw usw bspw ggf str inkl mme mlle sra dra ud uds pág núm".split()
)
_SHORT = re.compile(r"(?:\w\.)*\w|\d+")


def split_sentences(text: str) -> list[str]:
    """Split a text into its sentences, which joined are the text again.

    Where it is not clear that a sentence ends, as after an abbreviation, it goes on.
    """
    sentences, start = [], 0
    for end in _END.finditer(text):
        if _is_end(text[start : end.start()], end[1], text[end.end() : end.end() + 2]):
            sentences.append(text[start : end.end()])
            start = end.end()
    return [*sentences, text[start:]] if start < len(text) else sentences


def _is_end(before: str, mark: str | None, after: str) -> bool:
    """Tell whether a sentence ends at a mark; None for one that needs no whitespace."""
    words = before.rsplit(None, 1)
    if not words or mark is None:
        return bool(words)
    word = words[-1].lstrip(_OPENING).casefold()
    is_short = word in _ABBREVIATIONS or _SHORT.fullmatch(word) is not None
    return not (after.lstrip(_OPENING)[:1].islower() or (mark == "." and is_short))


def list_views(caption: str, num_views: int) -> list[str]:
    """List at most so many distinct views of a caption; a single sentence has none.

    The number of sentences is uniform from one to all but the first. They keep their order.
    """
    others = split_sentences(caption)[1:] if num_views else []
    views: dict[str, None] = {}
    for number in range(num_views) if others else ():
        seed = blake2b(f"{number} {caption}".encode(), digest_size=8).digest()
        sample = Random(int.from_bytes(seed, "little")).random  # the same in every Python
        size = 1 + int(sample() * len(others))
        ranks = [sample() for _ in others]
        chosen = sorted(sorted(range(len(others)), key=ranks.__getitem__)[:size])
        views["".join(others[position] for position in chosen).strip()] = None
    return list(views)


def with_views(long_captions: Sequence[str], num_views: int) -> tuple[str, ...]:
    """Return long captions, and after them their views."""
    views = (view for caption in long_captions for view in list_views(caption, num_views))
    return (*long_captions, *views)


def add_views(batch: pa.RecordBatch, num_views: int) -> pa.RecordBatch:
    """Add views to the long captions of a batch's records, and to the text keys if it has these."""
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
    """Refuse to make views where no long caption has any."""
    if num_views and not any(map(_is_divided, _iterate_long(records))):
        raise ValueError(
            f"sentence_views={num_views}, and no long caption has two sentences. Give data with "
            "long captions, or leave sentence_views out."
        )


def _is_divided(caption: str) -> bool:
    return len(split_sentences(caption)) > 1


def _iterate_long(records: RecordTable) -> Iterator[str]:
    for batch in records.iterate_columns(("long_captions",)):
        yield from batch.column(0).flatten().to_pylist()


def describe_views(num_views: int) -> dict[str, str]:
    """Describe the views of a store in the plan of its manifest."""
    return {"sentence_views": str(num_views), "sentence_rule": RULE} if num_views else {}


def read_num_views(plan: Mapping[str, str]) -> int:
    """Read the number of views of each long caption from the plan of a store's manifest."""
    num_views, rule = int(plan.get("sentence_views", 0)), plan.get("sentence_rule", RULE)
    if rule != RULE:
        raise ValueError(
            f"The store has sentence views by rule {rule!r}, and this version of the package makes "
            f"others, by rule {RULE!r}. Extract the captions again."
        )
    return num_views
