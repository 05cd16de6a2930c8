"""The measurement of the store runs, and its synthetic store is one that opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.scale import scale_store
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
    assert store.rows_at(np.array([80_000, 70_000]), np.array([2, 4])).tolist() == [
        400_002,
        350_004,
    ]
    with pytest.raises(ValueError, match="damaged file"):  # sparse files hold no embeddings
        store.read([0])
