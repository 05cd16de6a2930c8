"""Stage 3, losses: what their options promise after a run, and a loss with a parameter."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from aligning import COLORS, EndAfter, Prepared, Run, read_losses, read_metrics
from labeled_colors import write_classes
from launches import run_python
from safetensors.torch import load_file
from sigmoid_loss import BIAS, train
from tiny_encoders import save_tiny_images

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.evaluation_config import EvaluationConfig
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.evaluation.datasets.dataset_registry import find_dataset
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.heads_llm2clip import LogitRule
from modeling_llm2clip.model_folders.model_card import read_card_data
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPVisionModel
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.scheduling.graceful_stop import StageInterrupt
from modeling_llm2clip.training.alignment.alignment_report import describe_alignment
from modeling_llm2clip.training.alignment.held_out import (
    ZeroShotImages,
    find_interval,
    fit_start,
    load_labeled_images,
)
from modeling_llm2clip.training.losses.choose_loss import build_loss
from modeling_llm2clip.training.losses.loss import LossInputs, list_fitted
from modeling_llm2clip.training.run_folder import read_results, read_run_record

FULL: dict[str, Any] = {"vision_training": "full", "layer_decay": 1.0, "vision_learning_rate": 1e-3}


def move_tower(prepared: Prepared, folder: Path) -> float:
    """How far the tower's embeddings are from those before the training, at unit length."""
    model = LLM2CLIPVisionModel.from_pretrained(folder).eval()
    images = [record.image for record in prepared.records]
    now = encode_images(model, prepared.processor, images, project=False)
    before = prepared.image_store.read(
        prepared.image_store.rows_at(range(len(images)), [0] * len(images))
    )
    return float((F.normalize(now, dim=-1) - F.normalize(before, dim=-1)).norm(dim=1).mean())


@pytest.mark.slow
def test_self_distillation_keeps_a_tower_near_itself(prepared: Prepared, tmp_path: Path) -> None:
    moved, first_losses = {}, {}
    for weight in (0.0, 1.0, 100.0):
        run = prepared.align(
            tmp_path / f"{weight}", distillation_weight=weight, are_images_stored=weight > 0,
            max_steps=12, **FULL,
        )  # fmt: skip
        moved[weight] = move_tower(prepared, run.model)
        first_losses[weight] = read_losses(run.output)[1]
    # Before the first step the tower is its frozen self, and the term is 0: the store has the same
    # pixels in float32, encoded in other batches.
    assert [*first_losses.values()] == pytest.approx([first_losses[0.0]] * 3, abs=1e-4)
    assert moved[100.0] < moved[1.0] < moved[0.0]
    assert moved[100.0] < moved[0.0] / 2


@pytest.mark.slow
def test_a_frozen_tower_teaches_as_its_embeddings_do(prepared: Prepared, tmp_path: Path) -> None:
    options = {"distillation_weight": 1.0, "max_steps": 4, "held_out_ratio": 0.2, **FULL}
    runs = [
        prepared.align(tmp_path / f"{stored}", are_images_stored=stored, **options)
        for stored in (True, False)
    ]
    losses, others = (read_losses(run.output) for run in runs)
    # The teacher's float32 embeddings were encoded in batches of other sizes.
    assert others == {step: pytest.approx(loss, rel=1e-5) for step, loss in losses.items()}
    assert runs[1].after.loss == pytest.approx(runs[0].after.loss, rel=1e-5)
    assert losses[4] != losses[1]


def test_images_without_classes_are_refused_with_names_of_datasets(tmp_path: Path) -> None:
    lines = [{"image": path.name, "caption": "a dog"} for path in save_tiny_images(tmp_path, 2)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="captions but no classes") as refused:
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
    few: Prepared, tmp_path: Path, vision_training: Any
) -> None:
    source = f"image-folder={write_classes(tmp_path / 'classes')}"
    run = few.align(
        tmp_path / "run", zero_shot=source, held_out_ratio=0.2, vision_training=vision_training,
        are_images_stored=vision_training == "frozen",
    )  # fmt: skip
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
def test_locked_texts_keep_embeddings(prepared: Prepared, finished: Run, tmp_path: Path) -> None:
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
def test_random_texts_are_not_locked(tmp_path: Path, few: Prepared) -> None:
    with pytest.raises(ValueError, match="lock_text freezes the text projection, but"):
        few.align(tmp_path / "run", lock_text=True)


