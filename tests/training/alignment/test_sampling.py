"""Stage 3, what a step sees: captions, batches and images."""

from __future__ import annotations

import io
import os
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from aligning import NUM_RECORDS, SHORT_RUN, Prepared
from captioned_files import write_shard
from PIL import Image
from shard_server import ShardServer
from transformers import TrainingArguments

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.data.records.record_columns import hash_text
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.remote import file_places
from modeling_llm2clip.training.alignment.alignment_data import AlignmentDataset
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.alignment.run_data import RecordData, count_workers
from modeling_llm2clip.training.alignment.sampling import (
    ResumableBatchSampler,
    mix,
    sample_captions,
    sample_normal,
)


@pytest.mark.slow  # starts a process
def test_processes_that_make_batches_read_files_in_the_states_that_were_loaded(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are not forked, as on macOS."""
    monkeypatch.setattr(file_places, "_states", {})
    image = io.BytesIO()
    Image.new("RGB", (9, 6), "red").save(image, "png")
    members = {f"{n}.png": image.getvalue() for n in range(4)}
    shard = write_shard(tmp_path / "0.tar", members | {f"{n}.txt": b"a text" for n in range(4)})
    with ShardServer(tmp_path) as server:
        records = load_records(f"{server.url}/0.tar")
        processor = LLM2CLIPProcessor.from_pretrained(prepared.model)
        config = AlignConfig(**SHORT_RUN, num_workers=1)
        data = RecordData(AlignmentDataset(records, processor), np.arange(4), config)
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        loader = data.make_loader(arguments, batch_size=2, num_steps=1)
        loader.multiprocessing_context = "spawn"
        os.utime(shard, ns=(1, 1))
        with pytest.raises(ValueError, match="the file has changed while it was used"):
            list(loader)


def sample(num_short: int, num_long: int, *, ratio: float, count: int) -> list[tuple[bool, int]]:
    """Whether each sampled caption is a long one, and its number among the long or short ones."""
    items = np.arange(count)
    numbers = sample_captions(
        np.full(count, num_short), np.full(count, num_long),
        long_caption_ratio=ratio, seed=1, epochs=np.zeros(count, int), items=items,
    )  # fmt: skip
    return [(n >= num_short, n - num_short * (n >= num_short)) for n in numbers.tolist()]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_long_captions_are_sampled_as_often_as_asked(ratio: float) -> None:
    sampled = sample(2, 3, ratio=ratio, count=4000)
    # Four standard deviations of 4000 coins are 0.03.
    assert sum(is_long for is_long, _ in sampled) / 4000 == pytest.approx(ratio, abs=0.03)
    for wanted, num_captions in ((False, 2), (True, 3)):
        counts = Counter(number for is_long, number in sampled if is_long == wanted)
        total = sum(counts.values())
        for number in range(num_captions if total else 0):
            # The same for the smallest group, about 1200.
            assert counts[number] / total == pytest.approx(1 / num_captions, abs=0.06)


@pytest.mark.parametrize(("num_short", "num_long", "is_long"), [(2, 0, False), (0, 2, True)])
def test_an_image_without_long_captions_shows_short_ones_and_the_reverse(
    num_short: int, num_long: int, is_long: bool
) -> None:
    sampled = sample(num_short, num_long, ratio=0.5, count=50)
    assert {one for one, _ in sampled} == {is_long}
    assert {number for _, number in sampled} == {0, 1}


def test_a_sample_does_not_depend_on_the_others_of_its_batch() -> None:
    def draw(items: list[int]) -> list[int]:
        count = np.full(len(items), 9)
        drawn = sample_captions(
            count, count, long_caption_ratio=0.5, seed=3, epochs=count, items=np.array(items)
        )
        return [int(number) for number in drawn]

    assert draw([5, 2, 8]) == [draw([item])[0] for item in (5, 2, 8)]


def test_numbers_are_mixed_as_splitmix_does() -> None:
    # The reference generator of seed 0: https://prng.di.unimi.it/splitmix64.c
    assert int(mix(0)) == 0xE220A8397B1DCDAF
    assert mix(np.array([0, -1]), 7).tolist() == [int(mix(0, 7)), int(mix(-1, 7))]


def test_every_epoch_shows_every_image_once_in_another_order() -> None:
    batches = list(ResumableBatchSampler(np.arange(12), batch_size=4, num_steps=6, seed=0))
    epochs = [np.concatenate(half) for half in (batches[:3], batches[3:])]
    for number, pairs in enumerate(epochs):
        assert set(pairs[:, 0].tolist()) == {number}
        assert sorted(pairs[:, 1].tolist()) == list(range(12))
    assert epochs[0][:, 1].tolist() != epochs[1][:, 1].tolist()


def test_processes_share_the_batches_of_one() -> None:
    settings: dict[str, Any] = {"batch_size": 4, "num_steps": 5, "seed": 0}
    shares = [
        ResumableBatchSampler(np.arange(10), rank=rank, num_processes=2, **settings)
        for rank in range(2)
    ]
    for whole, *parts in zip(
        ResumableBatchSampler(np.arange(10), **settings), *shares, strict=True
    ):
        assert whole.tolist() == np.concatenate(parts).tolist()


def test_stored_and_online_captions_are_the_same_samples(prepared: Prepared) -> None:
    records, processor = prepared.records, LLM2CLIPProcessor.from_pretrained(prepared.model)
    online = AlignmentDataset(records, processor, AlignConfig(seed=5))
    stored = AlignmentDataset(
        records, processor, AlignConfig(seed=5), caption_store=prepared.caption_store
    )
    samples = np.array([(3, item) for item in range(NUM_RECORDS)])
    model = LLM2CLIPModel.from_pretrained(prepared.model)
    tokens, embeddings = (
        online.__getitems__(samples),
        stored.__getitems__(samples)["caption_embeds"],
    )
    with torch.no_grad():
        wanted = model.get_caption_embeds(tokens["input_ids"], tokens["attention_mask"])
    # Another batch, so sums in another order; embeddings of length about 5.
    torch.testing.assert_close(embeddings, wanted, atol=1e-4, rtol=1e-5)


def test_noise_is_projected_and_a_loss_gets_embeddings_without_it(prepared: Prepared) -> None:
    """STRUCTURE keeps the neighbors of the latter: noise leaves an image hardly any."""
    processor = LLM2CLIPProcessor.from_pretrained(prepared.model)
    stores = {"caption_store": prepared.caption_store, "image_store": prepared.image_store}
    samples = np.array([(3, item) for item in range(NUM_RECORDS)])
    clean, noisy = (
        AlignmentDataset(
            prepared.records,
            processor,
            AlignConfig(seed=5, image_noise=noise, caption_noise=noise),
            **stores,
        ).__getitems__(samples)
        for noise in (0.0, 1.0)
    )
    model = AlignmentModel.from_pretrained(prepared.model, with_llm=False, with_vision_tower=False)
    with torch.no_grad():
        (_, wanted), (_, found) = (model.eval()(**batch) for batch in (clean, noisy))
        moved = model.to_image_embeds(noisy["vision_embeds"] + noisy["vision_noise"])
    assert torch.equal(found.vision_embeds, wanted.vision_embeds)
    assert torch.equal(found.caption_embeds, wanted.caption_embeds)
    assert torch.equal(found.image_embeds, moved)
    for side in ("image_embeds", "text_embeds"):
        assert not torch.isclose(getattr(found, side), getattr(wanted, side)).all(dim=1).any()


def test_training_and_extraction_see_the_same_pixels_of_a_large_jpeg(
    prepared: Prepared, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.jpg", quality=95)
    processor = LLM2CLIPProcessor.from_pretrained(prepared.model)
    record = replace(prepared.records[0], image=tmp_path / "large.jpg")
    trained_on = AlignmentDataset([record], processor).read_pairs(np.array([0]), np.array([0]))
    extracted = processor(images=[Image.open(tmp_path / "large.jpg")])
    assert torch.equal(trained_on["pixel_values"], extracted["pixel_values"])


def test_noise_on_embeddings_is_normal_and_each_samples_own() -> None:
    def draw(items: list[int], side: int) -> torch.Tensor:
        return sample_normal(0, np.ones(len(items), int), np.array(items), side, width=200)

    noise = draw(list(range(500)), 2)
    # Of 100,000 numbers the mean is within four standard errors of 0, the deviation of 1.
    assert abs(float(noise.mean())) < 4 * 100_000**-0.5
    assert abs(float(noise.std()) - 1) < 4 * 200_000**-0.5
    assert torch.equal(draw([7, 8], 2), noise[7:9])
    # Neither side nor epoch repeats another's.
    assert not torch.equal(draw([7], 3)[0], noise[7])
    assert abs(float((noise[0] * noise[1]).mean())) < 4 * 200**-0.5
    # Neighbors in a row are quarters of one word: of 99,500 products, four standard errors.
    assert abs(float((noise[:, 1:] * noise[:, :-1]).mean())) < 4 * 99_500**-0.5
    # The largest gap to the normal distribution function is above this once in 2,000 samples of
    # 100,000 numbers (Kolmogorov: 1.95 over the root of their count).
    found = torch.special.ndtr(noise.flatten().double()).sort().values
    assert float((found - torch.linspace(0, 1, 100_000)).abs().max()) < 1.95 * 100_000**-0.5


def test_noise_takes_little_more_memory_than_itself() -> None:
    sample_normal(0, np.zeros(1, int), np.zeros(1, int), 2, width=8)
    tracemalloc.start()
    try:
        noise = sample_normal(0, np.zeros(1000, int), np.arange(1000), 2, width=1024)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 4 MB, and the words of a few rows; pages that the system hands out anew would cost more time
    # than the numbers.
    assert peak < 1.5 * noise.nbytes


@pytest.mark.parametrize(
    ("device", "decodes", "wanted"), [("cuda", True, 3), ("cuda", False, 0), ("cpu", True, 0)]
)
def test_the_processes_of_one_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, device: str, decodes: bool, wanted: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    of_eight_machines = SimpleNamespace(device=torch.device(device), world_size=16)
    arguments = cast(TrainingArguments, of_eight_machines)
    assert count_workers(AlignConfig(), arguments, decodes=decodes) == wanted
    assert count_workers(AlignConfig(num_workers=5), arguments, decodes=decodes) == 5


def test_equal_captions_of_a_batch_have_one_key(prepared: Prepared) -> None:
    texts = [("one", "two"), ("two",), ("three", "one")]
    records = [
        replace(record, captions=captions, long_captions=("long",))
        for record, captions in zip(prepared.records, texts, strict=False)
    ]
    dataset = AlignmentDataset(records, LLM2CLIPProcessor.from_pretrained(prepared.model))
    items, numbers = np.array([0, 0, 1, 2, 2, 1]), np.array([0, 1, 0, 0, 1, 1])
    wanted = [hash_text(text) for text in ("one", "two", "two", "three", "one", "long")]
    assert dataset.read_text_keys(items, numbers).tolist() == wanted
    batch = dataset.__getitems__(np.array([[0, 0], [0, 1], [1, 2]]))
    shown = {hash_text(text) for record in records for text in (*record.captions, "long")}
    assert batch["text_keys"].shape == batch["group_ids"].shape == (3,)
    assert set(batch["text_keys"].tolist()) <= shown
