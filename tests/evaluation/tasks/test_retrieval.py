"""Retrieval, and caption retrieval accuracy, on embeddings whose scores are known by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from embeddings_by_hand import EAST, NORTH, WEST, make_retrieval_dataset, open_embeddings

from modeling_llm2clip.data.captions.caption_groups import CaptionGroup
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.tasks.retrieval import (
    CRA,
    CROSS_LINGUAL,
    RETRIEVAL,
    measure_caption_retrieval,
)
from modeling_llm2clip.evaluation.tasks.text_length import LENGTH


def test_directions_are_not_swapped(tmp_path: Path) -> None:
    # Both captions are nearest to p0, so text to image finds one of two; each image is
    # nearest to its own caption, so image to text finds both.
    texts = {"first": EAST, "second": (1.0, 0.2)}
    images = {"p0": EAST, "p1": NORTH}
    encoder = open_embeddings(tmp_path, texts, images)
    found = RETRIEVAL.run(encoder, (make_retrieval_dataset(list(texts), [0, 1]),)).scores
    assert found["t2i"]["hit_rate_at_1"] == 0.5
    assert found["i2t"]["hit_rate_at_1"] == 1.0
    assert found["t2i"]["chance_hit_rate_at_1"] == 0.5


def test_chance_among_n_images_is_one_in_n_to_the_last_bit(tmp_path: Path) -> None:
    names = [str(number) for number in range(3)]  # 1 / 3 has no end in binary
    embeddings = {name: torch.eye(3)[row].tolist() for row, name in enumerate(names)}
    images = {f"p{name}": embedding for name, embedding in embeddings.items()}
    encoder = open_embeddings(tmp_path, embeddings, images)
    data = make_retrieval_dataset(names, [0, 1, 2])
    scores = RETRIEVAL.run(encoder, (data,)).scores
    assert scores["t2i"]["chance_hit_rate_at_1"] == 1 / 3
    assert LENGTH.run(encoder, (data,)).scores["chance"] == 1 / 3


def test_several_captions_of_an_image_are_one_hit_and_half_a_recall(tmp_path: Path) -> None:
    texts = {"near": EAST, "far": WEST, "other": NORTH}
    images = {"p0": EAST, "p1": NORTH}
    encoder = open_embeddings(tmp_path, texts, images)
    found = RETRIEVAL.run(encoder, (make_retrieval_dataset(list(texts), [0, 0, 1]),))
    to_text = found.scores["i2t"]
    assert to_text["hit_rate_at_1"] == 1.0
    assert to_text["recall_at_1"] == 0.75  # p0 finds one of two, p1 one of one
    assert to_text["chance_hit_rate_at_1"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found.counts == {"images": 2, "texts": 3, "texts_truncated": None}


def test_copies_of_an_image_in_its_group_make_no_interval_narrower(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = {f"t{i}": torch.randn(8, generator=generator).tolist() for i in range(30)}
    once = {f"p{i}": torch.randn(8, generator=generator).tolist() for i in range(30)}
    copies = {f"{name}{copy}": embed for copy in "abc" for name, embed in once.items()}
    encoder = open_embeddings(tmp_path, texts, {**once, **copies})
    alone = make_retrieval_dataset(list(texts), list(range(30)))
    repeated = replace(
        alone,
        images=tuple(map(Path, copies)),
        image_names=tuple(copies),
        image_group_ids=tuple(name[:-1] for name in copies),
        correspondence=Correspondence.from_group_ids([name[:-1] for name in copies], list(once)),
    )
    expected, scores = (RETRIEVAL.run(encoder, (data,)).scores for data in (alone, repeated))
    # The same sums and sizes, three times as large: the means of the samples are the same.
    assert scores["i2t"]["intervals"] == expected["i2t"]["intervals"]
    interval = scores["i2t"]["intervals"]["hit_rate_at_5"]
    assert interval["value"] == scores["i2t"]["hit_rate_at_5"]
    assert 0 <= interval["low"] < interval["value"] < interval["high"] <= 1
    across = CROSS_LINGUAL.run(encoder, (repeated, replace(repeated, lang="de"))).scores["mean"]
    for name, interval in across["i2t"]["intervals"].items():
        assert interval == pytest.approx(expected["i2t"]["intervals"][name])


def test_every_language_counts_the_same_in_the_mean(tmp_path: Path) -> None:
    texts = {"east": EAST, "north": NORTH, "Norden": EAST, "Osten": NORTH, "ost": EAST}
    encoder = open_embeddings(tmp_path, texts, {"p0": EAST, "p1": NORTH})
    english = make_retrieval_dataset(["east", "north"], [0, 1])
    german = make_retrieval_dataset(["Norden", "Osten", "ost"], [1, 0, 0], lang="de")
    found = CROSS_LINGUAL.run(encoder, (english, german)).scores
    rate = {lang: s["t2i"]["hit_rate_at_1"] for lang, s in found["languages"].items()}
    assert rate == {"en": 1.0, "de": pytest.approx(1 / 3)}
    assert found["mean"]["t2i"]["hit_rate_at_1"] == pytest.approx(2 / 3)
    alone = RETRIEVAL.run(encoder, (german,)).scores
    assert found["languages"]["de"] == alone
    # One language is its own mean, with the same samples.
    scores = CROSS_LINGUAL.run(encoder, (german,)).scores
    for direction in ("t2i", "i2t"):
        for name, interval in scores["mean"][direction]["intervals"].items():
            assert interval == pytest.approx(alone[direction]["intervals"][name])


def test_cra_is_what_fine_tuning_measures(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = {f"t{i}": torch.randn(6, generator=generator).tolist() for i in range(40)}
    data = make_retrieval_dataset(list(texts), [i // 2 for i in range(40)], shown=False)
    scores = CRA.run(open_embeddings(tmp_path, texts), (data,)).scores
    groups = [CaptionGroup(f"p{i}", (f"t{2 * i}", f"t{2 * i + 1}")) for i in range(20)]
    expected = measure_caption_retrieval(
        lambda captions: torch.tensor([texts[c] for c in captions]), groups
    )
    assert scores["cra"]["value"] == pytest.approx(expected)
    assert scores["chance"] == 1 / 20


def test_cra_needs_two_captions_per_image_and_lets_no_text_find_itself(tmp_path: Path) -> None:
    encoder = open_embeddings(tmp_path, {"a": EAST, "b": NORTH, "c": WEST})
    for captions, images, message in (
        (["a", "b", "c"], [0, 0, 1], r"1 of 2 images have only one caption: \['p1'\]"),
        (
            ["a", "a", "b", "b"],
            [0, 0, 1, 1],
            r"2 of 2 images have only one caption: \['p0', 'p1'\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            CRA.run(encoder, (make_retrieval_dataset(captions, images, shown=False),))
    third = make_retrieval_dataset(["a", "a", "b", "b", "c"], [0, 0, 0, 1, 1], shown=False)
    assert [group.captions for group in third.group_captions()] == [("a", "b"), ("b", "c")]
