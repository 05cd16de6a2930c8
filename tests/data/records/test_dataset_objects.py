"""`datasets` objects give what their files give, and their images stay where they are."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from captioned_files import LINES, RECORDS, encode, own_cache, write_images  # noqa: F401
from packaging.version import Version

from modeling_llm2clip.data.images.image_sources import ArrowImage
from modeling_llm2clip.data.records.dataset_objects import records_from_dataset
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.streams.dataset_streams import stream_dataset
from modeling_llm2clip.data.streams.record_streams import make_loader


def make_dataset(count: int = 20) -> datasets.Dataset:
    rows = {
        "img": [{"bytes": encode("images/red.png") + b" " * n, "path": None} for n in range(count)],
        "texts": [[f"caption {n}", f"text {n}"] for n in range(count)],
        "label": list(range(count)),
    }
    return datasets.Dataset.from_dict(rows).cast_column("img", datasets.Image(decode=False))


COLUMNS = {"image": "img", "captions": "texts", "group_id": "label"}


@pytest.fixture
def saved(tmp_path: Path) -> datasets.Dataset:
    make_dataset().save_to_disk(str(tmp_path / "saved"), num_shards=3)
    return datasets.load_from_disk(str(tmp_path / "saved"))


def check(records: Any, numbers: list[int]) -> None:
    assert [record.captions[0] for record in records] == [f"caption {n}" for n in numbers]
    assert [record.group_id for record in records] == [str(n) for n in numbers]
    for record, number in zip(records, numbers, strict=True):
        assert record.image.read_bytes() == encode("images/red.png") + b" " * number


def test_images_stay_in_the_files_of_a_dataset(saved: datasets.Dataset) -> None:
    records = records_from_dataset(saved, columns=COLUMNS)
    check(records, list(range(20)))
    assert {type(record.image) for record in records} == {ArrowImage}
    assert len({record.image.file for record in records}) == 3  # type: ignore[union-attr]
    check(pickle.loads(pickle.dumps(records)), list(range(20)))


def test_a_shuffled_and_filtered_dataset_keeps_its_order(saved: datasets.Dataset) -> None:
    shuffled = saved.shuffle(seed=1)
    check(records_from_dataset(shuffled, columns=COLUMNS), list(shuffled["label"]))
    even = shuffled.filter(lambda row: row["label"] % 2 == 0)
    check(records_from_dataset(even, columns=COLUMNS), list(even["label"]))


def test_the_fields_of_records_need_no_names(tmp_path: Path) -> None:
    rows = [{**{k: line.get(k) for k in LINES[0]}, "image": {"bytes": encode(line["file_name"])}}
            for line in LINES]  # fmt: skip
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    records = records_from_dataset(datasets.load_from_disk(str(tmp_path / "saved")))
    assert [replace(record, image=None) for record in records] == RECORDS


def test_images_may_be_files_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    rows = [{"image": "images/red.png", "caption": "a"}]
    (record,) = records_from_dataset(datasets.Dataset.from_list(rows))
    assert record.path == Path("images/red.png")
    texts = datasets.Dataset.from_list([{"caption": "a", "group_id": "1"}])
    (record,) = records_from_dataset(texts, require_images=False)
    assert record.image is None


def number_image(number: int) -> bytes:
    """An image of the same size for every number below 100."""
    return encode("images/red.png") + b"%02d" % number


def make_numbered(count: int = 20) -> datasets.Dataset:
    """A dataset whose images differ by their content alone."""
    rows = {
        "img": [{"bytes": number_image(n), "path": None} for n in range(count)],
        "other": [{"bytes": number_image(50 + n), "path": None} for n in range(count)],
        "texts": [[f"caption {n}"] for n in range(count)],
    }
    dataset = datasets.Dataset.from_dict(rows)
    for name in ("img", "other"):
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def is_even(row: dict[str, Any]) -> bool:
    return int(row["texts"][0].split()[1]) % 2 == 0


CHANGES: dict[str, Callable[[datasets.Dataset], datasets.Dataset]] = {
    "part": lambda rows: rows.select(range(5, 15)),
    "part of a part": lambda rows: rows.select(range(5, 18)).select(range(4, 9)),
    "part of shuffled rows": lambda rows: rows.shuffle(seed=3).select(range(5, 15)),
    "rows by number": lambda rows: rows.select(range(3, 19)).select([9, 2]),
    "filter": lambda rows: rows.select(range(3, 19)).filter(is_even),
    "train_test_split": lambda rows: rows.train_test_split(test_size=6, seed=1)["test"],
    "split in order": lambda rows: rows.train_test_split(test_size=6, shuffle=False)["test"],
    "shard": lambda rows: rows.shard(num_shards=3, index=1, contiguous=True),
    "skip and take": lambda rows: rows.skip(7).take(6),
    "concatenated": lambda rows: datasets.concatenate_datasets(
        [rows.select(range(12, 17)), rows.select(range(2, 8))]
    ),
    "concatenated with order": lambda rows: datasets.concatenate_datasets(
        [rows.select([7, 1]), rows.select(range(12, 17))]
    ),
    "beside another column": lambda rows: rows.select(range(5, 15)).add_column(
        "group_id", [f"{n}" for n in range(10)]
    ),
    "without a column": lambda rows: rows.remove_columns("other").select(range(5, 15)),
    "swapped columns": lambda rows: (
        rows.rename_columns({"img": "x", "other": "img"})
        .rename_columns({"x": "other"})
        .select(range(5, 15))
    ),
    "columns in another order": lambda rows: rows.select_columns(["texts", "other", "img"]),
    "cast": lambda rows: rows.select(range(5, 15)).cast_column("img", datasets.Image()),
}


@pytest.mark.parametrize("num_shards", [1, 2, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_a_caption_keeps_its_image_whatever_was_done_to_the_dataset(
    tmp_path: Path, change: str, num_shards: int
) -> None:
    """The sizes of all images are equal, so that their rows alone make the difference."""
    make_numbered().save_to_disk(str(tmp_path / "saved"), num_shards=num_shards)
    changed = CHANGES[change](datasets.load_from_disk(str(tmp_path / "saved")))
    names = {"image": "img", "captions": "texts"}
    records = records_from_dataset(changed, columns=names)
    raw = changed.cast_column("img", datasets.Image(decode=False))
    wanted = [(row["texts"][0], row["img"]["bytes"]) for row in raw]
    assert len(records) == len(wanted) > 0
    found = [(record.captions[0], record.image.read_bytes()) for record in records]  # type: ignore[union-attr]
    assert found == wanted


def test_images_in_memory_are_refused(saved: datasets.Dataset) -> None:
    mixed = datasets.concatenate_datasets([saved, make_dataset()])
    mapped = saved.map(lambda row: {"label": row["label"] + 1}, keep_in_memory=True)
    for dataset in (make_dataset(), make_dataset().select(range(5, 9)), mixed, mapped):
        with pytest.raises(ValueError, match=r"in memory, or .* dataset\.save_to_disk"):
            records_from_dataset(dataset, columns=COLUMNS)


def test_a_transform_that_would_not_be_applied_is_refused(saved: datasets.Dataset) -> None:
    changed = saved.with_transform(lambda rows: {**rows, "texts": [["x"]] * len(rows["texts"])})
    with pytest.raises(ValueError, match=r"transform.*dataset\.map.*reset_format"):
        records_from_dataset(changed, columns=COLUMNS)
    check(records_from_dataset(changed.with_format(None), columns=COLUMNS), list(range(20)))


def test_errors_are_reported_at_once(saved: datasets.Dataset) -> None:
    with pytest.raises(ValueError, match=r"unknown field 'label': 20 \(dataset row 0, "):
        records_from_dataset(saved, columns={"image": "img", "captions": "texts", "label": "label"})
    with pytest.raises(ValueError, match="no column gone: 1"):
        records_from_dataset(saved, columns={"captions": "gone"})
    with pytest.raises(ValueError, match="For an IterableDataset use stream_dataset"):
        records_from_dataset(saved.to_iterable_dataset(), columns=COLUMNS)
    with pytest.raises(ValueError, match="For a Dataset use records_from_dataset"):
        stream_dataset(saved)  # type: ignore[arg-type]


def make_stream(dataset: datasets.Dataset) -> Any:
    iterable = dataset.to_iterable_dataset(num_shards=4)
    return stream_dataset(iterable, columns=COLUMNS, seed=2, buffer_size=5)


def test_a_stream_has_the_samples_of_its_dataset(saved: datasets.Dataset) -> None:
    streamed = sorted(make_stream(saved), key=lambda record: int(record.group_id))
    check(streamed, list(range(20)))
    assert len({record.name for record in streamed}) == 20


@pytest.mark.parametrize("stop", [0, 3, 11, 19])
def test_a_resumed_stream_is_the_uninterrupted_one(saved: datasets.Dataset, stop: int) -> None:
    wanted = list(make_stream(saved))
    stopped = make_stream(saved)
    iterator = iter(stopped)
    head = [next(iterator) for _ in range(stop)]
    resumed = make_stream(saved)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert head + list(resumed) == wanted


@pytest.mark.slow  # two processes
def test_workers_share_the_shards(saved: datasets.Dataset) -> None:
    loader = make_loader(make_stream(saved), batch_size=3, num_workers=2)
    found = sorted(int(record.group_id) for batch in loader for record in batch)
    assert found == list(range(20))


def interleave(rows: datasets.IterableDataset, **options: Any) -> datasets.IterableDataset:
    other = rows.map(lambda row: {"label": row["label"] + 50}, features=rows.features)
    return datasets.interleave_datasets([rows, other], **options)


def keep_first(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: values[:1] for name, values in batch.items()}


STREAMS: dict[str, Callable[[datasets.IterableDataset], datasets.IterableDataset]] = {
    "skip": lambda rows: rows.skip(7),
    "take": lambda rows: rows.take(7),
    "skip and take": lambda rows: rows.skip(3).take(9),
    "mapped": lambda rows: rows.take(7).map(lambda row: {"texts": [*row["texts"], "more"]}),
    "filtered": lambda rows: rows.filter(lambda row: row["label"] % 2 == 0),
    "filtered by number": lambda rows: rows.filter(lambda _, i: i < 5, with_indices=True),
    "mapped by number": lambda rows: rows.map(lambda _, i: {"label": i}, with_indices=True),
    "batches without the last": lambda rows: rows.map(
        lambda batch: batch, batched=True, batch_size=3, drop_last_batch=True
    ),
    "first of batches": lambda rows: rows.map(keep_first, batched=True, batch_size=3),
    "filtered in batches": lambda rows: rows.filter(
        lambda batch: [n == 0 for n in range(len(batch["label"]))], batched=True, batch_size=3
    ),
    "in batches": lambda rows: rows.batch(3).map(
        lambda batch: {name: values[0] for name, values in batch.items()}
    ),
    "batches of one": lambda rows: rows.map(keep_first, batched=True, batch_size=1),
    "concatenated": lambda rows: datasets.concatenate_datasets([rows.skip(15), rows.take(3)]),
    "interleaved": lambda rows: interleave(rows, stopping_strategy="first_exhausted"),
    "interleaved at random": lambda rows: interleave(rows, probabilities=[0.8, 0.2], seed=3),
    "of numpy": lambda rows: rows.with_format("numpy"),
    "of arrow": lambda rows: rows.with_format("arrow"),
    "untouched": lambda rows: rows.select_columns(["img", "texts", "label"]),
}


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("change", STREAMS)
def test_a_stream_has_the_samples_of_its_dataset_whatever_was_done_to_it(
    saved: datasets.Dataset, change: str, num_shards: int
) -> None:
    changed = STREAMS[change](saved.to_iterable_dataset(num_shards=num_shards))
    stream = stream_dataset(changed, columns=COLUMNS, seed=2, buffer_size=5)
    found = sorted(int(record.group_id) for record in stream)
    assert found == sorted(row["label"] for row in changed.with_format(None))
    is_split = change in ("filtered", "batches of one", "of numpy", "of arrow", "untouched")
    assert len(stream.reader.shards) == (num_shards if is_split else 1)


def test_a_stream_of_one_shard_is_resumed_and_says_why_workers_cannot_share_it(
    saved: datasets.Dataset,
) -> None:
    pytest.importorskip("torchdata")

    def make() -> Any:
        rows = saved.to_iterable_dataset(num_shards=4).skip(7)
        return stream_dataset(rows, columns=COLUMNS, seed=2, buffer_size=5)

    wanted, stopped = list(make()), make()
    iterator = iter(stopped)
    head = [next(iterator) for _ in range(6)]
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert head + list(resumed) == wanted
    with pytest.raises(ValueError, match=r"first shard is all of the dataset, because of its skip"):
        make_loader(make(), batch_size=2, num_workers=2)


def double(row: dict[str, Any], factor: int = 2) -> dict[str, Any]:
    return {"label": row["label"] * factor}


OTHERS: dict[str, Callable[[datasets.IterableDataset, int], datasets.IterableDataset]] = {
    "skip": lambda rows, n: rows.skip(n),
    "take": lambda rows, n: rows.take(n),
    "skip of numpy": lambda rows, n: rows.skip(np.int64(n)),
    "function": lambda rows, n: rows.map([double, keep_first][n]),
    "bound function": lambda rows, n: rows.map(partial(double, factor=n)),
    "arguments": lambda rows, n: rows.map(double, fn_kwargs={"factor": n}),
    "take below": lambda rows, n: rows.take(n).map(double),
    "seed": lambda rows, n: interleave(rows, probabilities=[0.8, 0.2], seed=n),
    "probabilities": lambda rows, n: interleave(
        rows, probabilities=[[0.8, 0.2], [0.5, 0.5]][n], seed=3
    ),
    "files": lambda _, n: datasets.IterableDataset.from_generator(
        generate_rows, gen_kwargs={"names": [f"{n}.txt"]}
    ),
    "set": lambda rows, n: rows.map(keep, fn_kwargs={"scale": [{"a", "b"}, {"a", "c"}][n]}),
    "range": lambda rows, n: rows.map(keep, fn_kwargs={"scale": range(n)}),
    "path": lambda rows, n: rows.map(keep, fn_kwargs={"scale": Path(f"{n}")}),
    "date": lambda rows, n: rows.map(keep, fn_kwargs={"scale": date(2020, 1, 1 + n)}),
    "moment": lambda rows, n: rows.map(
        keep, fn_kwargs={"scale": np.datetime64(f"2020-01-0{1 + n}")}
    ),
    "random state": lambda rows, n: rows.map(keep, fn_kwargs={"scale": np.random.RandomState(n)}),
    "masked": lambda rows, n: rows.map(
        keep, fn_kwargs={"scale": np.ma.masked_array([1, 2], [bool(n), False])}
    ),
    "dtype": lambda rows, n: rows.map(keep, fn_kwargs={"scale": [torch.float16, torch.float32][n]}),
    "pattern": lambda rows, n: rows.map(keep, fn_kwargs={"scale": re.compile(f"a{n}")}),
    "generator": lambda _, n: datasets.IterableDataset.from_generator(
        [generate_rows, generate_others][n], gen_kwargs={"names": ["0.txt"]}
    ),
    "array": lambda rows, n: rows.map(
        keep, fn_kwargs={"scale": np.ones([(2, 1), (1, 2)][n], np.float32)}
    ),
}


def generate_others(names: list[str]) -> Iterator[dict[str, Any]]:
    yield from reversed(list(generate_rows(names)))


def generate_rows(names: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the same rows whatever the files are."""
    for number in range(len(names) * 9):
        yield {"label": number, "texts": [f"caption {number}"]}


