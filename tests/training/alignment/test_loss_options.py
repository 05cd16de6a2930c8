"""Stage 3, the options of losses: what they promise holds after a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from aligning import COLORS, SHORT_RUN, Prepared, Run, prepare, read_losses
from labeled_colors import write_classes
from tiny_encoders import save_tiny_images

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.evaluation_config import EvaluationConfig
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.evaluation.datasets.dataset_registry import find_dataset
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.model_folders.model_card import read_card_data
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPVisionModel
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.alignment.alignment_report import describe_alignment
from modeling_llm2clip.training.alignment.held_out import (
    ZeroShotImages,
    find_interval,
    load_labeled_images,
)


@pytest.fixture(scope="module")
def colored(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("colored"), num_colored=60, trained=False)


FULL = {"vision_training": "full", "layer_decay": 1.0, "vision_learning_rate": 1e-3}


def align_tower(
    prepared: Prepared, output: Path, *, is_teacher_stored: bool = True, **options: Any
) -> Run:
    config = AlignConfig(**{**SHORT_RUN, **FULL, **options})
    align(
        prepared.model, prepared.records, output, config, caption_store=prepared.caption_store,
        image_store=(
            prepared.image_store if config.distillation_weight and is_teacher_stored else None
        ),
    )  # fmt: skip
    return Run(output)


def move_tower(prepared: Prepared, folder: Path) -> float:
    """How far the tower's embeddings are from those before the training, at unit length."""
    model = LLM2CLIPVisionModel.from_pretrained(folder).eval()
    images = [record.image for record in prepared.records]
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    now = encode_images(model, processor, images, project=False)
    before = prepared.image_store.read(
        prepared.image_store.rows_at(range(len(images)), [0] * len(images))
    )
    return float((F.normalize(now, dim=-1) - F.normalize(before, dim=-1)).norm(dim=1).mean())


@pytest.mark.slow
def test_self_distillation_keeps_a_trained_tower_near_its_frozen_self(
    prepared: Prepared, tmp_path: Path
) -> None:
    moved = {}
    for weight in (0.0, 1.0, 100.0):
        run = align_tower(
            prepared, tmp_path / f"{weight}", distillation_weight=weight, max_steps=12
        )
        moved[weight] = move_tower(prepared, run.model)
        # Before the first step the tower is its frozen self, and the term is 0: the store has the
        # same pixels in float32, encoded in other batches.
        assert read_losses(run.output)[1] == pytest.approx(
            read_losses(tmp_path / "0.0")[1], abs=1e-4
        )
    assert moved[100.0] < moved[1.0] < moved[0.0]
    assert moved[100.0] < moved[0.0] / 2


@pytest.mark.slow
def test_a_frozen_tower_beside_the_trained_one_teaches_as_its_stored_embeddings_do(
    prepared: Prepared, tmp_path: Path
) -> None:
    runs = [
        align_tower(
            prepared, tmp_path / f"{stored}", is_teacher_stored=stored, distillation_weight=1.0,
            max_steps=4, held_out_ratio=0.2,
        )
        for stored in (True, False)
    ]  # fmt: skip
    losses, others = (read_losses(run.output) for run in runs)
    # The teacher's float32 embeddings were encoded in batches of other sizes.
    assert others == {step: pytest.approx(loss, rel=1e-5) for step, loss in losses.items()}
    assert runs[1].after.loss == pytest.approx(runs[0].after.loss, rel=1e-5)
    assert losses[4] != losses[1]


def test_images_without_classes_are_refused_with_names_of_datasets(tmp_path: Path) -> None:
    lines = [{"image": path.name, "caption": "a dog"} for path in save_tiny_images(tmp_path, 2)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="captions and no classes") as refused:
        load_labeled_images(str(tmp_path))
    proposed = re.findall(r"([\w-]+)=FOLDER", str(refused.value))
    assert proposed and {find_dataset(name).dataset_type for name in proposed} == {"classification"}


def test_labeled_images_are_known_by_their_bytes_too(tmp_path: Path) -> None:
    """Two of a class change places, which leaves every name and label as it was."""
    folder = write_classes(tmp_path / "classes")

    def identify() -> dict[str, Any]:
        images = load_labeled_images(f"image-folder={folder}")
        return ZeroShotImages(images, tmp_path, cast(LLM2CLIPProcessor, None)).identify()

    before = identify()
    one, other = sorted(next(folder.iterdir()).iterdir())[:2]
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    after = identify()
    assert after != before and {**after, "digest": before["digest"]} == before


@pytest.mark.slow
@pytest.mark.parametrize("vision_training", ["frozen", "full"])
def test_the_zero_shot_accuracy_is_that_of_evaluate(
    colored: Prepared, tmp_path: Path, vision_training: Any
) -> None:
    source = f"image-folder={write_classes(tmp_path / 'classes')}"
    options: dict[str, Any] = {"zero_shot": source, "vision_training": vision_training}
    is_stored = vision_training == "frozen"
    config = AlignConfig(**{**SHORT_RUN, "held_out_ratio": 0.2, **options})
    align(
        colored.model, colored.records, tmp_path / "run", config,
        caption_store=colored.caption_store,
        image_store=colored.image_store if is_stored else None,
    )  # fmt: skip
    run = Run(tmp_path / "run")
    (result,) = evaluate(
        run.model, source, tasks=["classification"],
        config=EvaluationConfig(output=tmp_path / "scores", device="cpu", show_progress=False),
    )  # fmt: skip
    labeled = run.results["zero_shot"]
    assert labeled["accuracy"] == result.scores["top_1"]["value"]
    assert (labeled["num_images"], labeled["num_classes"]) == (3 * len(COLORS), len(COLORS))
    assert run.before.zero_shot is not None and run.after.zero_shot is not None
    lines = "\n".join(describe_alignment(run.output))
    assert f"Zero-shot accuracy on {3 * len(COLORS)} images" in lines
    card = read_card_data(run.model).results
    [classified] = [result for result in card if result.task == "classification"]
    assert classified.scores["top_1"] == pytest.approx(labeled["accuracy"])
    interval = find_interval(labeled["accuracy"], 3 * len(COLORS))
    assert classified.intervals["top_1"] == pytest.approx(interval)
    assert classified.count == f"{3 * len(COLORS)} images"


@pytest.mark.slow
def test_locked_texts_keep_their_embeddings_bit_for_bit(
    prepared: Prepared, finished: Run, tmp_path: Path
) -> None:
    locked = prepared.align(tmp_path / "locked", lock_text=True, vision_training="full")
    texts = ["a dog", "two red apples on a wooden table", "ein Hund"]
    embeds = [
        encode_texts(*load_model(folder, device="cpu"), texts)  # type: ignore[arg-type]
        for folder in (prepared.model, locked.model)
    ]
    assert torch.equal(*embeds)
    assert move_tower(prepared, locked.model) > 1e-3
    report = check_model(locked.model, device="cpu", text_like=prepared.model)
    assert report.healthy and report.checks[-1].name == "text like"
    flags = ["--text-like", str(prepared.model), "--device", "cpu"]
    assert main(["doctor", str(locked.model), *flags]) == 0
    failed = check_model(finished.model, device="cpu", text_like=prepared.model)
    assert not failed.healthy and "head weights differ" in str(failed)


@pytest.mark.slow
def test_random_texts_are_not_locked(tmp_path: Path, colored: Prepared) -> None:
    with pytest.raises(ValueError, match="text projection as it is, and that of"):
        colored.align(tmp_path / "run", lock_text=True)
