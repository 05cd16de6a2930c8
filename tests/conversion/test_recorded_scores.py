"""Scores of a converted checkpoint are those that OneIG-Bench's code gave, pair by pair."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from converting import convert_family, read_captions, read_golden
from PIL import Image

from modeling_llm2clip import load_model, score_pairs
from modeling_llm2clip.__main__ import main


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_family("openai", tmp_path_factory.mktemp("openai"))


def test_scores_are_those_of_the_official_formula(converted: Path) -> None:
    golden = read_golden("pair_scores")
    images = [Image.fromarray(image.numpy()) for image in golden["images"]]
    model, processor = load_model(converted, device="cpu")
    found = score_pairs(model, processor, images, read_captions()[0][: len(images)]).double()
    print((found-golden["scores"]).abs().max(), (found-golden["scores_bfloat16"]).abs().max())
