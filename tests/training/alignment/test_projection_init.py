"""Stage 3, where projections start: the closed form, no steps, and the last fit on all images."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import Prepared, names_that_differ, prepare, read_metrics, weights_of
from safetensors.torch import load_file
from tiny import tiny_model
from torch import Tensor
from transformers import TrainerCallback

from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.model_folders.model_card import read_card_data
from modeling_llm2clip.training.alignment import projection_init
from modeling_llm2clip.training.alignment.alignment_model import (
    AlignmentModel,
    skip_identity_blocks,
)
from modeling_llm2clip.training.alignment.alignment_report import (
    NEAR_CHANCE,
    REFITTED,
    SEEN,
    WORSE,
    describe_alignment,
)
from modeling_llm2clip.training.alignment.projection_init import (
    SHRINKAGES,
    init_projections_by_cca,
    make_identity,
)


@pytest.mark.slow
def test_one_step_at_the_default_rate_keeps_cca(colored: Prepared, tmp_path: Path) -> None:
    # The first step moves every weight by the whole learning rate. With 20 held-out images one of
    # them is a twentieth, and with 80 an eightieth: a tenth is more than chance moves.
    run = colored.align_stored(tmp_path / "run", max_steps=1)
    assert run.results["start"]["method"] == "cca"
    assert run.before.t2i_r1 > 3 * run.before.chance_t2i_r1
    for direction in ("t2i_r1", "i2t_r1"):
        (score,) = read_metrics(run.output, f"held_out_{direction}").values()
        assert score >= 0.9 * getattr(run.before, direction)


@pytest.mark.slow
def test_auto_keeps_a_trained_model_that_is_better_than_cca(few: Prepared, tmp_path: Path) -> None:
    many = prepare(tmp_path / "many", num_colored=600, trained=False)
    first = many.align_stored(tmp_path / "first", max_steps=1, refit=False)
    kept = replace(few, model=first.model).align_stored(tmp_path / "kept", max_steps=1)
    assert kept.results["start"]["method"] == "model" and kept.results["start"]["is_trained"]
    # CCA of noise is worse than what it replaces; of a random model it is better.
    poor = prepare(tmp_path / "poor", num_colored=200, trained=True)
    fitted = poor.align_stored(tmp_path / "fitted", max_steps=1, refit=False)
    assert fitted.results["start"]["method"] == "cca"


@pytest.mark.slow
def test_no_steps_are_the_closed_form_of_any_model(few: Prepared, tmp_path: Path) -> None:
    first = few.align_stored(tmp_path / "first", max_steps=8, refit=False)
    trained = replace(few, model=first.model)
    run = trained.align_stored(tmp_path / "run", max_steps=0, held_out_ratio=0.0)
    assert run.results["start"]["method"] == "cca"
    assert names_that_differ(run.model, trained.model)


def test_cca_gives_weights_of_ordinary_scale_and_finds_unseen_pairs() -> None:
    model, pairs, groups = make_pairs()
    fitted = init_projections_by_cca(model, *(part[:300] for part in pairs), groups[:300])
    assert {fitted["text_shrinkage"], fitted["image_shrinkage"]} <= set(SHRINKAGES)
    for projection in (model.text_projection, model.visual_projection):
        used = projection.weight[projection.weight.abs().sum(dim=1) > 0]
        scale = used.square().mean().sqrt()
        # As the initialization has it, so that AdamW's steps are small beside it.
        torch.testing.assert_close(scale, torch.tensor(projection.in_features**-0.5))
    assert find_first(model, [part[300:] for part in pairs]) > 0.5  # chance is 1 in 100


@pytest.mark.parametrize("value", [0.0, 3.0, torch.nan])
@pytest.mark.parametrize(("side", "name"), [(0, "captions"), (1, "images")])
def test_a_side_without_directions_is_refused_by_name(side: int, name: str, value: float) -> None:
    model, pairs, groups = make_pairs()
    pairs[side][:] = value
    with pytest.raises(ValueError, match=rf"embeddings of all 400 {name} are equal, or some are"):
        init_projections_by_cca(model, *pairs, groups)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_fold_without_directions_has_the_last_rank() -> None:
    """Of two groups, each fold fits one, whose captions are equal."""
    model, (text, vision), _ = make_pairs()
    text, vision, groups = text[:20], vision[:20], torch.arange(20) // 10
    text[:10], text[10:] = text[0].clone(), text[10].clone()
    fitted = init_projections_by_cca(model, text, vision, groups)
    # Ten pairs of the other group are no better, and those of the own one do not count.
    assert fitted["mean_reciprocal_rank"] <= 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_equal_captions_of_different_groups_are_no_negatives_in_cross_validation() -> None:
    model, (text, vision), _ = make_pairs(noise=0.01)
    text, vision = (torch.cat([part[:200], part[:200]]) for part in (text, vision))
    keys = torch.arange(200).repeat(2)
    fitted = init_projections_by_cca(model, text, vision, torch.arange(400), text_keys=keys)
    # The copy of a pair ties with it: as a negative it would put most pairs on the second rank.
    assert fitted["mean_reciprocal_rank"] > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_that_add_nothing_are_skipped_with_equal_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (text, _), _ = make_pairs()
    text[:, 3], text[5] = -0.0, 0.0
    adapter = model.text_adapter.to(dtype)
    blocks = list(adapter.blocks)
    assert len(blocks) > 1
    with torch.no_grad():
        blocks[0].down.weight.zero_()
        blocks[0].down.bias.zero_()
        blocks[1].down.weight.zero_()
        blocks[1].down.bias[0] = 0.5  # which adds something
        ran = adapter(text)
        with skip_identity_blocks(model):
            assert list(adapter.blocks) == blocks[1:]
            assert torch.equal(adapter(text), ran)
        assert list(adapter.blocks) == blocks
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # to which the blocks belong
        with skip_identity_blocks(model):
            assert list(adapter.blocks) == blocks
        monkeypatch.delenv("ACCELERATE_USE_FSDP")
        make_identity(adapter)
        ran = adapter(text)
        with skip_identity_blocks(model):
            assert not len(adapter.blocks)
            skipped = adapter(text)
    assert torch.equal(skipped, ran) and torch.equal(skipped.signbit(), ran.signbit())


def test_a_closed_form_does_not_depend_on_the_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted = []
    for rows in (4096, 60):
        monkeypatch.setattr(projection_init, "_ROWS_OF_ADAPTER", rows)
        model, pairs, groups = make_pairs()
        init_projections_by_cca(model, *pairs, groups)
        fitted.append(model.state_dict())
    assert all(torch.equal(value, fitted[1][name]) for name, value in fitted[0].items())


def test_noise_asks_for_more_shrinkage() -> None:
    chosen = []
    for noise in (0.01, 3.0):
        model, pairs, groups = make_pairs(noise=noise)
        fitted = init_projections_by_cca(model, *pairs, groups)
        chosen.append(fitted["text_shrinkage"] * fitted["image_shrinkage"])
    assert chosen[0] < chosen[1]


def make_pairs(
    *, noise: float = 0.3
) -> tuple[LLM2CLIPModel, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A small head, and 400 pairs of embeddings that share eight numbers."""
    model, _ = tiny_model(visual_projection_bias=True, projection_dim=16, trained=False)
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(400, 8, generator=generator)
    sides = []
    for width in (model.text_projection.in_features, model.visual_projection.in_features):
        mixed = shared @ torch.randn(8, width, generator=generator)
        sides.append(mixed + noise * 8**0.5 * torch.randn(400, width, generator=generator))
    return model, (sides[0], sides[1]), torch.arange(400)


