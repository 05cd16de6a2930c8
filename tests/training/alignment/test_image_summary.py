"""An aligned model's folder says which images it was trained on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aligning import Prepared, Run, prepare, weights_of, write_color_data
from launches import run_python
from tiny import draw_noise

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.doctor.model_report import Check
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.encoding.encode import encode_images
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.model_folders.training_images import (
    TRAINING_IMAGES_FILE,
    ImageTally,
    TrainingImages,
    read_training_images,
    write_training_images,
)
from modeling_llm2clip.publishing.export_model import export_model
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.alignment.image_summary import count_images, sample_images

# Without noise, which the number of processes decides.
FEW_STEPS: dict[str, Any] = {
    "max_steps": 4, "global_batch_size": 16, "eval_steps": 2, "image_noise": 0, "caption_noise": 0,
    "projection_init": "model",
}  # fmt: skip


@pytest.fixture(scope="module")
def colored(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """80 images of colored squares, in groups of one, and their stores."""
    return prepare(tmp_path_factory.mktemp("colored"), num_colored=80)


@pytest.fixture(scope="module")
def aligned(colored: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return colored.align_stored(tmp_path_factory.mktemp("aligned") / "run", **FEW_STEPS)


def read_bytes(folder: Path) -> bytes:
    return (folder / TRAINING_IMAGES_FILE).read_bytes()


def read_summary(folder: Path) -> TrainingImages:
    summary = read_training_images(folder)
    assert summary is not None
    return summary


def tally_images(folder: Path, images: list[Any]) -> ImageTally:
    tally = ImageTally()
    model, processor = load_model(folder, device="cpu")
    assert hasattr(model, "vision_model")
    encode_images(model, processor, images, on_batch=lambda _, embeds: tally.add(embeds))
    return tally


@pytest.mark.slow
def test_images_like_those_of_the_alignment_are_near(aligned: Run, tmp_path: Path) -> None:
    summary = read_summary(aligned.model)
    assert aligned.results["training_images"] == {
        "name": "unnamed data", "num_images": 80, "num_measured": 80,
    }  # fmt: skip
    # Half of them are those of the alignment.
    files = sorted(write_color_data(tmp_path / "like", count=160).glob("*.png"))[80:]
    like = tally_images(aligned.model, files)
    assert summary.describe_far(like) is None
    # A tower with random weights may see little in images; these embeddings point elsewhere.
    assert summary.describe_far(ImageTally(like.num_images, -like.total)) is not None


@pytest.mark.slow
def test_the_summary_ignores_the_order(colored: Prepared, aligned: Run, tmp_path: Path) -> None:
    """Stores are read by name, so that every embedding is the same, bit for bit."""
    run = colored.align_stored(tmp_path / "run", records=colored.records[::-1], **FEW_STEPS)
    assert read_bytes(run.model) == read_bytes(aligned.model)


@pytest.mark.slow
def test_a_resumed_run_writes_the_summary(colored: Prepared, aligned: Run, tmp_path: Path) -> None:
    folder = aligned.copy_without_model(tmp_path / "run")
    resumed = colored.align_stored(folder, resume=True, **FEW_STEPS)
    assert read_bytes(resumed.model) == read_bytes(aligned.model)
    assert resumed.results["training_images"] == aligned.results["training_images"]


TWO_PROCESSES = f"""
import sys
from modeling_llm2clip import align, load_records
from modeling_llm2clip.configs.align_config import AlignConfig

if __name__ == "__main__":
    model, data, output, captions, images = sys.argv[1:]
    align(
        model, load_records(data), output, AlignConfig(**{FEW_STEPS!r}),
        caption_store=captions, image_store=images, data_name="data",
    )
