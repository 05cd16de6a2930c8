"""Groups of captions of the same thing, stored as columns: training data for the language model."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from ..._suggestions import counted
from ..key_arrays import Array, contains_keys, sort_rows
from ..records.record_columns import count_items, locate_captions
from ..records.record_table import RecordTable
from ..records.records import CaptionedImage

_ROWS_AT_ONCE = 2**13
_ERRORS_SHOWN = 5
_KEY_COLUMNS = ("group_key", "text_keys")
_COLUMNS = (*_KEY_COLUMNS, "captions", "long_captions", "group_id")
_WITHOUT_PAIRS = (
    "Without second captions, skip fine-tuning: build the model from an LLM that is already "
    "fine-tuned (a released one, or its LoRA with llm2clip build --lora), or continue with "
    "llm2clip extract."
)


@dataclass(frozen=True)
class CaptionGroup:
    """All distinct captions of one group, short and long, in all languages."""

    group_id: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class GroupBatch:
    """The captions of several complete groups, without repeats within a group.

    Attributes:
        counts: (G,) int64, number of captions of each group, at least two.
        keys: (T,) int64, key of each caption, group by group.
        group_ids: (G,) strings, the id of each group.
        positions: (T,) int64, position of each caption in the concatenation of both arrays in
            `texts`.
        texts: All short captions of the batch's records, and all their long captions.
    """

    counts: Array
    keys: Array
    group_ids: pa.Array
    positions: Array
    texts: tuple[pa.Array, pa.Array]

    def take_texts(self, numbers: Array | None = None) -> pa.Array:
        """Return the captions with the given numbers (0 to T - 1), or all captions."""
        positions = self.positions if numbers is None else self.positions[numbers]
        short, long = self.texts
        texts = pa.concat_arrays([short, long]) if len(long) else short
        return texts.take(pa.array(positions))


@dataclass(eq=False)
class CaptionGroups(Iterable[CaptionGroup]):
    """Groups of at least two captions, read in batches and never held in memory.

    Texts are compared by their 64-bit keys. If two different captions of a group have the same key,
    one caption is not used. With a billion captions, the odds of this are below one in a hundred
    million.

    Attributes:
        records: Records, in which each group is contiguous.
        num_groups: Number of groups.
        num_pairs: Number of pairs when every caption is used once. In a group with an odd number of
            captions, the last caption is paired with one that is already used.
        num_texts: Number of captions.
        chosen: (groups of at least two captions,) bool, which groups to use; None for all.
        left_out: Ascending keys of captions to leave out, along with every group that then has
            fewer than two.
    """

    records: RecordTable
    num_groups: int
    num_pairs: int
    num_texts: int
    _: KW_ONLY
    chosen: Array | None = None
    left_out: Array | None = None

    def __len__(self) -> int:
        return self.num_groups

    def __iter__(self) -> Iterator[CaptionGroup]:
        for batch in self.iterate_batches():
            texts, start = batch.take_texts().to_pylist(), 0
            for group_id, count in zip(
                batch.group_ids.to_pylist(), batch.counts.tolist(), strict=True
            ):
                yield CaptionGroup(group_id, tuple(texts[start : start + count]))
                start += count

    def iterate_batches(self) -> Iterator[GroupBatch]:
        """Yield the groups in batches, ordered by their first records."""
        for batch, group, keys, numbers in self._iterate_texts(_COLUMNS):
            starts = _find_starts(group)
            first = pa.array(_find_starts(np.asarray(batch.column(0))))
            yield GroupBatch(
                counts=np.diff(starts, append=len(group)),
                keys=keys,
                group_ids=batch.column("group_id").take(first).take(pa.array(group[starts])),
                positions=locate_captions(batch)[1][numbers],
                texts=(batch.column("captions").flatten(), batch.column("long_captions").flatten()),
            )

    def iterate_keys(self) -> Iterator[tuple[Array, Array]]:
        """Yield `counts` and `keys` of each `GroupBatch` without reading any text."""
        for _, group, keys, _ in self._iterate_texts(_KEY_COLUMNS):
            yield np.diff(_find_starts(group), append=len(group)), keys

    def _iterate_texts(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Yield batches of complete groups, and the texts to use as in `list_distinct_texts`."""
        number = 0
        for batch in iterate_whole_groups(self.records, columns):
            texts: tuple[Array, ...] = list_distinct_texts(batch)
            texts = _select(_is_of_several(texts[0]), *texts)
            if self.chosen is not None and len(texts[0]):
                numbers = number + np.cumsum(_mark_starts(texts[0])) - 1  # without gaps
                number = int(numbers[-1]) + 1
                texts = _select(self.chosen[numbers], *texts)
            if self.left_out is not None:
                texts = _select(~contains_keys(self.left_out, texts[1]), *texts)
                texts = _select(_is_of_several(texts[0]), *texts)
            if len(texts[0]):
                yield batch, *texts

    def hold_out(self, count: int, *, seed: int) -> tuple[CaptionGroups, CaptionGroups, int]:
        """Hold out random groups, and leave their captions out of training.

        Returns the training groups, the held-out groups, and the number of captions in other groups
        that training loses, because a lost caption equals a held-out caption or has no partner
        left.
        """
        assert self.chosen is None and self.left_out is None
        if not 2 <= count <= len(self) - 2:
            raise ValueError(
                f"Cannot hold out {count} of {len(self)} images with two captions: at least two "
                "must stay on each side. Choose another --num-held-out, or add images."
            )
        chosen = np.zeros(len(self), np.bool_)
        chosen[_shuffle(len(self), seed)[:count]] = True
        test = CaptionGroups(self.records, count, 0, 0, chosen=chosen)
        left_out = np.sort(np.concatenate([keys for _, keys in test.iterate_keys()]))
        train = CaptionGroups(self.records, 0, 0, 0, chosen=~chosen, left_out=left_out)
        for counts, texts in train.iterate_keys():
            train.num_groups += len(counts)
            train.num_pairs += int(((counts + 1) // 2).sum())
            train.num_texts += len(texts)
        if len(train) < 2:
            raise ValueError(
                "Almost every training caption also belongs to a held-out image. Add images, or "
                "give images of the same thing the same group_id."
            )
        return train, test, self.num_texts - len(left_out) - train.num_texts


def group_captions(records: Sequence[CaptionedImage]) -> CaptionGroups:
    """Group the captions; refuse groups with only one caption."""
    groups, num_single, shown = count_groups(records)
    if not len(groups) + num_single:
        raise ValueError("There are no captions. Use a dataset with at least two images.")
    if num_single:
        raise ValueError(
            f"{num_single} of {len(groups) + num_single} images have only one caption, but a pair "
            f"needs two: {'; '.join(shown)}{'; …' if num_single > _ERRORS_SHOWN else ''}. Add "
            "a second (or long) caption to each, or skip them with --skip-single-captions. "
            f"{_WITHOUT_PAIRS}"
        )
    return groups


def skip_single_captions(records: Sequence[CaptionedImage]) -> tuple[CaptionGroups, int]:
    """Group the captions, skipping groups with only one caption; also return the number skipped."""
    groups, num_single, _ = count_groups(records)
    if num_single and not len(groups):
        raise ValueError(
            f"Each of {counted(num_single, 'image')} has only one caption, so nothing is left to "
            f"train on. {_WITHOUT_PAIRS}"
        )
    return groups, num_single


def iterate_whole_groups(records: RecordTable, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield columns, the first of which is `group_key`, in batches of complete groups."""
    rest: pa.RecordBatch | None = None
    slices = (
        batch.slice(start, _ROWS_AT_ONCE)
        for batch in records.iterate_columns(columns)
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE)
    )
    for batch in slices:
        if rest is not None and rest.num_rows:
            batch = pa.Table.from_batches([rest, batch]).combine_chunks().to_batches()[0]
        changes = _find_starts(np.asarray(batch.column(0)))
        last = int(changes[-1]) if len(changes) else 0
        if last:
            yield batch.slice(0, last)
        rest = batch.slice(last)
    if rest is not None and rest.num_rows:
        yield rest


def list_distinct_texts(batch: pa.RecordBatch) -> tuple[Array, Array, Array]:
    """List the texts of a batch in record order, without repeats within a group.

    Returns three arrays (T,): the group numbers within the batch, the keys, and the numbers of the
    texts among all texts of the batch.
    """
    texts = batch.column("text_keys")
    group = np.cumsum(_mark_starts(np.asarray(batch.column(0)))) - 1
    group, keys = np.repeat(group, count_items(texts)), np.asarray(texts.flatten())
    mixed = np.sort(keys + group)  # equal for a repeat; sorted in a tenth of the time of `order`
    if (mixed[1:] != mixed[:-1]).all():
        return group, keys, np.arange(len(keys))
    order = np.lexsort((keys, group))  # stable: the first of equal texts comes first
    repeats = (group[order][1:] == group[order][:-1]) & (keys[order][1:] == keys[order][:-1])
    is_first = np.ones(len(keys), np.bool_)
    is_first[order[1:][repeats]] = False
    return group[is_first], keys[is_first], np.flatnonzero(is_first)


def count_groups(data: Sequence[CaptionedImage]) -> tuple[CaptionGroups, int, list[str]]:
    """Group the captions; also count single-caption groups, and describe the first few."""
    records = RecordTable.from_records(data)
    first = records.find_first_rows("group_key")
    if (first[1:] < first[:-1]).any():  # make each group contiguous
        records = records.select(sort_rows(first))
    num_groups, num_pairs, num_texts, num_single, start = 0, 0, 0, 0, 0
    shown: list[str] = []
    for batch in iterate_whole_groups(records, _KEY_COLUMNS):
        rows = _find_starts(np.asarray(batch.column(0)))
        counts = np.bincount(list_distinct_texts(batch)[0], minlength=len(rows))
        single = (counts < 2).nonzero()[0]
        num_single += len(single)
        num_groups += len(counts) - len(single)
        num_pairs += int(((counts[counts > 1] + 1) // 2).sum())
        num_texts += int(counts[counts > 1].sum())
        for row in rows[single[: _ERRORS_SHOWN - len(shown)]].tolist():
            record = records[start + row]
            shown.append(f"{record.group_id} ({record.place})")
        start += batch.num_rows
    return CaptionGroups(records, num_groups, num_pairs, num_texts), num_single, shown


def _shuffle(number: int, seed: int) -> Array:
    """Shuffle the integers from 0 to `number` - 1, using 4 bytes of memory per integer."""
    order = array("i", range(number))
    random.Random(seed).shuffle(order)
    return np.asarray(order)


def _mark_starts(values: Array) -> Array:
    """Mark each value that differs from the previous one."""
    starts = np.ones(len(values), np.bool_)
    starts[1:] = values[1:] != values[:-1]
    return starts


def _find_starts(values: Array) -> Array:
    return np.flatnonzero(_mark_starts(values))


def _is_of_several(group: Array) -> Array:
    """Return for each text whether its group has at least two texts."""
    counts = np.diff(_find_starts(group), append=len(group))
    return np.repeat(counts > 1, counts)


def _select(mask: Array, *arrays: Array) -> tuple[Array, ...]:
    return tuple(values[mask] for values in arrays)
