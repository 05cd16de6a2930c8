"""Compositional choices on embeddings whose scores are known by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from embeddings_by_hand import EAST, NORTH, make_choices, open_embeddings

from modeling_llm2clip.evaluation.datasets.choice_dataset import ChoiceItem
from modeling_llm2clip.evaluation.tasks.choices import _CHANCES, CHOICES


def test_the_true_caption_must_be_nearer_and_a_tie_is_wrong(tmp_path: Path) -> None:
    texts = {"true": EAST, "false": NORTH, "same": EAST}
    items = (
        ChoiceItem(name="p0", category="swap", captions=("true", "false"), images=(Path("p0"),)),
        ChoiceItem(name="p1", category="swap", captions=("true", "false"), images=(Path("p1"),)),
        ChoiceItem(name="p0b", category="replace", captions=("true", "same"), images=(Path("p0"),)),
    )
    encoder = open_embeddings(tmp_path, texts, {"p0": EAST, "p1": NORTH, "p0b": EAST})
    found = CHOICES.run(encoder, (make_choices("image", items),))
    assert found.scores["accuracy"]["value"] == pytest.approx(1 / 3)
    assert found.scores["categories"]["swap"] == {"items": 2, "accuracy": 0.5}
    assert found.counts["items"] == 3 and found.counts["images"] == 2


def test_questions_about_one_image_are_sampled_together(tmp_path: Path) -> None:
    texts = {"true": EAST, "false": NORTH}
    answers = {f"p{number}": EAST if number % 3 else NORTH for number in range(24)}
    encoder = open_embeddings(
        tmp_path, texts, answers | {f"{n} again": e for n, e in answers.items()}
    )
    once = [
        ChoiceItem(name=name, category="all", captions=("true", "false"), images=(Path(name),))
        for name in answers
    ]
    twice = [*once, *(replace(item, name=f"{item.name} again") for item in once)]
    expected, scores = (
        CHOICES.run(encoder, (make_choices("image", items),)).scores["accuracy"]
        for items in (once, twice)
    )
    assert scores == expected and expected["low"] < expected["value"] < expected["high"]


def test_an_anchor_takes_the_place_of_the_image(tmp_path: Path) -> None:
    texts = {"true": EAST, "false": NORTH, "anchor": (1.0, 0.1), "misleading": (0.1, 1.0)}
    items = tuple(
        ChoiceItem(name=anchor, category="swap", captions=("true", "false"), anchor=anchor)
        for anchor in ("anchor", "misleading")
    )
    encoder = open_embeddings(tmp_path, texts)
    found = CHOICES.run(encoder, (make_choices("text", items),)).scores
    assert found["accuracy"]["value"] == 0.5


@pytest.mark.parametrize(
    ("images", "wanted"),
    [
        ((EAST, NORTH), {"text": 1, "image": 1, "group": 1}),
        # Both images find their captions, but the first is nearer to both captions.
        (((0.9, 0.8, 0.0), (0.1, 0.2, 1.0)), {"text": 1, "image": 0, "group": 0}),
        # Each caption finds its image, but the first caption is nearer to both.
        (((0.9, 0.1), (0.8, 0.6)), {"text": 0, "image": 1, "group": 0}),
        ((NORTH, EAST), {"text": 0, "image": 0, "group": 0}),
    ],
)
def test_winoground_scores_have_their_directions(
    images: Any, wanted: dict[str, int], tmp_path: Path
) -> None:
    width = len(images[0])
    texts = {"c0": torch.eye(width)[0].tolist(), "c1": torch.eye(width)[1].tolist()}
    items = (
        ChoiceItem(name="w", category="swap", captions=("c0", "c1"), images=(Path("a"), Path("b"))),
    )
    encoder = open_embeddings(tmp_path, texts, {"w/0": images[0], "w/1": images[1]})
    found = CHOICES.run(encoder, (make_choices("images", items),)).scores
    assert {name: found[name]["value"] for name in wanted} == wanted


def test_winoground_chances_are_those_of_random_scores() -> None:
    # Four independent numbers a question, as embeddings without meaning give them.
    scores = torch.rand(400_000, 2, 2, generator=torch.Generator().manual_seed(0))
    text = (scores[:, 0, 0] > scores[:, 0, 1]) & (scores[:, 1, 1] > scores[:, 1, 0])
    image = (scores[:, 0, 0] > scores[:, 1, 0]) & (scores[:, 1, 1] > scores[:, 0, 1])
    found = {"text": text, "image": image, "group": text & image}
    for name, right in found.items():
        # Six standard deviations of a share of 400,000 draws: 0.005 at most.
        assert float(right.double().mean()) == pytest.approx(_CHANCES[name], abs=0.005)