"""


@pytest.mark.slow
def test_two_processes_fit_all_images_and_write_the_summary_as_one_does(
    colored: Prepared, aligned: Run, tmp_path: Path
) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    stores = colored.captions, colored.images
    run_python(script, colored.model, colored.data, tmp_path / "two", *stores, processes=2)
    run = Run(tmp_path / "two")
    (two,), (one,) = (read_summary(folder).datasets for folder in (run.model, aligned.model))
    assert two.name == "data"
    assert two.clusters.equal(one.clusters)
    assert two.spread == one.spread
    assert run.best_step == aligned.best_step > 0
    assert run.results["refit"] == aligned.results["refit"]
    shares = [each.results["held_out"]["best_share"] for each in (run, aligned)]
    assert shares[0] == shares[1]
    expected = weights_of(aligned.model)
    for name, value in weights_of(run.model).items():
        # Adam divides by gradients, which differ by the order of sums.
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_export_keeps_the_summary_and_the_doctor_reads_it(aligned: Run, tmp_path: Path) -> None:
    folder = export_model(aligned.model, tmp_path / "exported")
    assert read_bytes(folder) == read_bytes(aligned.model)

    def check() -> Check:
        checks = check_model(folder, device="cpu").checks
        (result,) = [check for check in checks if "images" in check.name]
        return result

    known = check()
    assert known.passed and known.message == "unnamed data (80 images)"
    (dataset,) = read_summary(folder).datasets
    wider = replace(dataset, clusters=torch.zeros(3, 1 + dataset.clusters.shape[1]))
    write_training_images(folder, TrainingImages((wider,)))
    refused = check()
    assert not refused.passed and "Delete the file" in refused.message
    (folder / TRAINING_IMAGES_FILE).unlink()
    assert check_model(folder, device="cpu").healthy  # there need not be one


@pytest.mark.slow
def test_an_alignment_of_an_aligned_model_adds_its_data(aligned: Run, tmp_path: Path) -> None:
    noise = [draw_noise(32, 32, seed=seed) for seed in range(100)]
    records = []
    for number, image in enumerate(noise[:60]):
        image.save(file := tmp_path / f"{number}.png")
        records.append(CaptionedImage(file, file.name, file.name, (f"noise {number}",)))
    config = ExtractConfig(store_dtype="float32", device="cpu", show_progress=False)
    stores = {
        name: extract(aligned.model, records, tmp_path / name, config, modality=modality)
        for name, modality in (("caption_store", "text"), ("image_store", "image"))
    }
    align(
        aligned.model, records, tmp_path / "again", AlignConfig(device="cpu", **FEW_STEPS),
        data_name="noise", **stores,
    )  # fmt: skip
    summary = read_summary(tmp_path / "again" / "model")
    first, second = summary.datasets
    (known,) = read_summary(aligned.model).datasets
    assert first.clusters.equal(known.clusters)
    assert (first.name, second.name) == ("unnamed data", "noise")
    assert summary.describe_far(tally_images(aligned.model, noise[60:])) is None


@pytest.mark.slow
def test_a_trained_tower_is_summarized_by_its_new_weights(
    colored: Prepared, aligned: Run, tmp_path: Path
) -> None:
    """And the summary names the data that came before."""
    run = replace(colored, model=aligned.model).align(
        tmp_path / "run", vision_training="full", **FEW_STEPS
    )
    summary = read_summary(run.model)
    assert summary.not_summarized == ("unnamed data",)
    (dataset,) = summary.datasets
    assert not dataset.clusters.equal(read_summary(aligned.model).datasets[0].clusters)
    images = sorted(colored.data.glob("*.png"))
    assert summary.describe_far(tally_images(run.model, images)) is None


@pytest.mark.slow
def test_a_damaged_summary_is_refused(colored: Prepared, aligned: Run, tmp_path: Path) -> None:
    model = Path(shutil.copytree(aligned.model, tmp_path / "model"))
    content = read_bytes(model)
    (model / TRAINING_IMAGES_FILE).write_bytes(content[:-5])
    damaged = replace(colored, model=model)
    with pytest.raises(ValueError, match=r"training_images.safetensors is damaged"):
        damaged.align_stored(tmp_path / "run", **FEW_STEPS)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_too_few_images_are_not_summarized(finished: Run) -> None:
    assert finished.results["training_images"] is None
    assert not (finished.model / TRAINING_IMAGES_FILE).exists()


def test_a_sample_has_each_image_once_and_the_same_ones_in_any_order() -> None:
    records = [
        CaptionedImage(
            name=f"{number}", group_id=f"{number}", image=None, captions=("a thing",), lang=lang
        )
        for number in range(300)
        for lang in ("en", "de")
    ]
    table = RecordTable.from_records(records)
    chosen = [records[item].name for item in sample_images(table, 50).tolist()]
    assert len(set(chosen)) == 50 and count_images(table) == 300
    order = np.random.default_rng(0).permutation(len(records)).tolist()
    mixed = [records[place] for place in order]
    again = sample_images(RecordTable.from_records(mixed), 50).tolist()
    assert [mixed[item].name for item in again] == chosen
    assert len(sample_images(table, 1000)) == 300