@torch.no_grad()
def find_first(model: LLM2CLIPModel, pairs: list[torch.Tensor]) -> float:
    text = torch.nn.functional.normalize(model.project_caption_embeds(pairs[0]), dim=-1)
    image = torch.nn.functional.normalize(model.project_vision_embeds(pairs[1]), dim=-1)
    return float(((text @ image.T).argmax(dim=1) == torch.arange(len(text))).double().mean())


# Few steps at a rate that moves weights, evaluated after each.
OPTIONS: dict[str, Any] = {
    "device": "cpu", "max_steps": 8, "eval_steps": 1, "learning_rate": 2e-4, "warmup_steps": 0,
    "image_noise": 0, "caption_noise": 0, "save_steps": 1, "seed": 2,
}  # fmt: skip


class Watch(TrainerCallback):
    """Copies the trained weights before each fit and after each of its steps."""

    def __init__(self) -> None:
        self.fits: list[list[dict[str, Tensor]]] = []

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.fits.append([copy_heads(model)])

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.fits[-1].append(copy_heads(model))


def copy_heads(model: Any) -> dict[str, Tensor]:
    return {
        name: value.detach().clone() for name, value in model.named_parameters()
        if value.requires_grad
    }  # fmt: skip


def fit_closed_form(prepared: Prepared, cca: dict[str, Any]) -> dict[str, Tensor]:
    """Fit all pairs of a dataset, one after the other, with shrinkages that a run chose."""
    store, images = prepared.caption_store, prepared.image_store
    rows = [
        (item, int(row)) for item in range(len(prepared.records)) for row in store.rows_of(item)
    ]
    model = AlignmentModel.from_pretrained(prepared.model, with_vision_tower=False)
    init_projections_by_cca(
        model,
        store.read([row for _, row in rows]),
        images.read([int(images.rows_of(item)[0]) for item, _ in rows]),
        torch.tensor([item for item, _ in rows]),
        shrinkages=(cca["text_shrinkage"], cca["image_shrinkage"]),
    )
    return {n: v for n, v in model.state_dict().items() if "projection" in n}


