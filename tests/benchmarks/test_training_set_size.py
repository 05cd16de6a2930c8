"""Parts of a dataset are split by what is shown, and their stores are those of an extraction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.accuracy import training_set_size
from benchmarks.tables.training_tables import TRAINING_TABLES
from modeling_llm2clip import EmbeddingStore, align, extract
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import Modality


@pytest.mark.slow
def test_the_store_of_a_part_is_that_of_its_extraction_and_is_trained_on(
    prepared: Any, tmp_path: Path
) -> None:
    records = RecordTable.from_records(prepared.records)
    rows = np.arange(1, len(records), 2)
    part = records.select(rows)
    copies = {}
    exact = ExtractConfig(store_dtype="float32", device="cpu", show_progress=False)
    sources: dict[Modality, EmbeddingStore]
    sources = {"text": prepared.caption_store, "image": prepared.image_store}
    for modality, store in sources.items():
        folder = tmp_path / f"part-{modality}"
        copies[modality] = training_set_size.copy_rows(store, rows, part, folder)
        copy = EmbeddingStore.open(copies[modality], check="full")
        again = tmp_path / f"wanted-{modality}"
        wanted = EmbeddingStore.open(extract(prepared.model, part, again, exact, modality=modality))
        assert list(copy.names) == list(wanted.names) == [record.name for record in part]
        numbers = range(copy.manifest.num_rows)
        # Other batches round otherwise in float32.
        assert torch.allclose(copy.read(numbers), wanted.read(numbers), atol=1e-5)
    config = AlignConfig(max_steps=2, device="cpu", held_out_ratio=0.0)
    folder = align(
        prepared.model, part, tmp_path / "aligned", config,
        caption_store=copies["text"], image_store=copies["image"],
    )  # fmt: skip
    assert (folder / "config.json").is_file()


def test_no_thing_is_on_both_sides_and_splits_differ(prepared: Any) -> None:
    records = RecordTable.from_records(prepared.records)
    group_ids = [record.group_id for record in records]
    splits = [training_set_size.split_things(records, seed=seed) for seed in (0, 1)]
    for test, training in splits:
        chosen = [group_ids[number] for number in [*test, *training]]
        assert len(test) == len(set(group_ids)) // 5
        assert sorted(chosen) == sorted(set(group_ids))
    assert splits[0] != splits[1]


def test_a_row_has_mean_and_range_and_a_dash_where_there_were_too_few_images() -> None:
    def make_run(split: int, num_images: int, r1: float) -> dict[str, Any]:
        return {"split": split, "num_images": num_images, "r1": r1}

    few = [make_run(0, 100, 0.2), make_run(1, 100, 0.3)]
    report = {
        "hardware": "a machine", "commit": "abc",
        "datasets": {
            "few": {"num_test_images": 20, "chance_r1": 0.05, "runs": few},
            "many": {"num_test_images": 50, "chance_r1": 0.02,
                     "runs": [make_run(0, 100, 0.1), make_run(0, 200, 0.4)]},
        },
    }  # fmt: skip
    shown = TRAINING_TABLES["training_set_size"](report)
    assert "| 100 | 25.0 % (20.0 to 30.0) | 10.0 % |" in shown
    assert "| 200 | – | 40.0 % |" in shown
    assert "| chance | 5.0 % | 2.0 % |" in shown and "20 few, 50 many" in shown
    assert "Splits: 2; mean, lowest and highest. a machine" in shown
    report["datasets"]["few"]["runs"] = few[:1]
    assert "Splits: 1. a machine" in TRAINING_TABLES["training_set_size"](report)
