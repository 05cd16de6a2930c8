"""The measures of streams read what they say they read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # a process that serves the shards
def test_small_measures_have_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "scale_streams", raising=False)
    import scale_streams

    parquet = scale_streams.measure_parquet_images(
        tmp_path, num_files=10, image_bytes=500, num_reads=20
    )
    assert set(parquet) == set(scale_streams.LAYOUTS)
    streams = scale_streams.measure_streams(tmp_path, num_shards=3, shard_size=4)
    assert streams.pop("images") == 12 and len(streams) == 4
    numbers = [number for row in parquet.values() for number in row.values()]
    assert all(number > 0 for number in (*numbers, *streams.values()))