def test_rows_that_come_only_once_are_all_streamed() -> None:
    once = iter([{"label": number, "texts": [f"caption {number}"]} for number in range(6)])

    def yield_rest() -> Iterator[dict[str, Any]]:
        yield from once

    dataset = datasets.IterableDataset.from_generator(yield_rest)
    columns = {"captions": "texts", "group_id": "label"}
    assert len(list(stream_dataset(dataset, columns=columns, require_images=False))) == 6


TENSORS: dict[str, Callable[[float], torch.Tensor]] = {
    "bfloat16": lambda value: torch.full((2,), value, dtype=torch.bfloat16),
    "float8": lambda value: torch.full((2,), value).to(torch.float8_e4m3fn),
    "sparse": lambda value: (torch.eye(2) * value).to_sparse(),
    "with a gradient": lambda value: torch.full((2,), value, requires_grad=True),
    "conjugate": lambda value: torch.full((2,), value * 1j).conj(),
    "of no dimension": torch.tensor,
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_numpy_cannot_hold_count_by_their_values(
    kind: str, saved: datasets.Dataset
) -> None:
    rows = saved.to_iterable_dataset(num_shards=4)
    one, same, other = (
        rows.map(keep, fn_kwargs={"scale": TENSORS[kind](value)}) for value in (1.0, 1.0, 2.0)
    )
    assert resume_other(one, same)
    with pytest.raises(ValueError, match="of another stream: shards differ"):
        resume_other(one, other)


def keep(row: dict[str, Any], scale: Any) -> dict[str, Any]:  # noqa: ARG001
    return row


def resume_other(
    first: datasets.IterableDataset, second: datasets.IterableDataset
) -> list[CaptionedImage]:
    """Stop a stream of a dataset, and go on with that of another."""
    columns = {"captions": "texts", "group_id": "label"}
    stopped = stream_dataset(first, columns=columns, require_images=False)
    next(iter(stopped))
    resumed = stream_dataset(second, columns=columns, require_images=False)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    return list(resumed)


def test_the_state_of_other_columns_is_refused(saved: datasets.Dataset) -> None:
    rows = saved.to_iterable_dataset(num_shards=4)
    one, other = (
        stream_dataset(rows, columns=columns, require_images=False)
        for columns in (COLUMNS, {**COLUMNS, "lang": "language"})
    )
    next(iter(one))
    with pytest.raises(ValueError, match="of another stream: shards differ"):
        other.load_state_dict(one.state_dict())
        list(other)


def test_the_state_of_another_dataset_is_refused(saved: datasets.Dataset) -> None:
    rows = saved.to_iterable_dataset(num_shards=4)
    assert resume_other(rows, saved.to_iterable_dataset(num_shards=4))
    others = {
        "other rows": saved.map(lambda row: {"texts": [*row["texts"], "more"]}),
        "more rows": datasets.concatenate_datasets([saved, saved.select([1, 2, 3, 4])]),
    }
    for other in others.values():
        with pytest.raises(ValueError, match="of another stream: shards differ"):
            resume_other(rows, other.to_iterable_dataset(num_shards=4))


@pytest.mark.parametrize("step", OTHERS)
def test_the_state_of_other_steps_is_refused(saved: datasets.Dataset, step: str) -> None:
    # Of no row there would be no state.
    numbers = (5, 5, 6) if "take" in step else (0, 0, 1)
    one, same, other = (
        OTHERS[step](saved.to_iterable_dataset(num_shards=4), number) for number in numbers
    )
    assert list(same)  # which changes no step
    assert resume_other(one, same)
    with pytest.raises(ValueError, match="of another stream: shards differ"):
        resume_other(one, other)


def test_the_state_of_another_random_order_is_refused(saved: datasets.Dataset) -> None:
    rows = saved.to_iterable_dataset(num_shards=4)
    one, other = (interleave(rows, probabilities=[0.8, 0.2]) for _ in range(2))  # without a seed
    with pytest.raises(ValueError, match="of another stream: shards differ"):
        resume_other(one, other)


@pytest.mark.slow  # two processes that import datasets
@pytest.mark.usefixtures("saved")
def test_a_dataset_has_one_name_in_all_processes(tmp_path: Path) -> None:
    code = f"""
import datasets
from modeling_llm2clip.data.streams.dataset_streams import stream_dataset
rows = datasets.load_from_disk({str(tmp_path / "saved")!r}).to_iterable_dataset(num_shards=2)
rows = rows.filter(lambda row: {{"a", "b", "c"}}).rename_column("texts", "captions").skip(3)
print(stream_dataset(rows).reader.shards)
"""
    printed = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "12"
    ]  # fmt: skip
    assert printed[0] == printed[1] and "because of its skip" in printed[0]


