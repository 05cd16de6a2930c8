"""Result files are whole, of one format, and identify their data."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from modeling_llm2clip.data.images.image_sources import ParquetImage
from modeling_llm2clip.data.remote.file_locations import describe_states
from modeling_llm2clip.data.sealed_manifest import write_sealed
from modeling_llm2clip.evaluation.datasets.dataset_registry import load_dataset
from modeling_llm2clip.evaluation.datasets.retrieval_dataset import RetrievalDataset
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.results import (
    find_differences,
    hash_dataset,
    read_evaluation_results,
    read_result,
)

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_first_difference_of_two_long_values_is_shown() -> None:
    names = [f"class {number}" for number in range(1000)]
    (difference,) = find_differences(
        {"names": names}, {"names": [*names[:500], "other", *names[501:]]}
    )
    was, now_is = difference.removeprefix("names was ").split(" and is ")
    assert was.startswith("…") and "'class 500'" in was and was.endswith("…")
    assert "'other'" in now_is and len(difference) < 160


def test_another_image_in_a_row_of_a_parquet_file_is_another_dataset(tmp_path: Path) -> None:
    def write(color: str) -> Any:
        encoded = io.BytesIO()
        Image.new("RGB", (8, 8), color).save(encoded, "PNG")
        rows = {"image": [{"bytes": encoded.getvalue(), "path": None}], "caption": ["a color"]}
        file = tmp_path / color / "data.parquet"
        file.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows).to_parquet(file)
        describe_states([file])  # as whoever reads the records of a file does
        own = Correspondence.from_image_of_text([0], 1)
        image = ParquetImage(file, "image", 0)
        return RetrievalDataset(
            name="tiny", images=(image,), image_names=("0",), captions=("a color",),
            correspondence=own, lang="en",
        )  # fmt: skip

    assert hash_dataset(write("red")) == hash_dataset(write("red")) != hash_dataset(write("blue"))


def test_other_captions_or_images_of_the_same_size_are_another_dataset(tmp_path: Path) -> None:
    file, image = tmp_path / "captions.jsonl", tmp_path / "0.bmp"
    hashes = []
    for caption, color in (("a dog", "red"), ("a cat", "red"), ("a dog", "blue"), ("a dog", "red")):
        line = {"image": image.name, "captions": [caption]}
        file.write_text(json.dumps(line), encoding="utf-8")
        Image.new("RGB", (32, 32), color).save(image)  # of the same size without packing
        hashes.append(hash_dataset(load_dataset(tmp_path)))
    assert len(set(hashes)) == 3 and hashes[0] == hashes[3]


def test_a_damaged_result_or_one_of_another_format_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    for text, message in (
        (
            write_sealed({"format_version": 7}),
            r"format_version 7, but this version reads 1.*another fold",
        ),
        ("{", r"result\.json is not an evaluation result"),
        (write_sealed({}), "not an evaluation result"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_result(file)
    with pytest.raises(ValueError, match=r"has no results"):
        read_evaluation_results(tmp_path)


@pytest.mark.slow
def test_the_digests_of_the_emoji_are_the_recorded_ones() -> None:
    recorded = json.loads((RESULTS / "evaluation.json").read_text(encoding="utf-8"))
    [row] = [r for r in recorded["results"] if (r["model"], r["task"]) == ("ours", "cross-lingual")]
    for lang, data in row["protocol"]["data"]["languages"].items():
        assert hash_dataset(load_dataset("emoji", lang=lang)) == data["digest"]
