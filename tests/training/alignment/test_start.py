"""Stage 3, where it starts: the closed form, and what a run with held-out images ends with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from aligning import Prepared, prepare
from modeling_llm2clip.training.alignment.align_arguments import LEAST_DEFAULT_STEPS, AlignArguments

from modeling_llm2clip.model_folders.model_writing import save_trained_model
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.training.alignment.alignment_data import AlignmentDataset
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.alignment.alignment_report import (
    describe_result,
    find_caution,
    list_results,
)
from modeling_llm2clip.training.alignment.cca_init import (
    SHRINKAGES,
    fit_temperature,
    init_projections_by_cca,
)
from modeling_llm2clip.training.alignment.held_out import HeldOutScores, choose_held_out
from modeling_llm2clip.training.alignment.sampling import sample_normal
from modeling_llm2clip.training.losses.contrastive import grouped_contrastive_loss


@pytest.fixture(scope="module", params=[100, 800])
def colored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp(f"colored-{request.param}")
    return prepare(folder, num_colored=request.param, trained=False)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("few"), num_colored=60, trained=False)


def read_lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_one_step_at_the_default_rate_keeps_what_the_closed_form_found(
    colored: Prepared, tmp_path: Path
) -> None:
    # The first step moves every weight by the whole learning rate. With 20 held-out images one of
    # them is a twentieth, and with 80 an eightieth: a tenth is more than chance moves.
    result = colored.align_stored(tmp_path / "run", steps=1)
    assert result.start.kind == "canonical-correlation" and result.before is not None
    (line,) = [line for line in read_lines(tmp_path / "run") if "held_out_loss" in line]
    assert result.before.text_to_image_r1 > 3 * result.before.chance_text_to_image_r1
    for direction in ("text_to_image_r1", "image_to_text_r1"):
        before = getattr(result.before, direction)
        assert line[f"held_out_{direction}"] >= 0.9 * before


def test_small_data_ends_no_lower_than_its_closed_form(colored: Prepared, tmp_path: Path) -> None:
    result = colored.align_stored(tmp_path / "run", steps=40)
    assert result.before is not None and result.after is not None
    assert result.after.loss <= result.before.loss
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["held_out"]
    looks = [line for line in read_lines(tmp_path / "run") if "held_out_loss" in line]
    lowest = min([result.before.loss, *(line["held_out_loss"] for line in looks)])
    assert kept["best"]["loss"] == result.after.loss == lowest
    assert kept["best_step"] == result.best_step


def test_a_run_that_only_gets_worse_returns_its_start(few: Prepared, tmp_path: Path) -> None:
    result = few.align_stored(tmp_path / "run", steps=20, lr=1.0, patience=None)
    assert (result.best_step, result.steps, result.after) == (0, 20, result.before)
    assert result.trained is not None and result.has_trained_projections
    start = few.align_stored(tmp_path / "other", steps=1, lr=1e-30)
    assert start.trained is not None
    for name, value in result.trained.items():
        torch.testing.assert_close(value, start.trained[name], rtol=1e-6, atol=1e-6)


def test_a_run_stops_when_no_lower_loss_comes(few: Prepared, tmp_path: Path) -> None:
    # Nothing is learned before the text adapter joins, after a quarter of the run.
    result = few.align_stored(tmp_path / "run", steps=100, lr=1.0, evaluate_every=1, patience=3)
    assert (result.best_step, result.steps, result.exit_code) == (0, 25 + 3, 0)
    assert result.trained is not None


def test_held_out_images_are_never_trained_on(few: Prepared) -> None:
    dataset = AlignmentDataset(
        few.records,
        LLM2CLIPProcessor.from_pretrained(few.model),
        caption_store=few.caption_store,
        image_store=few.image_store,
    )
    items, held_out = choose_held_out(dataset, 0.1, seed=0)
    # A tenth of 60 is too few to tell models apart, and more than a fifth would be missed.
    assert len(held_out) == 12 and not set(items) & set(held_out)
    assert sorted([*items, *held_out]) == list(range(60))
    assert choose_held_out(dataset, 0.1, seed=1)[1] != held_out
    assert choose_held_out(dataset, 0.0, seed=0) == (list(range(60)), [])


def test_what_shows_the_same_thing_is_held_out_together(prepared: Prepared) -> None:
    dataset = AlignmentDataset(
        prepared.records,
        LLM2CLIPProcessor.from_pretrained(prepared.model),
        caption_store=prepared.caption_store,
    )
    for seed in range(8):
        items, held_out = choose_held_out(dataset, 0.1, seed=seed)
        group_ids = [{int(dataset.group_ids[item]) for item in part} for part in (items, held_out)]
        assert not group_ids[0] & group_ids[1]


def test_auto_keeps_a_trained_model_that_is_better_than_the_closed_form(
    few: Prepared, tmp_path: Path
) -> None:
    many = prepare(tmp_path / "many", num_colored=600, trained=False)
    first = many.align_stored(tmp_path / "first", steps=1)
    assert first.trained is not None
    save_trained_model(many.model, first.trained, tmp_path / "model")
    trained = Prepared(few.data, tmp_path / "model", few.captions, few.images)
    result = trained.align_stored(tmp_path / "kept", steps=1)
    assert result.start.kind == "as-is" and result.start.is_trained
    # The closed form of noise is worse than what it replaces; of a random model it is better.
    poor = prepare(tmp_path / "poor", num_colored=200, trained=True)
    assert poor.align_stored(tmp_path / "fitted", steps=1).start.kind == "canonical-correlation"


def test_a_model_of_noise_is_near_chance_and_says_so(prepared: Prepared, tmp_path: Path) -> None:
    result = prepared.align_stored(tmp_path / "run", steps=2)
    assert result.after is not None and result.after.is_near_chance
    caution = find_caution(result)
    assert caution is not None and result.trained is not None
    save_trained_model(
        prepared.model,
        result.trained,
        tmp_path / "model",
        results=list_results(result, "noise"),
        caution=caution,
    )
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert caution in card and "chance_text_to_image_r1" in card
    assert "chance" in "\n".join(describe_result(result))


@pytest.mark.parametrize(
    ("score", "count", "is_near"),
    # 1.9 % of 240 is 4.6 images; three times chance is 3. Half of ten is two of what chance gives.
    [(0.019, 240, True), (0.3, 240, False), (0.5, 10, True), (1.0, 10, False), (0.0, 1000, True)],
)
def test_near_chance_is_what_cannot_be_told_from_three_times_chance(
    score: float, count: int, is_near: bool
) -> None:
    scores = HeldOutScores(1.0, score, score, 1 / count, 1 / count, count, count)
    assert scores.is_near_chance == is_near


def test_the_closed_form_has_weights_of_ordinary_scale_and_finds_unseen_pairs() -> None:
    model, pairs, groups = make_pairs()
    fitted = init_projections_by_cca(model, *(part[:300] for part in pairs), groups[:300])
    assert {fitted.text_shrinkage, fitted.image_shrinkage} <= set(SHRINKAGES)
    for projection in (model.text_projection, model.visual_projection):
        used = projection.weight[projection.weight.abs().sum(dim=1) > 0]
        scale = used.square().mean().sqrt()
        # As the initialization has it, so that AdamW's steps are small beside it.
        torch.testing.assert_close(scale, torch.tensor(projection.in_features**-0.5))
    assert find_first(model, [part[300:] for part in pairs]) > 0.5  # chance is 1 in 100


def test_noise_asks_for_more_shrinkage() -> None:
    chosen = []
    for noise in (0.01, 3.0):
        model, pairs, groups = make_pairs(noise=noise)
        fitted = init_projections_by_cca(model, *pairs, groups)
        chosen.append(fitted.text_shrinkage * fitted.image_shrinkage)
    assert chosen[0] < chosen[1]


def test_the_fitted_temperature_is_where_the_loss_is_least() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(64, 8, generator=generator), dim=-1)
    noise = 0.3 * torch.randn(64, 8, generator=generator)
    text = torch.nn.functional.normalize(image + noise, dim=-1)
    groups = torch.arange(64)
    log_scale, loss = fit_temperature(image, text, groups)
    for moved in (log_scale - 0.05, log_scale + 0.05):
        scale = torch.tensor([moved]).exp()
        assert grouped_contrastive_loss(image, text, scale, groups) > loss


def test_noise_on_embeddings_is_normal_and_each_samples_own() -> None:
    rows = [(0, 1, item, 2) for item in range(500)]
    noise = sample_normal(rows, 200)
    # Of 100,000 numbers the mean is within four standard errors of 0, the deviation of 1.
    assert abs(float(noise.mean())) < 4 * 100_000**-0.5
    assert abs(float(noise.std()) - 1) < 4 * 200_000**-0.5
    assert torch.equal(sample_normal(rows[7:9], 200), noise[7:9])
    # Neither side nor epoch repeats another's.
    assert not torch.equal(sample_normal([(0, 1, 7, 3)], 200)[0], noise[7])
    assert abs(float((noise[0] * noise[1]).mean())) < 4 * 200**-0.5


def test_a_run_without_a_length_is_long_enough() -> None:
    arguments = AlignArguments()
    assert arguments.choose_batch_size(720, 1) == 512
    assert arguments.choose_batch_size(90, 1) == 90
    assert arguments.choose_batch_size(91, 2) == 90
    assert arguments.count_steps(720, 512) == LEAST_DEFAULT_STEPS
    assert arguments.count_steps(512_000, 512) == 10_000
    assert AlignArguments(epochs=1).count_steps(720, 128) == 5


def make_pairs(
    *, noise: float = 0.3
) -> tuple[AlignmentModel, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A small head, and 400 pairs of embeddings that share eight numbers."""
    from tiny import tiny_model

    model, _ = tiny_model(visual_projection_bias=True, projection_dim=16, trained=False)
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(400, 8, generator=generator)
    sides = []
    for width in (model.text_projection.in_features, model.visual_projection.in_features):
        mixed = shared @ torch.randn(8, width, generator=generator)
        sides.append(mixed + noise * 8**0.5 * torch.randn(400, width, generator=generator))
    return model, (sides[0], sides[1]), torch.arange(400)


@torch.no_grad()
def find_first(model: AlignmentModel, pairs: list[torch.Tensor]) -> float:
    text = torch.nn.functional.normalize(model.project_caption_embeds(pairs[0]), dim=-1)
    image = torch.nn.functional.normalize(model.project_vision_embeds(pairs[1]), dim=-1)
    return float(((text @ image.T).argmax(dim=1) == torch.arange(len(text))).double().mean())
