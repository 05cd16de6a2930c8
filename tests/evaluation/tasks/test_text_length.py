"""Scores by length on embeddings whose scores are known by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from embeddings_by_hand import EAST, NORTH, WEST, make_retrieval_dataset, open_embeddings

from modeling_llm2clip.evaluation.tasks.text_length import LENGTH, count_clip_tokens, split_in_half


def test_clip_tokens_are_those_of_clips_tokenizer() -> None:
    assert count_clip_tokens(["a dog", "A  dog ", "a photo of a dog."]) == [2, 2, 6]


def test_the_length_task_scores_each_bucket_by_itself(tmp_path: Path) -> None:
    short, long = "a dog", " ".join(["dog"] * 100)
    texts = {short: EAST, long: EAST}
    encoder = open_embeddings(tmp_path, texts, {"p0": EAST, "p1": NORTH})
    found = LENGTH.run(encoder, (make_retrieval_dataset([short, long], [0, 1]),)).scores
    first, second = found["buckets"]
    assert (first["from_clip_tokens"], first["to_clip_tokens"]) == (1, 20)
    assert (second["from_clip_tokens"], second["to_clip_tokens"]) == (76, 110)
    assert first["hit_rate_at_1"]["value"] == 1.0 and second["hit_rate_at_1"]["value"] == 0.0
    assert second["share_of_tokens_beyond_clip"] == 0.25
    assert found["all"]["queries"] == 2 and found["all"]["hit_rate_at_1"]["value"] == 0.5
    assert found["all"]["share_of_tokens_beyond_clip"] == pytest.approx(25 / 102)
    assert found["all"]["share_truncated"] is None


def test_captions_of_one_image_are_sampled_together(tmp_path: Path) -> None:
    captions = [f"dog {number}" for number in range(6)]
    encoder = open_embeddings(tmp_path, dict.fromkeys(captions, EAST), {"p0": EAST, "p1": NORTH})
    found = LENGTH.run(encoder, (make_retrieval_dataset(captions, [0, 0, 0, 1, 1, 1]),)).scores
    # All captions of the first image are right, and those of the second wrong: a sample of two
    # images has only the first in a quarter of the cases, and only the second in another.
    assert found["all"]["hit_rate_at_1"] == {"value": 0.5, "low": 0.0, "high": 1.0}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One dog. Two cats sleep here. Three.", ("One dog.", "Two cats sleep here. Three.")),
        ("a dog on a mat", ("a dog", "on a mat")),
        ("狗在叫。猫在睡。", ("狗在叫。", "猫在睡。")),
        ("dog", None),
        ("dog.", None),
    ],
)
def test_a_text_is_split_near_its_middle(text: str, parts: tuple[str, str] | None) -> None:
    assert split_in_half(text) == parts


def test_without_images_a_first_half_retrieves_its_second(tmp_path: Path) -> None:
    texts = {"One.": EAST, "Two.": EAST, "Three.": NORTH, "Four.": WEST}
    data = make_retrieval_dataset(["One. Two.", "Three. Four."], [0, 1], shown=False)
    found = LENGTH.run(open_embeddings(tmp_path, texts), (data,))
    # "Three." is as far from "Two." as from nothing else: north is nearer to east than to west.
    assert found.scores["all"]["hit_rate_at_1"]["value"] == 0.5
    assert found.counts["queries"] == 2 and found.counts["texts"] == 4
