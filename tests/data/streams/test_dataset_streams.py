"""A stream of a `datasets.IterableDataset` yields its samples and resumes from its own state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pytest
from numbered_rows import COLUMNS, require_rows
from packaging.version import Version
from shared_models import mostly_slow
from streamed_shards import stop_and_resume

from modeling_llm2clip.data.streams.dataset_streams import stream_dataset
from modeling_llm2clip.data.streams.record_streams import RecordStream, make_loader, read_report
from modeling_llm2clip.data.streams.stream_run import TooManyLostError


def list_groups(records: Any) -> list[int]:
    return [int(record.group_id) for record in records]


def test_a_stream_has_the_samples_of_its_dataset(saved: datasets.Dataset) -> None:
    rows = saved.to_iterable_dataset(num_shards=4)
    require_rows(stream_dataset(rows, columns=COLUMNS, buffer_size=1), list(range(20)))
    mixed = list(stream_dataset(rows, columns=COLUMNS, seed=2, buffer_size=5))
    assert list_groups(mixed) != list(range(20))
    require_rows(sorted(mixed, key=lambda record: int(record.group_id)), list(range(20)))


def test_processes_share_the_samples_and_too_many_are_refused(saved: datasets.Dataset) -> None:
    rows = saved.to_iterable_dataset(num_shards=4)

    def read(process: int, num_processes: int) -> list[int]:
        options: dict[str, Any] = {"process_index": process, "num_processes": num_processes}
        return list_groups(stream_dataset(rows, columns=COLUMNS, **options))

    assert sorted(read(0, 3) + read(1, 3) + read(2, 3)) == list(range(20))
    with pytest.raises(ValueError, match="4 shards for 5 processes"):
        read(0, 5)


def interleave(rows: datasets.IterableDataset, **options: Any) -> datasets.IterableDataset:
    other = rows.map(lambda row: {"label": row["label"] + 50}, features=rows.features)
    return datasets.interleave_datasets([rows, other], **options)


def keep_first(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: values[:1] for name, values in batch.items()}


STREAMS: dict[str, Callable[[datasets.IterableDataset], datasets.IterableDataset]] = {
    "skip and take": lambda rows: rows.skip(3).take(9),
    "mapped": lambda rows: rows.take(7).map(lambda row: {"texts": [*row["texts"], "more"]}),
    "filtered": lambda rows: rows.filter(lambda row: row["label"] % 2 == 0),
    "filtered by number": lambda rows: rows.filter(lambda _, i: i < 5, with_indices=True),
    "mapped by number": lambda rows: rows.map(lambda _, i: {"label": i}, with_indices=True),
    "first of batches": lambda rows: rows.map(keep_first, batched=True, batch_size=3),
    "concatenated": lambda rows: datasets.concatenate_datasets([rows.skip(15), rows.take(3)]),
    "interleaved at random": lambda rows: interleave(rows, probabilities=[0.8, 0.2], seed=3),
    "shuffled": lambda rows: rows.shuffle(seed=3, buffer_size=4),
    "of numpy": lambda rows: rows.with_format("numpy"),
    "of arrow": lambda rows: rows.with_format("arrow"),
}


@pytest.mark.parametrize("change", STREAMS)
def test_one_reader_has_the_samples_of_its_dataset_whatever_was_done_to_it(
    saved: datasets.Dataset, change: str
) -> None:
    changed = STREAMS[change](saved.to_iterable_dataset(num_shards=4))
    stream = stream_dataset(changed, columns=COLUMNS, seed=2, buffer_size=5)
    expected = sorted(row["label"] for row in changed.with_format(None))
    assert sorted(list_groups(stream)) == expected
    assert sorted(list_groups(stream)) == expected  # again in the same epoch


@pytest.mark.parametrize("change", mostly_slow([*STREAMS, "untouched"], {"shuffled", "untouched"}))
def test_a_resumed_stream_continues_and_counts_the_lost_samples_of_its_buffer(
    saved: datasets.Dataset, change: str
) -> None:
    def make(buffer_size: int = 4) -> RecordStream:
        rows = saved.to_iterable_dataset(num_shards=4)
        changed = STREAMS.get(change, lambda rows: rows)(rows)
        return stream_dataset(changed, columns=COLUMNS, seed=2, buffer_size=buffer_size)

    whole = list_groups(make())
    for stop in (0, 2, 5):
        records, resumed = stop_and_resume(make, stop)
        groups = list_groups(records)
        lost = resumed.report.not_resumed_samples
        # All of the buffer but the sample that was yielded last, or fewer at the end.
        assert lost == (min(3, len(whole) - stop) if stop else 0)
        if change == "shuffled" and stop:  # and an unknown number of its own buffer
            assert len(groups) < len(whole) - lost
        else:
            assert len(groups) == len(whole) - lost
            assert not set(groups) - set(whole)
            assert resumed.report.samples == len(groups)
        assert resumed.report.lost_samples == 0
        assert ("in the shuffle buffer not resumed" in resumed.report.describe_losses()) == bool(
            lost
        )


def test_without_a_buffer_nothing_is_lost(saved: datasets.Dataset) -> None:
    def make() -> RecordStream:
        rows = saved.to_iterable_dataset(num_shards=4)
        return stream_dataset(rows, columns=COLUMNS, buffer_size=1)

    for stop in (1, 7, 19):
        records, resumed = stop_and_resume(make, stop)
        assert list_groups(records) == list(range(20))
        assert resumed.report.not_resumed_samples == 0
        assert list_groups(resumed) == list(range(20))  # the epoch begins anew


@pytest.mark.slow  # four processes
def test_a_loader_of_a_dataset_is_resumed(saved: datasets.Dataset) -> None:
    def make() -> Any:
        rows = saved.to_iterable_dataset(num_shards=4)
        stream = stream_dataset(rows, columns=COLUMNS, buffer_size=1)
        return make_loader(stream, batch_size=2, num_workers=2)

    whole = [list_groups(batch) for batch in make()]
    assert sorted(group for batch in whole for group in batch) == list(range(20))
    batches, resumed = stop_and_resume(make, 4)
    assert [list_groups(batch) for batch in batches] == whole
    assert read_report(resumed.state_dict()).samples == 20


def test_set_epoch_also_sets_the_epoch_of_the_dataset(saved: datasets.Dataset) -> None:
    rows = saved.to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=3)
    stream = stream_dataset(rows, columns=COLUMNS, buffer_size=1)
    first = list_groups(stream)
    stream.set_epoch(1)
    second = list_groups(stream)
    assert sorted(first) == sorted(second) == list(range(20)) and first != second


def test_rows_that_can_be_read_only_once_are_all_streamed() -> None:
    once = iter([{"label": number, "texts": [f"caption {number}"]} for number in range(6)])

    def yield_rest() -> Iterator[dict[str, Any]]:
        yield from once

    dataset = datasets.IterableDataset.from_generator(yield_rest)
    columns = {"captions": "texts", "group_id": "label"}
    assert len(list(stream_dataset(dataset, columns=columns, require_images=False))) == 6


def test_a_missing_column_is_named(saved: datasets.Dataset) -> None:
    """As absent, a mistyped `lang` would make every text English."""
    rows = saved.to_iterable_dataset()
    with pytest.raises(ValueError, match="no column lagn, only img, texts, label"):
        stream_dataset(rows, columns={**COLUMNS, "lang": "lagn"})
    unknown = datasets.IterableDataset.from_generator(lambda: iter([{"texts": ["a"], "label": 1}]))
    with pytest.raises(ValueError, match="no column lagn, only texts, label"):
        list(stream_dataset(unknown, columns={"captions": "texts", "lang": "lagn"}))


def test_the_state_of_other_columns_or_shards_is_refused(saved: datasets.Dataset) -> None:
    rows = saved.to_iterable_dataset(num_shards=4)
    stopped = stream_dataset(rows, columns=COLUMNS)
    next(iter(stopped))
    for other, columns in (
        (rows, {**COLUMNS, "long_captions": "texts"}),
        (rows.rename_column("label", "number"), {**COLUMNS, "group_id": "number"}),
        (saved.to_iterable_dataset(num_shards=3), COLUMNS),
    ):
        stream = stream_dataset(other, columns=columns)
        stream.load_state_dict(stopped.state_dict())
        with pytest.raises(ValueError, match="to another stream: shards differ"):
            list(stream)


@pytest.mark.parametrize("kind", [None, "numpy", "torch"])
def test_images_that_map_decoded_are_refused_by_name(
    saved: datasets.Dataset, kind: str | None
) -> None:
    images = saved.cast_column("img", datasets.Image())
    decoded = images.to_iterable_dataset().with_format(kind).map(lambda row: row)
    if kind is None and Version(datasets.__version__) < Version("4"):
        pytest.skip("datasets 3.2 encodes anew what map returned; versions between were not tried")
    with pytest.raises(ValueError, match=r"row 0: the image is a .*decoded.*decode=False"):
        list(stream_dataset(decoded, columns=COLUMNS))


def test_a_stream_that_lost_every_sample_ends_with_an_error() -> None:
    """Three lost samples are few, but here they are all; these rows have only paths."""
    rows = datasets.Dataset.from_dict({"image": ["a.png"] * 3, "text": ["a", "b", "c"]})
    with pytest.raises(TooManyLostError, match="lost 3 samples"):
        list(stream_dataset(rows.to_iterable_dataset(), max_lost_share=0.5))