def compare_up_to_rotation(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Compare products of the two projections: the order of pairs turns equal directions."""
    products = [
        weights["text_projection.weight"].T @ weights["visual_projection.weight"]
        for weights in (found, wanted)
    ]
    # Sums in another order; a model of 48 of the 60 images differs by a tenth and more.
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-3 * float(products[1].abs().max()))


@pytest.mark.slow
def test_no_steps_are_the_closed_form_of_all_images(few: Prepared, tmp_path: Path) -> None:
    run = few.align_stored(tmp_path / "run", max_steps=0)
    results = run.results
    assert (results["steps"], run.best_step, results["final_loss"]) == (0, 0, None)
    assert not LLM2CLIPModel.from_pretrained(run.model).config.random_heads
    assert results["refit"]["num_records"] == 60 > results["held_out"]["best"]["num_images"] == 12
    cca = results["refit"]["start"]["cca"]
    assert cca["num_pairs"] == 120 > results["start"]["cca"]["num_pairs"] == 96
    compare_up_to_rotation(weights_of(run.model), fit_closed_form(few, cca))
    assert check_model(run.model).healthy
    apart = few.align_stored(tmp_path / "apart", max_steps=0, refit=False)
    assert "refit" not in apart.results and apart.after == run.after
    with pytest.raises(AssertionError):
        compare_up_to_rotation(weights_of(apart.model), fit_closed_form(few, cca))
    # The source keeps its weights where nothing is better, and is not said to be fitted again.
    trained = dataclasses.replace(few, model=run.model)
    options = {**OPTIONS, "projection_init": "model", "learning_rate": 1.0}
    kept = trained.align_stored(tmp_path / "kept", **options)
    assert kept.best_step == 0 and "refit" not in kept.results
    assert not names_that_differ(run.model, kept.model)


@pytest.mark.slow
def test_the_last_fit_repeats_the_choice_on_all_images(few: Prepared, tmp_path: Path) -> None:
    watch = Watch()
    run = few.align_stored(tmp_path / "run", callbacks=[watch], **OPTIONS)
    step, share = run.best_step, run.results["held_out"]["best_share"]
    assert 0 < step <= 8 and 0 < share <= 1
    chosen, again = watch.fits
    assert len(again) == 1 + step == 1 + run.results["refit"]["steps"]
    # As chosen: between the start and a step, in both fits.
    for fit, weights in (
        (chosen, load_file(run.output / "best.safetensors")),
        (again, weights_of(run.model)),
    ):
        for name, value in fit[step].items():
            torch.testing.assert_close(weights[name], torch.lerp(fit[0][name], value, share))
    temperatures = {float(fit[0]["logit_scale.log_scale"]) for fit in (chosen, again)}
    assert temperatures == {run.results["start"]["log_scale"]} or len(temperatures) == 1
    # The images that chose are trained on now.
    apart = few.align_stored(tmp_path / "apart", **{**OPTIONS, "refit": False})
    assert names_that_differ(apart.model, run.model)
    assert check_model(run.model).healthy


@pytest.mark.slow
def test_scores_are_of_the_model_before_the_last_fit(few: Prepared, tmp_path: Path) -> None:
    run = few.align_stored(tmp_path / "run", max_steps=2)
    shown = "\n".join(describe_alignment(run.output))
    assert "The final model was refit on all images" in shown
    assert "refitted on all 60 records" in shown
    (result,) = read_card_data(run.model).results
    assert result.dataset.endswith(REFITTED)
    assert result.scores["t2i_r1"] == pytest.approx(run.after.t2i_r1)
    # A later run must not take these images for unseen ones.
    later = dataclasses.replace(few, model=run.model).align_stored(tmp_path / "later", max_steps=1)
    assert later.results["held_out"]["maybe_trained_on"]
    # Nor a reader the scores for those of the model that is written.
    (result,) = read_card_data(later.model).results
    assert result.dataset.endswith(SEEN + REFITTED)


class Die(TrainerCallback):
    """Ends the run at a step of its second fit, as a kill does between two checkpoints."""

    num_fits = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.num_fits += 1

    def on_step_begin(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        if self.num_fits == 2 and state.global_step == 1:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_killed_in_its_last_fit_ends_the_same(few: Prepared, tmp_path: Path) -> None:
    whole = few.align_stored(tmp_path / "whole", **OPTIONS)
    assert whole.best_step > 1
    with pytest.raises(KeyboardInterrupt):
        few.align_stored(tmp_path / "killed", callbacks=[Die()], **OPTIONS)
    assert (tmp_path / "killed" / "refit" / "checkpoints" / "checkpoint-1").is_dir()
    for output in (tmp_path / "killed", whole.copy_without_model(tmp_path / "unwritten")):
        resumed = few.align_stored(output, resume=True, **OPTIONS)
        # Bit for bit.
        assert not names_that_differ(whole.model, resumed.model)
        assert resumed.results == whole.results


@pytest.mark.slow
def test_nothing_is_tried_between_random_and_trained(few: Prepared, tmp_path: Path) -> None:
    run = few.align_stored(tmp_path / "run", **{**OPTIONS, "projection_init": "model"})
    assert run.results["held_out"]["best_share"] == 1


@pytest.mark.slow
def test_a_very_short_run_keeps_what_the_closed_form_found(few: Prepared, tmp_path: Path) -> None:
    options = {"held_out_ratio": 0, "image_noise": 0, "caption_noise": 0}
    run = few.align_stored(tmp_path / "one", max_steps=1, **options)
    losses = run.results["objective"]
    # Much less than the tenth of the start's loss that a step at the whole rate takes or gives.
    assert losses["after"] < losses["before"] * 1.02
    worse = few.align_stored(
        tmp_path / "worse", max_steps=1, learning_rate=1.0, warmup_steps=0, **options
    )
    losses = worse.results["objective"]
    assert losses["after"] > losses["before"]
    shown = describe_alignment(worse.output)
    assert WORSE in shown and NEAR_CHANCE not in shown  # which nobody measured
    assert "increased the loss" in (worse.model / "README.md").read_text(encoding="utf-8")
