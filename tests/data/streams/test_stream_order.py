"""Laws of the order of a stream, over any shards, readers and places to stop."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_llm2clip.data.images.image_sources import EncodedImage
from modeling_llm2clip.data.records.records import RawRecord
from modeling_llm2clip.data.sources.shard_streams import BrokenShardError, StreamedSample
from modeling_llm2clip.data.streams.record_streams import RecordStream
from modeling_llm2clip.data.streams.stream_run import ShardReader, TooManyLostError

GOOD, BROKEN, SKIPPED, END = range(4)


@dataclass
class ListedShards(ShardReader):
    """Shards in memory: of each sample what it is; `END` ends a shard early."""

    content: list[list[int]]

    def __post_init__(self) -> None:
        self.shards = [f"shard {number}" for number in range(len(self.content))]

    def read(
        self,
        shard: int,
        first: int,
        on_retry: Callable[[str, str], None],
        position: Any = None,  # noqa: ARG002
    ) -> Iterator[StreamedSample]:
        assert callable(on_retry)
        for number, kind in enumerate(self.content[shard]):
            if kind == END:
                raise BrokenShardError("cut")
            if number < first:
                continue
            place = f"{shard}/{number}"
            image = EncodedImage(place, place.encode())
            raw = RawRecord(place, {"caption": place}, packed=image, default_name=place)
            if kind == GOOD:
                yield StreamedSample(number, place, raw)
            else:
                yield StreamedSample(number, place, None, "bad", is_skipped=kind == SKIPPED)

    def list_good(self) -> list[str]:
        found = []
        for shard, kinds in enumerate(self.content):
            there = kinds[: kinds.index(END)] if END in kinds else kinds
            found += [f"{shard}/{number}" for number, kind in enumerate(there) if kind == GOOD]
        return found


KINDS = st.sampled_from([GOOD] * 12 + [BROKEN, SKIPPED, END])
CONTENT = st.lists(st.lists(KINDS, max_size=12), min_size=4, max_size=9)
BUFFERS = st.integers(1, 20)


def make_stream(content: list[list[int]], **options: Any) -> RecordStream:
    return RecordStream(ListedShards(content), max_lost_share=1, **options)


@settings(max_examples=80)
@given(CONTENT, BUFFERS, st.integers(1, 4), st.integers(0, 3))
def test_readers_see_each_sample_once(
    content: list[list[int]], buffer_size: int, num_processes: int, epoch: int
) -> None:
    found: Counter[str] = Counter()
    lost = shards = 0
    for process in range(num_processes):
        stream = make_stream(
            content, buffer_size=buffer_size, process_index=process, num_processes=num_processes
        )
        stream.set_epoch(epoch)
        found.update(record.name for record in stream)
        lost += stream.report.lost_samples
        shards += stream.report.shards + stream.report.lost_shards
    assert found == Counter(ListedShards(content).list_good())
    assert shards == len(content)
    ended = [kinds[: kinds.index(END)] if END in kinds else kinds for kinds in content]
    assert lost == sum(kinds.count(BROKEN) for kinds in ended)


@settings(max_examples=80)
@given(CONTENT, BUFFERS, st.lists(st.integers(0, 20), max_size=8))
def test_a_stream_that_is_stopped_repeatedly_equals_an_uninterrupted_one(
    content: list[list[int]], buffer_size: int, stops: list[int]
) -> None:
    whole = make_stream(content, buffer_size=buffer_size, seed=7)
    expected = list(whole)
    found: list[Any] = []
    state: dict[str, Any] = {}
    for stop in (*stops, None):
        stream = make_stream(content, buffer_size=buffer_size, seed=7)
        stream.load_state_dict(json.loads(json.dumps(state)))
        found += islice(stream, stop)
        state = stream.state_dict()
    assert found == expected
    assert stream.report == whole.report


def list_readers(content: list[list[int]], num_readers: int, **options: Any) -> list[RecordStream]:
    """The parts of several readers, as processes have them."""
    return [
        RecordStream(
            ListedShards(content), process_index=number, num_processes=num_readers, **options
        )
        for number in range(num_readers)
    ]


@pytest.mark.parametrize("num_lost", [9, 11, 80])
@pytest.mark.parametrize("num_readers", [1, 2, 5, 10, 50])
def test_the_share_of_lost_shards_holds_however_many_read(num_lost: int, num_readers: int) -> None:
    """With a share of 0.1, a run either stops or has lost at most 10 of 100 shards."""
    content = [[GOOD]] * (100 - num_lost) + [[END]] * num_lost
    for seed in range(3):
        lost, stopped = 0, 0
        for stream in list_readers(content, num_readers, seed=seed, max_lost_share=0.1):
            try:
                list(stream)
            except TooManyLostError as error:
                assert f"of {100 // num_readers} shards that this worker reads" in str(error)
                stopped += 1
            lost += stream.report.lost_shards
        assert stopped or lost == num_lost <= 10
        assert stopped == (num_lost > 10) or num_readers > 1


@pytest.mark.parametrize("num_readers", [1, 10])
def test_the_share_of_lost_samples_holds_however_many_read(num_readers: int) -> None:
    """Of 200 samples 20 are lost: as many as 2 % of 1,000, which one reader or ten may lose."""
    content = [[BROKEN, BROKEN, *[GOOD] * 18]] * 10
    for stream in list_readers(content, num_readers, max_lost_share=0.02):
        assert len(list(stream)) == 180 // num_readers
    for stream in list_readers(content, num_readers, max_lost_share=0.019):
        with pytest.raises(TooManyLostError, match=r"lost \d+ samples"):
            list(stream)