def read_checkpoint(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoints" / f"checkpoint-{step}" / "trained.safetensors")


def read_start(output: Path) -> float:
    """The bias at the start, which is fitted to held-out images."""
    ((bias,),) = read_results(output)["start"]["loss_parameters"].values()
    return float(bias)


@pytest.mark.slow
def test_a_loss_with_a_parameter_chooses_and_resumes(prepared: Prepared, tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    train(prepared.data.parent, run, refit=True, save_steps=1, seed=1)
    trained = {step: float(read_checkpoint(run, step)[BIAS]) for step in (7, 8)}
    start = read_start(run)
    assert start != trained[7] != trained[8]
    assert read_run_record(run)["parameters"]["loss"]["trainable"] == 1
    # What chooses is the loss that is trained, with the parameter as it is then.
    results = read_results(run)["held_out"]
    losses = [results["before"]["loss"], *read_metrics(run, "held_out_loss").values()]
    best = load_file(run / "best.safetensors")
    assert results["best"]["loss"] <= min(losses)
    assert (BIAS in best) and (results["best_step"] > 1)
    assert float(best[BIAS]) != start
    # Each fit begins with the parameter that suits held-out images.
    (first, *_) = sorted((run / "refit/checkpoints").iterdir())
    bias = float(load_file(first / "trained.safetensors")[BIAS])
    # A step of Adam moves it by at most the learning rate.
    assert 0 < abs(bias - start) < 1.1e-3 * int(first.name.split("-")[1])
    # The parameter is in no model folder, and is resumed from a checkpoint.
    assert not [n for n in load_file(run / "model/model.safetensors") if "logit_bias" in n]
    options = {"refit": True, "save_steps": 1, "seed": 1}
    with pytest.raises(StageInterrupt):
        train(prepared.data.parent, again, callbacks=[EndAfter(3, by_signal=True)], **options)
    train(prepared.data.parent, again, resume=True, **options)
    once, twice = (read_checkpoint(output, 8) for output in (run, again))
    assert set(once) == set(twice)
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"by_cosine": True}, {"max_steps": 0, "projection_init": "auto"}]
)
def test_two_processes_are_as_one(
    prepared: Prepared, tmp_path: Path, options: dict[str, Any]
) -> None:
    """A parameter of the loss, without a temperature, and a closed form."""
    train(prepared.data.parent, tmp_path / "one", refit=False, **options)
    script = Path(__file__).parents[2] / "helpers" / "sigmoid_loss.py"
    given = json.dumps({**options, "refit": False})
    run_python(script, prepared.data.parent, tmp_path / "two", given, processes=2)
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        # Eight steps carry the rounding of sums in another order on.
        torch.testing.assert_close(two[name], value, atol=1e-3, rtol=1e-3)
    if not options:
        biases = [read_checkpoint(tmp_path / name, 8)[BIAS] for name in ("one", "two")]
        assert abs(float(biases[0]) - read_start(tmp_path / "one")) > 5e-4
        torch.testing.assert_close(*biases, atol=1e-5, rtol=0)
        losses = [read_losses(tmp_path / name) for name in ("one", "two")]
        assert losses[1] == pytest.approx(losses[0], abs=2e-3)


@pytest.mark.parametrize(
    ("noise", "dims", "scale"),
    [(0.3, (), 1.0), (1.0, (), 100.0), (3.0, (2, 4), 1.0), (0.3, (2, 4), 100.0)],
)
def test_temperature_and_bias_start_where_the_loss_that_is_trained_is_lowest(
    noise: float, dims: tuple[int, ...], scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(48, 8, generator=generator)
    texts = images + noise * torch.randn(48, 8, generator=generator)
    sides = (torch.nn.functional.normalize(side, dim=-1) for side in (images, texts))
    inputs = LossInputs(*sides, LogitRule(torch.tensor([scale])), torch.arange(48), is_whole=True)
    loss = build_loss(AlignConfig(loss="sigmoid", matryoshka_dims=dims))
    (bias,) = loss.parameters()  # type: ignore[attr-defined]
    before = float(bias.detach())
    fit = fit_start(loss, inputs)
    assert float(bias.detach()) == before and [*fit.parameters] == [*list_fitted(loss)]
    with torch.no_grad():
        bias.copy_(torch.tensor(next(iter(fit.parameters.values()))))
        assert float(loss(inputs.at_scale(math.exp(fit.log_scale or 0)))) == fit.loss
        # A grid of both finds nothing lower.
        for log_scale in torch.arange(0, math.log(100), 0.2).tolist():
            for ratio in torch.arange(0.2, 1.5, 0.1).tolist():
                bias.fill_(-4 - ratio * math.exp(log_scale))
                assert fit.loss < float(loss(inputs.at_scale(math.exp(log_scale)))) + 1e-3


@pytest.mark.slow
def test_a_model_as_good_as_the_closed_form_is_kept(few: Prepared, tmp_path: Path) -> None:
    options = {"loss": "sigmoid", "max_steps": 0, "refit": False}
    first = few.align_stored(tmp_path / "first", **options)
    again = replace(few, model=first.model).align_stored(tmp_path / "again", **options)
    starts = [run.results["start"] for run in (first, again)]
    assert [start["method"] for start in starts] == ["cca", "model"]
    # The fit ends where float32 sees no slope.
    assert again.before.loss == pytest.approx(first.before.loss, rel=1e-4)
    assert starts[1]["log_scale"] == pytest.approx(starts[0]["log_scale"], rel=1e-2)
