"""A lower precision is taken only where it is faster and leaves every vector where it was."""

from __future__ import annotations

import pytest
import torch
from shared_models import CAPTIONS, shared_model

from modeling_llm2clip.encoding.captions import encode_captions
from modeling_llm2clip.encoding.precision import (
    PrecisionTrial,
    pick_probe_captions,
    probe_precisions,
)


def test_the_default_is_the_models_own_precision():
    model, processor = shared_model()
    own = encode_captions(model, processor, CAPTIONS).caption_embeds
    lowered = encode_captions(model, processor, CAPTIONS, precision=torch.bfloat16).caption_embeds
    assert torch.equal(own, encode_captions(model, processor, CAPTIONS).caption_embeds)
    assert not torch.equal(own, lowered)
    assert own.dtype == lowered.dtype == torch.float32


def test_the_probe_measures_every_candidate_on_the_model_itself():
    trials = probe_precisions(*shared_model(), CAPTIONS)
    assert [trial.dtype for trial in trials] == [torch.bfloat16, torch.float16]
    # bfloat16 keeps 8 bits: vectors move, but not out of recognition, in two layers.
    assert all(trial.speedup > 0 and 0.9 < trial.min_cosine < 1 for trial in trials)


@pytest.mark.parametrize(
    ("speedup", "min_cosine", "pays"),
    [(2.0, 0.9995, True), (1.05, 1.0, False), (3.0, 0.99, False), (3.0, float("nan"), False)],
)
def test_only_faster_and_true_pays(speedup, min_cosine, pays):
    assert PrecisionTrial(torch.bfloat16, speedup, min_cosine).pays is pays


def test_probe_captions_span_all_lengths():
    captions = ["x" * n for n in range(1, 101)] * 2
    picked = pick_probe_captions(captions, count=5)
    assert [len(caption) for caption in picked] == [1, 26, 51, 75, 100]
    assert pick_probe_captions(["b", "aa", "b"]) == ["b", "aa"]
