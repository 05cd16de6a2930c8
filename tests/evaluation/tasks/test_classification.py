"""Zero-shot classification on embeddings whose scores are known by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from embeddings_by_hand import (
    EAST,
    NORTH,
    NORTH_EAST,
    WEST,
    make_classification_dataset,
    open_embeddings,
)

from modeling_llm2clip.evaluation.metrics.ranking import TIE_TOLERANCE
from modeling_llm2clip.evaluation.tasks import classification
from modeling_llm2clip.evaluation.tasks.classification import (
    CLASSIFICATION,
    find_tied_classes,
    rank_classes,
)


def test_a_class_is_the_mean_of_its_prompts_at_unit_length(tmp_path: Path) -> None:
    # Prompts of unlike length: their unit embeddings count, so that class A points north-east.
    texts = {"an A": (100.0, 0.0), "the A": (0.0, 0.01), "an B": WEST, "the B": WEST}
    images = {"p0": NORTH_EAST, "p1": WEST, "p2": (-1.0, 0.9)}
    data = make_classification_dataset([0, 1, 0], ["A", "B"], templates=("an {}", "the {}"))
    found = CLASSIFICATION.run(open_embeddings(tmp_path, texts, images), (data,)).scores
    assert found["top_1"]["value"] == pytest.approx(2 / 3)
    assert found["mean_per_class_top_1"] == 0.75  # A: one of two, B: one of one
    assert found["top_1_of_class"] == {"A": 0.5, "B": 1.0}
    assert found["most_confused"] == [{"class": "A", "predicted": "B", "count": 1}]
    assert "top_5" not in found  # of two classes it would always be 1


def test_classes_that_tie_are_a_wrong_answer(tmp_path: Path) -> None:
    texts = {"A": EAST, "B": EAST, "C": NORTH}
    data = make_classification_dataset([0, 2], ["A", "B", "C"])
    encoder = open_embeddings(tmp_path, texts, {"p0": EAST, "p1": NORTH})
    found = CLASSIFICATION.run(encoder, (data,)).scores
    assert found["top_1"]["value"] == 0.5
    assert found["classes_with_tied_embeddings"] == ["A", "B"]
    assert found["most_confused"] == [{"class": "A", "predicted": "B", "count": 1}]


def test_ranks_of_classes_do_not_depend_on_the_images_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Few small integers: classes tie, and are equal.
    generator = torch.Generator().manual_seed(0)
    images, classes = (
        F.normalize(torch.randint(-2, 3, (n, 5), generator=generator).float(), dim=-1)
        for n in (50, 9)
    )
    labels = torch.randint(0, 9, (50,), generator=generator)
    scores = images.double() @ classes.double().T
    own = scores[torch.arange(50), labels]
    is_before = scores >= own[:, None] - TIE_TOLERANCE
    is_before[torch.arange(50), labels] = False
    assert (is_before.sum(dim=1) > 0).any() and (is_before.sum(dim=1) == 0).any()
    monkeypatch.setattr(classification, "_IMAGES_AT_A_TIME", 7)
    ranks, _ = rank_classes(images, classes, labels, device=torch.device("cpu"))
    assert torch.equal(ranks, 1 + is_before.sum(dim=1))


@pytest.mark.parametrize(("below", "rank"), [(0.0, 2), (9e-7, 2), (1.1e-6, 1)])
def test_a_class_within_the_tolerance_is_ranked_before_the_right_one(
    below: float, rank: int
) -> None:
    cosines = torch.tensor([0.8, 0.8 - below], dtype=torch.float64)
    classes = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    ranks, predicted = rank_classes(torch.tensor([[1.0, 0.0]]), classes, torch.tensor([0]))
    assert (ranks.tolist(), predicted.tolist()) == ([rank], [rank - 1])


def test_classes_whose_embeddings_tie_are_found_among_near_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.nn.functional.normalize(torch.randn(1500, 16, generator=generator), dim=-1)
    classes[1400] = classes[3]
    # Ten times the width of a tie away: near in a cosine of float32, and yet another class.
    shifted = classes[7].double() + 10 * TIE_TOLERANCE * torch.eye(16, dtype=torch.float64)[0]
    assert find_tied_classes(classes) == [3, 1400]
    near = torch.cat([classes.double(), shifted[None]])
    assert find_tied_classes(near) == [3, 1400]


def test_top_5_finds_what_top_1_misses(tmp_path: Path) -> None:
    names = [str(i) for i in range(7)]
    texts = {name: torch.eye(7)[i].tolist() for i, name in enumerate(names)}
    # Class i is liked less the higher i is: the image's own class 4 is fifth, class 5 sixth.
    liking = [7.0, 6, 5, 4, 3, 2, 1]
    data = make_classification_dataset([4, 5], names)
    encoder = open_embeddings(tmp_path, texts, {"p0": liking, "p1": liking})
    found = CLASSIFICATION.run(encoder, (data,)).scores
    assert (found["top_1"]["value"], found["top_5"]["value"]) == (0.0, 0.5)