def test_a_stream_that_is_split_by_node_is_refused(saved: datasets.Dataset) -> None:
    from datasets.distributed import split_dataset_by_node

    rows = split_dataset_by_node(saved.to_iterable_dataset(num_shards=4), rank=1, world_size=2)
    with pytest.raises(ValueError, match="without split_dataset_by_node"):
        stream_dataset(rows, columns=COLUMNS)


def test_a_stream_that_is_shuffled_already_is_refused(saved: datasets.Dataset) -> None:
    rows = saved.to_iterable_dataset(num_shards=4)
    for shuffled in (rows.shuffle(), rows.shuffle(seed=1, buffer_size=2).map(lambda row: row)):
        with pytest.raises(ValueError, match=r"without shuffle\(\); seed and buffer_size"):
            stream_dataset(shuffled, columns=COLUMNS)


FORMATS = [None, "numpy", "torch", "arrow"]


@pytest.mark.parametrize("kind", FORMATS)
def test_the_format_before_map_changes_no_sample(kind: str | None) -> None:
    rows = [{"image": f"{n}.png", "captions": [f"a {n}", "b"], "lang": "de"} for n in range(5)]
    plain = datasets.Dataset.from_list(rows).to_iterable_dataset()
    changed = plain.with_format(kind).map(lambda row: row)
    found, wanted = (list(stream_dataset(d, require_images=False)) for d in (changed, plain))
    assert len(found) == 5 and found == wanted
    assert {type(text) for record in found for text in (record.name, *record.captions)} == {str}


@pytest.mark.parametrize("kind", FORMATS[:3])
def test_images_that_map_decoded_are_refused_by_name(
    saved: datasets.Dataset, kind: str | None
) -> None:
    images = saved.cast_column("img", datasets.Image())
    decoded = images.to_iterable_dataset().with_format(kind).map(lambda row: row)
    if kind is None and Version(datasets.__version__) < Version("4"):
        pytest.skip("datasets 3.2 encodes anew what map returned; versions between were not tried")
    with pytest.raises(ValueError, match=r"row 0: the image is a .*decoded.*decode=False"):
        list(stream_dataset(decoded, columns=COLUMNS))
