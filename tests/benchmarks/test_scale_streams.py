"""The measures of streams read what they say they read."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scale import scale_streams


@pytest.mark.slow  # a process that serves the shards
def test_small_measures_have_every_number(tmp_path: Path) -> None:
    parquet = scale_streams.measure_parquet_images(
        tmp_path, num_files=10, image_bytes=500, num_reads=20
    )
    assert set(parquet) == set(scale_streams.LAYOUTS)
    streams = scale_streams.measure_streams(tmp_path, num_shards=3, shard_size=4)
    assert streams.pop("images") == 12 and len(streams) == 4
    numbers = [number for row in parquet.values() for number in row.values()]
    assert all(number > 0 for number in (*numbers, *streams.values()))
