"""Stage 3, where the projections start, and the closed form: regularization and temperature."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from aligning import Prepared, names_that_differ, prepare, read_metrics
from tiny import tiny_model

from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.training.alignment.projection_init import SHRINKAGES, init_projections_by_cca


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
