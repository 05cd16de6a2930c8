"""Stage 3, images that training never sees: they choose the best weights, and warn."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from aligning import Prepared, prepare, weights_of

from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.training.alignment import held_out as held_out_module
from modeling_llm2clip.training.alignment.alignment_data import AlignmentDataset
from modeling_llm2clip.training.alignment.alignment_report import (
    NEAR_CHANCE,
    describe_alignment,
    make_caution,
)
from modeling_llm2clip.training.alignment.held_out import (
    HeldOutImages,
    HeldOutScores,
    choose_held_out,
)
from modeling_llm2clip.training.losses.contrastive import ContrastiveLoss
from modeling_llm2clip.training.losses.loss import LossInputs


@pytest.fixture(scope="module", params=[100, 800])
def colored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp(f"colored-{request.param}")
    return prepare(folder, num_colored=request.param, trained=False)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("few"), num_colored=60, trained=False)


def read_lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_small_data_ends_no_lower_than_its_start(colored: Prepared, tmp_path: Path) -> None:
    run = colored.align_stored(tmp_path / "run", max_steps=40)
    assert run.after.loss <= run.before.loss
    losses = {line["step"]: line["held_out_loss"] for line in read_lines(run.output)
              if "held_out_loss" in line}  # fmt: skip
    losses[0] = run.before.loss
    assert run.after.loss == min(losses.values()) == losses[run.best_step]


def test_a_run_that_only_gets_worse_returns_its_start(few: Prepared, tmp_path: Path) -> None:
    run = few.align_stored(
        tmp_path / "run", max_steps=20, learning_rate=1.0, early_stopping_patience=0
    )
    assert (run.best_step, run.results["steps"], run.after) == (0, 20, run.before)
    assert run.results["projections_trained"]
    start = weights_of(few.align_stored(tmp_path / "other", max_steps=1, learning_rate=1e-30).model)
    for name, value in weights_of(run.model).items():
        # A step of 1e-30 rounds to none, but for what Adam divides by.
        torch.testing.assert_close(value, start[name], rtol=1e-6, atol=1e-6)


def test_a_run_stops_when_no_lower_loss_comes(few: Prepared, tmp_path: Path) -> None:
    # Nothing is learned before the text adapter joins, after a quarter of the run.
    run = few.align_stored(
        tmp_path / "run", max_steps=100, learning_rate=1.0, eval_steps=1, early_stopping_patience=3
    )
    assert (run.best_step, run.results["steps"]) == (0, 25 + 3)
    assert run.model.is_dir()


def test_held_out_images_are_never_trained_on(few: Prepared) -> None:
    dataset = AlignmentDataset(
        few.records,
        LLM2CLIPProcessor.from_pretrained(few.model),
        caption_store=few.caption_store,
        image_store=few.image_store,
    )
    items, held_out = (part.tolist() for part in choose_held_out(dataset, 0.1, seed=0))
    # A tenth of 60 is too few to tell models apart, and more than a fifth would be missed.
    assert len(held_out) == 12 and not set(items) & set(held_out)
    assert sorted([*items, *held_out]) == list(range(60))
    assert choose_held_out(dataset, 0.1, seed=1)[1].tolist() != held_out
    everything, nothing = choose_held_out(dataset, 0.0, seed=0)
    assert (everything.tolist(), nothing.tolist()) == (list(range(60)), [])


@pytest.mark.parametrize("num_fitted", [2_000, 40])
def test_the_held_out_loss_is_that_of_the_best_temperature(
    few: Prepared, num_fitted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out_module, "_MAX_ROWS_OF_TEMPERATURE", num_fitted)
    dataset = AlignmentDataset(
        few.records,
        LLM2CLIPProcessor.from_pretrained(few.model),
        caption_store=few.caption_store,
        image_store=few.image_store,
    )
    held_out = HeldOutImages(dataset, range(60))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(len(held_out.group_ids), 8, generator=generator)
    texts = images + 0.5 * torch.randn(images.shape, generator=generator)
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    losses = [
        ContrastiveLoss()(LossInputs(images, texts, torch.tensor([scale]), held_out.group_ids))
        for scale in torch.arange(1.0, 100.0).tolist()
    ]
    # The loss is flat where it is lowest: a temperature that fewer rows chose costs little.
    assert held_out.score(images, texts).loss == pytest.approx(float(min(losses)), rel=0.02)
    assert float(losses[-1]) > 1.5 * float(min(losses))


def test_what_shows_the_same_thing_is_held_out_together(prepared: Prepared) -> None:
    dataset = AlignmentDataset(
        prepared.records,
        LLM2CLIPProcessor.from_pretrained(prepared.model),
        caption_store=prepared.caption_store,
    )
    for seed in range(8):
        items, held_out = choose_held_out(dataset, 0.1, seed=seed)
        group_ids = [set(dataset.read_group_ids(part).tolist()) for part in (items, held_out)]
        assert not group_ids[0] & group_ids[1]


def test_a_model_of_noise_is_near_chance_and_says_so(prepared: Prepared, tmp_path: Path) -> None:
    run = prepared.align_stored(tmp_path / "run", max_steps=2)
    assert run.after.is_near_chance
    caution = make_caution(run.results)
    card = (run.model / "README.md").read_text(encoding="utf-8")
    assert caution and caution in card and "chance_t2i_r1" in card
    assert describe_alignment(run.output)[-1] == NEAR_CHANCE


def test_an_image_in_several_languages_is_one_held_out_image(prepared: Prepared) -> None:
    records = [
        dataclasses.replace(record, lang=lang, group_id=record.name)
        for record in prepared.records[:10]
        for lang in ("en", "de", "fr")
    ]
    processor = LLM2CLIPProcessor.from_pretrained(prepared.model)
    held_out = HeldOutImages(AlignmentDataset(records, processor), range(30))
    images = F.normalize(torch.randn(10, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    images = images.repeat_interleave(3, dim=0)
    # Six images, in all languages, find their texts, and four those of their neighbors.
    texts = images.clone()
    texts[18:] = texts[18:].roll(3, dims=0)
    scores = held_out.score(images, texts)
    assert (scores.num_images, scores.num_texts) == (10, 30)
    assert (scores.t2i_r1, scores.i2t_r1) == pytest.approx((0.6, 0.6))
    assert (scores.chance_t2i_r1, scores.chance_i2t_r1) == pytest.approx((0.1, 0.1))
    # With 95 % confidence, half of 30 images are above 0.33, and half of ten above 0.24 only.
    few = dataclasses.replace(scores, t2i_r1=0.5, i2t_r1=0.5)
    assert few.is_near_chance and not dataclasses.replace(few, num_images=30).is_near_chance


@pytest.mark.parametrize(
    ("score", "count", "is_near"),
    # 1.9 % of 240 is 4.6 images; three times chance is 3. Half of ten is two of what chance gives.
    [(0.019, 240, True), (0.3, 240, False), (0.5, 10, True), (1.0, 10, False), (0.0, 1000, True)],
)
def test_near_chance_is_what_does_not_exceed_three_times_chance(
    score: float, count: int, is_near: bool
) -> None:
    scores = HeldOutScores(1.0, score, score, 1 / count, 1 / count, count, count)
    assert scores.is_near_chance == is_near


def test_the_step_of_the_weights_that_are_written_is_named(few: Prepared, tmp_path: Path) -> None:
    run = few.align_stored(
        tmp_path / "run", max_steps=4, learning_rate=1.0, early_stopping_patience=0
    )
    assert run.best_step == 0
    assert f"Wrote {run.model} with the weights of step 0 of 4." in describe_alignment(run.output)
