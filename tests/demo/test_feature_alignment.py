"""Alignment of stored embeddings starts well, trains, and stops at nonsense; encoding in order."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_model

from modeling_llm2clip.demo.feature_alignment import (
    AlignmentArguments,
    AlignmentPairs,
    align_features,
    descend,
    sample_batches,
)
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import rank_retrieval
from modeling_llm2clip.evaluation.metrics.scores import hit_rate_at
from modeling_llm2clip.training.alignment.cca_init import init_projections_by_cca


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(60, 6, generator=generator)
    caption_embeds = shared @ torch.randn(6, 32, generator=generator)
    vision_embeds = shared @ torch.randn(6, 32, generator=generator)
    return AlignmentPairs(
        caption_embeds, vision_embeds, [[i] for i in range(60)], [str(i) for i in range(60)]
    )


def recall_of(model, pairs):
    with torch.inference_mode():
        text = model.project_caption_embeds(pairs.caption_embeds)
        image = model.project_vision_embeds(pairs.vision_embeds)
    ranking = rank_retrieval(
        image, text, Correspondence.from_group_ids(pairs.group_ids, pairs.group_ids)
    )
    return hit_rate_at(ranking.t2i, k=1)


def test_the_closed_form_start_finds_what_captions_and_images_share(pairs):
    model, _ = tiny_model(visual_projection_bias=True, projection_dim=48)
    before = recall_of(model, pairs)
    init_projections_by_cca(model, *pairs.pair_rows())
    # Both sides are linear in six shared numbers; chance is 1 in 60.
    assert before < 0.2 and recall_of(model, pairs) > 0.9


def test_the_start_asks_for_a_bias(pairs):
    model, _ = tiny_model(visual_projection_bias=False)
    with pytest.raises(ValueError, match="visual_projection_bias=True"):
        init_projections_by_cca(model, *pairs.pair_rows())


def test_training_lowers_the_loss_and_leaves_the_towers_alone(pairs):
    model, _ = tiny_model()
    towers = {
        n: p.clone()
        for n, p in model.named_parameters()
        if n.startswith(("text_model", "vision_model"))
    }
    losses = align_features(model, pairs, AlignmentArguments(steps=40, batch_size=30, lr=3e-3))
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in towers.items())


def test_the_same_seed_gives_the_same_losses(pairs):
    runs = []
    for _ in range(2):
        model, _ = tiny_model()
        runs.append(align_features(model, pairs, AlignmentArguments(steps=3, batch_size=16)))
    assert runs[0] == runs[1]


def test_a_loss_that_is_not_finite_stops_the_training(pairs):
    model, _ = tiny_model()
    broken = AlignmentPairs(
        pairs.caption_embeds * torch.nan,
        pairs.vision_embeds,
        pairs.captions_of_image,
        pairs.group_ids,
    )
    with pytest.raises(FloatingPointError, match=r"nan at step 0"):
        align_features(model, broken, AlignmentArguments(steps=2, batch_size=16))


def test_a_gradient_that_is_not_finite_stops_before_the_last_step_too():
    weight = torch.nn.Parameter(torch.zeros(2))  # whose root is 0, with an infinite slope
    losses = (weight.sqrt().sum() for _ in range(1))
    with pytest.raises(FloatingPointError, match="gradient's norm is inf at step 0"):
        descend(losses, [weight], steps=1, lr=1e-3, weight_decay=0.0)
    assert torch.equal(weight, torch.zeros(2))


def test_a_weight_that_is_not_finite_at_the_end_is_no_success():
    weight = torch.nn.Parameter(torch.full((2,), 3.4e38))  # float32 ends just above
    losses = ((3.4e38 - weight).sum() for _ in range(1))
    with pytest.raises(FloatingPointError, match="not finite after step 1"):
        descend(losses, [weight], steps=1, lr=1e37, weight_decay=0.0)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        (
            {"feature_dropout": 1.0, "steps": 0},
            r"steps=0, wanted at least 1; .*dropout=1\.0, wanted",
        ),
        ({"weight_decay": math.nan, "lr": math.inf}, "lr=inf, wanted a finite.*weight_decay=nan"),
        ({"weight_decay": -0.1, "feature_noise": -1.0}, r"weight_decay=-0\.1, .*noise=-1\.0, want"),
        ({"batch_size": 1, "lr": 0.0}, "batch_size=1, wanted at least 2; lr=0.0, wanted more"),
    ],
)
def test_impossible_settings_are_all_named(changed, error):
    with pytest.raises(ValueError, match=error):
        AlignmentArguments(**changed)


def test_a_batch_larger_than_the_data_is_all_of_it():
    generator = torch.Generator().manual_seed(0)
    draws = sample_batches([["a"], ["b"], ["c"]], steps=2, batch_size=512, generator=generator)
    assert [sorted(captions) for _, captions in draws] == [["a", "b", "c"]] * 2
