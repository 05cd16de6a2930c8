"""Stage 3, what a step sees: the captions, the batches and the images that are drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aligning import NUM_RECORDS, Prepared
from PIL import Image

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.training.alignment.alignment_data import (
    AlignmentDataset,
)
from modeling_llm2clip.training.alignment.sampling import ResumableBatchSampler, sample_caption


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_long_captions_are_drawn_as_often_as_asked(share: float) -> None:
    drawn = [sample_caption(2, 3, long_share=share, seed=1, epoch=0, item=i) for i in range(4000)]
    # Four standard deviations of 4000 coins are 0.03.
    assert sum(is_long for is_long, _ in drawn) / 4000 == pytest.approx(share, abs=0.03)
    for kind, num_kind in ((False, 2), (True, 3)):
        counts = Counter(number for is_long, number in drawn if is_long == kind)
        total = sum(counts.values())
        for number in range(num_kind if total else 0):
            # The same for the smallest group, about 1200.
            assert counts[number] / total == pytest.approx(1 / num_kind, abs=0.06)


@pytest.mark.parametrize(("num_short", "num_long", "is_long"), [(2, 0, False), (0, 2, True)])
def test_the_only_kind_there_is_is_drawn(num_short: int, num_long: int, is_long: bool) -> None:
    for item in range(50):
        drawn = sample_caption(num_short, num_long, long_share=0.5, seed=0, epoch=0, item=item)
        assert drawn[0] == is_long and drawn[1] in (0, 1)


def test_every_epoch_shows_every_image_once_in_another_order() -> None:
    batches = list(ResumableBatchSampler(range(12), batch_size=4, num_steps=6, seed=0))
    epochs = [[pair for batch in half for pair in batch] for half in (batches[:3], batches[3:])]
    for number, pairs in enumerate(epochs):
        assert {epoch for epoch, _ in pairs} == {number}
        assert sorted(item for _, item in pairs) == list(range(12))
    assert [item for _, item in epochs[0]] != [item for _, item in epochs[1]]


def test_processes_share_the_batches_of_one() -> None:
    settings: dict[str, Any] = {"batch_size": 4, "num_steps": 5, "seed": 0}
    halves = [
        ResumableBatchSampler(range(10), rank=rank, num_processes=2, **settings)
        for rank in range(2)
    ]
    for whole, *parts in zip(ResumableBatchSampler(range(10), **settings), *halves, strict=True):
        assert whole == parts[0] + parts[1]


def test_stored_and_online_captions_are_the_same_draws(prepared: Prepared) -> None:
    records, processor = prepared.records, LLM2CLIPProcessor.from_pretrained(prepared.model)
    online = AlignmentDataset(records, processor, seed=5)
    stored = AlignmentDataset(records, processor, seed=5, caption_store=prepared.caption_store)
    draws = [(3, item) for item in range(NUM_RECORDS)]
    model = LLM2CLIPModel.from_pretrained(prepared.model)
    tokens, embeddings = online.__getitems__(draws), stored.__getitems__(draws)["caption_embeds"]
    with torch.no_grad():
        wanted = model.get_caption_embeds(tokens["input_ids"], tokens["attention_mask"])
    # Another batch, so sums in another order; embeddings of length about 5.
    torch.testing.assert_close(embeddings, wanted, atol=1e-4, rtol=1e-5)


def test_training_and_extraction_see_the_same_pixels_of_a_large_jpeg(
    prepared: Prepared, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.jpg", quality=95)
    processor = LLM2CLIPProcessor.from_pretrained(prepared.model)
    record = replace(prepared.records[0], image=tmp_path / "large.jpg")
    trained_on = AlignmentDataset([record], processor).read_pairs([(0, (False, 0))])
    extracted = processor(images=[Image.open(tmp_path / "large.jpg")])
    assert torch.equal(trained_on["pixel_values"], extracted["pixel_values"])
