"""The measures of scale read what they say they read, and the synthetic store opens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from benchmarks.scale import scale_paper, scale_plan, scale_stages, scale_store, scale_streams
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore


def test_every_format_reads_the_same_rows_and_is_measured(tmp_path: Path) -> None:
    scale_store.write_store(tmp_path / "store", 10_000, 16)
    readers = dict(scale_store._open_readers(tmp_path, 10_000, 16))
    rows = np.random.default_rng(0).integers(0, 10_000, 50)
    for chosen in (rows, np.arange(100, 200)):
        found = {name: read(chosen) for name, read in readers.items()}
        assert {"store", "numpy", "arrow"} <= set(found)
        for read in found.values():
            assert np.array_equal(read, found["store"])
    result = scale_store.measure_reading(tmp_path / "again", num_rows=5000, dim=16, rounds=2)
    assert result["random"]["rows_vs_numpy"] > 0 < result["sequential"]["rows_vs_numpy"]


def test_the_synthetic_store_has_its_items(tmp_path: Path) -> None:
    result = scale_store.measure_opening(tmp_path / "store", num_rows=400_003, dim=4)
    assert (result["items"], result["rows"]) == (80_001, 400_003)
    store = EmbeddingStore.open(tmp_path / "store")
    rows = store.rows_at(np.array([80_000, 70_000]), np.array([2, 4]))
    assert rows.tolist() == [400_002, 350_004]
    with pytest.raises(ValueError, match="damaged file"):  # sparse files hold no embeddings
        store.read([0])


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


@pytest.mark.usefixtures("own_cache")
def test_every_recipe_of_the_paper_is_planned_in_two_seconds_and_a_gigabyte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "replaced")  # restored afterwards
    scale_stages.prepare_recipes(tmp_path, 5000)
    small = scale_stages.plan_recipes(tmp_path, 5000)
    files = scale_stages.list_recipes()
    assert list(small["cpu_seconds_of"]) == [file.stem for file in files] and len(files) > 10
    assert not (tmp_path / "runs").exists()
    recorded = json.loads(scale_paper.OUTPUT.with_name("scale.json").read_text("utf-8"))["recipes"]
    large = recorded["counts"][-1]
    assert small["cpu_seconds_of"].keys() == large["cpu_seconds_of"].keys()
    assert large["records"] == 1_000_000 and 0 < large["cpu_seconds"] < 2
    assert 0 < large["resident_mb"] < 1000
    assert recorded["bytes_per_record"]["resident_mb"] < 1000


def test_the_recorded_plan_follows_from_the_recorded_measurements() -> None:
    recorded = json.loads(scale_paper.OUTPUT.with_name("scale.json").read_text("utf-8"))
    assert recorded["plan"] == scale_plan.plan(recorded)


def test_the_recorded_hours_of_the_paper_are_those_of_its_recipes() -> None:
    recorded = json.loads(scale_paper.OUTPUT.read_text("utf-8"))["rows"]
    assert recorded == scale_paper.plan_runs()
    # Hand-computed: 4 epochs of 12.9M images at 230 per second, 10,000 steps of 8 x 64 pairs of
    # 140 tokens at 8,700 per second, and 140 tokens per image at 39,000.
    run = recorded["openai-l14-336-15m"]
    assert run["gpu_hours"] == {"finetune": 22.9, "extract": 12.8, "align": 62.2}
    assert run["hours"] == round((22.9 + 12.8 + 62.2) / 8, 1)
    # Two captions of 4,096 float16 numbers and a checksum.
    assert run["caption_store_gb"] == round(12_873_763 * 2 * (8192 + 8) / 1e9)
