"""Pairs of images and texts are complete, occur once, and are seen from both sides."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence


def test_groups_pair_each_of_their_images_with_each_of_their_texts():
    chosen = random.Random(0)
    images, texts = ([*"abcdefgh", *chosen.choices("abcdefgh", k=count)] for count in (4, 12))
    found = Correspondence.from_group_ids(images, texts)
    pairs = zip(found.image_of_pair.tolist(), found.text_of_pair.tolist(), strict=True)
    wanted = product(range(12), range(20))
    assert sorted(pairs) == [(i, t) for i, t in wanted if images[i] == texts[t]]


def test_captions_need_not_be_adjacent_or_equally_many():
    correspondence = Correspondence.from_image_of_text([1, 0, 1, 1], 2)
    texts = correspondence.texts_of_images()
    assert texts.of(0).tolist() == [1] and texts.of(1).tolist() == [0, 2, 3]
    assert correspondence.image_of_pair[texts.pairs].tolist() == [0, 1, 1, 1]


def make(images, texts, num_images=2, num_texts=2):
    return Correspondence(num_images, num_texts, torch.tensor(images), torch.tensor(texts))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make([0, 1, 0], [0, 1, 0]), r"1 repeated pair: \(0, 0\)"),
        (lambda: make([0, 1, 2], [0, 1, 0]), r"image_of_pair must have .*row, from 0 to 1.* 2\."),
        (lambda: make([0, 1], [-1, 1]), r"text_of_pair must have .*row, from 0 to 1.*got -1, 1"),
        (lambda: make([0, 1], [0, 0]), r"Images without a text: none; .* without an image: 1\."),
        (lambda: make([0, 0], [0, 1]), r"Images without a text: 1; .* without an image: none\."),
        (lambda: make([0, 1, 1], [0, 1]), r"text_of_pair is torch.int64 \(2,\); it must be"),
        (lambda: make([0.0, 1.0], [0, 1]), r"image_of_pair is torch.float32"),
        (lambda: Correspondence.from_group_ids([], []), r"at least one row.*got none"),
        (lambda: Correspondence.from_group_ids("ab", "bc"), r"Images without a text: 0; .*: 1\."),
        (lambda: Correspondence.from_image_of_text([0, 2], 2), r"row, from 0 to 1.*got 0, 2"),
    ],
)
def test_incomplete_or_repeated_pairs_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
