"""Laws of what `benchmarks/finetuning_ideas.py` measures and trains with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def find_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_cosine_of_joined_embeddings_is_the_weighted_mean_of_the_cosines() -> None:
    from finetuning_ideas import join

    torch.manual_seed(0)
    wide, narrow = torch.randn(2, 8), 100 * torch.randn(2, 3)  # lengths must not weigh
    wanted = sum(
        share * F.cosine_similarity(part[0], part[1], dim=0)
        for share, part in ((0.25, wide), (0.75, narrow))
    )
    joined = join(wide, narrow, shares=(0.25, 0.75))
    # Rounding of float32 alone.
    assert torch.allclose(joined[0] @ joined[1], torch.as_tensor(wanted), atol=1e-6)


def test_a_student_that_agrees_with_its_teacher_has_the_plain_loss() -> None:
    from finetuning_ideas import TEACHER_SCALE, DistillationLoss
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    torch.manual_seed(0)
    anchors, positives = torch.randn(2, 4, 8)
    features = [{"sentence_embedding": side} for side in (anchors, positives)]
    plain = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=TEACHER_SCALE)
    loss = DistillationLoss(plain)
    wanted = plain.compute_loss_from_embeddings([anchors, positives], None)
    agreeing = torch.stack([anchors, positives], dim=1)
    # A sum of probabilities differs from one by rounding.
    assert torch.allclose(loss(features, 3 * agreeing), wanted, atol=1e-5)
    assert loss(features, agreeing.flip(0)) > wanted + 0.01


def test_a_wrong_caption_is_compared_with_the_query_and_the_right_one() -> None:
    from finetuning_ideas import describe_errors, find_words

    assert find_words("A Dog, and the ball!") == {"dog", "ball"}
    first = [{"dog", "ball"}, {"cat", "sofa"}, {"bus"}]
    second = [{"puppy"}, {"cat", "couch"}, {"bus", "red"}]
    # Right; as many shared words as the right one, with half of its words; without any.
    found = describe_errors(first, [*second, {"cat", "sofa", "couch"}], torch.tensor([0, 3, 0]))
    assert found == {"errors": 2, "same_words": 0, "half_of_words": 0.5, "fits_as_well": 0.5}


def test_pairs_are_captions_or_sentences_of_one_image(tmp_path: Path) -> None:
    from finetuning_ideas import read_pairs

    sentences = [f"This is sentence number {number} of a long description." for number in range(8)]
    captions = [["one", "two", "one"], ["alone"], [" ".join(sentences)]]
    file = tmp_path / "captions.jsonl"
    lines = [json.dumps({"captions": texts}) for texts in captions]
    file.write_text("\n".join(lines), encoding="utf-8")
    (short, other), long = read_pairs(file)
    assert {short, other} == {"one", "two"}
    assert len(set(long)) == 2 and set(long) <= set(sentences)


def test_what_was_not_run_is_named() -> None:
    from benchmarks.render_tables import _render_finetuning_ideas

    score = {"value": 0.438, "low": 0.407, "high": 0.469}
    gain = {"value": -0.002, "low": -0.01, "high": 0.006}
    rows = {"layer 29": {"cra": score, "gain": gain}}
    report = {
        "data": "captions", "steps": 40, "batch_size": 64, "not_run": ["control"],
        "ideas": {"layers": {"hardware": "a machine", "rows": rows}},
    }  # fmt: skip
    table = _render_finetuning_ideas(report)
    assert "| layer 29 | 43.8 % | 40.7 to 46.9 | -0.2 | -1.0 to +0.6 |" in table
    assert "Not run yet: more steps, nothing else (control). a machine" in table
    assert "Not run" not in _render_finetuning_ideas({**report, "not_run": []})
