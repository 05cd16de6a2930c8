"""Caption retrieval accuracy on embeddings whose scores are known by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from embeddings_by_hand import (
    EAST,
    NORTH,
    WEST,
    make_retrieval_dataset,
    open_embeddings,
)

from modeling_llm2clip.data.captions.caption_groups import CaptionGroup
from modeling_llm2clip.evaluation.tasks.retrieval import CRA, measure_caption_retrieval


def test_cra_is_what_fine_tuning_measures(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = {f"t{i}": torch.randn(6, generator=generator).tolist() for i in range(40)}
    data = make_retrieval_dataset(list(texts), [i // 2 for i in range(40)], shown=False)
    found = CRA.run(open_embeddings(tmp_path, texts), (data,)).scores
    groups = [CaptionGroup(f"p{i}", (f"t{2 * i}", f"t{2 * i + 1}")) for i in range(20)]
    wanted = measure_caption_retrieval(
        lambda captions: torch.tensor([texts[c] for c in captions]), groups
    )
    assert found["cra"]["value"] == pytest.approx(wanted)
    assert found["chance"] == 1 / 20


def test_cra_needs_two_captions_per_image(tmp_path: Path) -> None:
    texts = {"a": EAST, "b": NORTH, "c": WEST}
    data = make_retrieval_dataset(list(texts), [0, 0, 1], shown=False)
    with pytest.raises(ValueError, match=r"1 of 2 have only one: \['p1'\]"):
        CRA.run(open_embeddings(tmp_path, texts), (data,))


def test_cra_does_not_let_a_text_find_itself(tmp_path: Path) -> None:
    texts = {"a": EAST, "b": NORTH, "c": WEST}
    twice = make_retrieval_dataset(["a", "a", "b", "b"], [0, 0, 1, 1], shown=False)
    with pytest.raises(ValueError, match=r"2 of 2 have only one: \['p0', 'p1'\]"):
        CRA.run(open_embeddings(tmp_path, texts), (twice,))
    third = make_retrieval_dataset(["a", "a", "b", "b", "c"], [0, 0, 0, 1, 1], shown=False)
    assert [group.captions for group in third.group_captions()] == [("a", "b"), ("b", "c")]
