"""Stage 3, what a step sees: captions, sentence views, batches and images."""

from __future__ import annotations

import io
import os
import resource
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from aligning import NUM_RECORDS, SHORT_RUN, Prepared
from captioned_files import write_shard
from interruptions import read_bytes
from PIL import Image
from shard_server import ShardServer
from transformers import TrainingArguments

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.configs.train_config import TrainConfig
from modeling_llm2clip.data.captions.sentence_views import with_views
from modeling_llm2clip.data.records.record_columns import hash_text
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.remote import file_locations
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.data.streams.record_streams import stream_records
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.training.alignment.alignment_data import (
    AlignmentDataset,
    AlignmentStream,
    decode_sample,
)
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.alignment.held_out import HeldOutImages
from modeling_llm2clip.training.alignment.run_data import RecordData, count_workers
from modeling_llm2clip.training.alignment.sampling import (
    ResumableBatchSampler,
    mix,
    sample_captions,
    sample_normal,
    seed_rows,
)


@pytest.mark.slow  # starts a process
def test_processes_that_make_batches_read_files_in_the_states_that_were_loaded(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are not forked, as on macOS."""
    monkeypatch.setattr(file_locations, "_states", {})
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


@pytest.mark.slow  # beside the other test of its models
def test_a_batch_that_finds_no_shared_memory_is_an_error_not_a_wait(
    tmp_path: Path, prepared: Prepared
) -> None:
    processor = LLM2CLIPProcessor.from_pretrained(prepared.model)
    records, config = load_records(prepared.data), AlignConfig(**SHORT_RUN, num_workers=1)
    data = RecordData(AlignmentDataset(records, processor), np.arange(4), config)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    loader = data.make_loader(arguments, batch_size=4, num_steps=1)
    loader.timeout = 60
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limits[1]))  # of files in memory, too
    try:
        batches = iter(loader)  # starts the worker
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(OSError, match=r"no room .* shared memory .*--num-workers 0.*--shm-size"):
        next(batches)


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


def test_an_image_shows_the_captions_that_it_has() -> None:
    for num_short, num_long, is_long in ((2, 0, False), (0, 2, True)):
        sampled = sample(num_short, num_long, ratio=0.5, count=50)
        assert set(sampled) == {(is_long, 0), (is_long, 1)}


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
        )
        for noise in (0.0, 1.0)
    )
    clean, noisy = (data.complete(data.__getitems__(samples)) for data in (clean, noisy))
    model = AlignmentModel.from_pretrained(prepared.model, with_llm=False, with_vision_tower=False)
    with torch.no_grad():
        (_, wanted), (_, found) = (model.eval()(**batch) for batch in (clean, noisy))
        moved = model.to_image_embeds(noisy["vision_embeds"] + noisy["vision_noise"])
    assert torch.equal(found.vision_embeds, wanted.vision_embeds)
    assert torch.equal(found.caption_embeds, wanted.caption_embeds)
    assert torch.equal(found.image_embeds, moved)
    for name, number in (("vision", 2), ("caption", 3)):  # each side has noise of its own
        embeds = noisy[f"{name}_embeds"]
        normal = sample_normal(seed_rows(5, *samples.T, number), width=embeds.shape[1])
        noise = normal * embeds.norm(dim=1, keepdim=True) * embeds.shape[1] ** -0.5
        torch.testing.assert_close(noisy[f"{name}_noise"], noise)  # rounded in another order
    for side in ("image_embeds", "text_embeds"):
        assert not torch.isclose(getattr(found, side), getattr(wanted, side)).all(dim=1).any()


def test_training_and_extraction_see_the_same_pixels(prepared: Prepared, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.jpg", quality=95)
    processor = LLM2CLIPProcessor.from_pretrained(prepared.model)
    record = replace(prepared.records[0], image=tmp_path / "large.jpg")
    trained_on = AlignmentDataset([record], processor).read_pairs(np.array([0]), np.array([0]))
    extracted = processor(images=[Image.open(tmp_path / "large.jpg")])
    assert torch.equal(trained_on["pixel_values"], extracted["pixel_values"])


def test_noise_on_embeddings_is_normal_and_each_samples_own() -> None:
    def draw(items: list[int], side: int) -> torch.Tensor:
        seeds = seed_rows(0, np.ones(len(items), int), np.array(items), side)
        return sample_normal(seeds, width=200)

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
    seeds = seed_rows(0, np.zeros(1000, int), np.arange(1000), 2)
    sample_normal(seeds[:1], width=8)
    tracemalloc.start()
    try:
        noise = sample_normal(seeds, width=1024)
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


NUM_VIEWS = 3
OPTIONS: dict[str, Any] = {
    "store_dtype": "float32", "rows_per_shard": 16, "batch_size": 2, "device": "cpu",
    "show_progress": False, "sentence_views": NUM_VIEWS,
}  # fmt: skip
# Sums of float32 in another order: the captions had other neighbors.
ROUNDING = {"atol": 1e-4, "rtol": 1e-5}


class Viewed(NamedTuple):
    """Records with long captions of several sentences, and their store with views."""

    records: list[CaptionedImage]
    store: Path
    processor: LLM2CLIPProcessor

    def list_texts(self, item: int) -> tuple[str, ...]:
        record = self.records[item]
        return (*record.captions, *with_views(record.long_captions, NUM_VIEWS))


@pytest.fixture(scope="module")
def viewed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Viewed:
    """The first record has no long caption, the second one of a single sentence."""
    longs: list[tuple[str, ...]] = [(), ("one sentence",)]
    # Some views are those of several records.
    longs += [
        (f"A photo {n}. Thing {n} is red. It is big.", "A wall. It is big.") for n in range(22)
    ]
    records = [replace(r, long_captions=v) for r, v in zip(prepared.records, longs, strict=True)]
    folder = tmp_path_factory.mktemp("viewed") / "store"
    extract(prepared.model, records, folder, ExtractConfig(**OPTIONS), modality="text")
    return Viewed(records, folder, LLM2CLIPProcessor.from_pretrained(prepared.model))


def test_a_store_has_views_at_the_end(prepared: Prepared, viewed: Viewed, tmp_path: Path) -> None:
    store, model = EmbeddingStore.open(viewed.store), LLM2CLIPModel.from_pretrained(prepared.model)
    for item in (0, 1, 2, 23):
        rows = np.concatenate([store.rows_of(item), store.rows_of(item, long=True)])
        wanted = encode_texts(model, viewed.processor, viewed.list_texts(item), project=False)
        torch.testing.assert_close(store.read(rows), wanted, **ROUNDING)
    assert store.manifest.num_inputs == sum(len(viewed.list_texts(n)) for n in range(24))
    for part in ("1/2", "2/2"):
        extract(
            prepared.model, viewed.records, tmp_path / "parts", ExtractConfig(**OPTIONS),
            modality="text", partition=part,
        )  # fmt: skip
    assert read_bytes(tmp_path / "parts") == read_bytes(viewed.store)


def test_stored_and_online_views_are_the_same_samples(prepared: Prepared, viewed: Viewed) -> None:
    online = AlignmentDataset(
        viewed.records, viewed.processor, AlignConfig(**ONLINE, sentence_views=NUM_VIEWS, seed=5)
    )
    store = EmbeddingStore.open(viewed.store)
    stored = AlignmentDataset(
        viewed.records, viewed.processor, AlignConfig(seed=5), caption_store=store
    )
    samples = np.array([(epoch, item) for epoch in range(12) for item in range(24)])
    tokens, embeds = online.__getitems__(samples), stored.__getitems__(samples)
    model = LLM2CLIPModel.from_pretrained(prepared.model)
    with torch.no_grad():
        wanted = model.get_caption_embeds(tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(embeds["caption_embeds"], wanted, **ROUNDING)
    keys, rows = tokens["text_keys"], embeds["text_keys"]
    assert torch.equal(keys[:, None] == keys, rows[:, None] == rows)
    for item in range(24):
        drawn = set(keys[samples[:, 1] == item].tolist())
        assert drawn <= set(map(hash_text, viewed.list_texts(item)))
    every = {hash_text(text) for item in range(24) for text in viewed.list_texts(item)}
    assert len(set(keys.tolist())) > 0.9 * len(every)  # nothing is left out by its kind


def test_a_stream_samples_views_too(prepared: Prepared, viewed: Viewed) -> None:
    stream = stream_records(prepared.data)
    store = EmbeddingStore.open(viewed.store)
    joined = AlignmentStream(stream, viewed.processor, AlignConfig(seed=3), caption_store=store)
    online = AlignmentStream(
        stream, viewed.processor, AlignConfig(**ONLINE, sentence_views=NUM_VIEWS, seed=3)
    )
    samples = [decode_sample(record) for record in viewed.records]
    stored, tokens = joined.collate(samples), online.collate(samples)
    for name in ("pixel_values", "group_ids"):
        assert torch.equal(stored[name], tokens[name])
    model = LLM2CLIPModel.from_pretrained(prepared.model)
    with torch.no_grad():
        wanted = model.get_caption_embeds(tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(stored["caption_embeds"], wanted, **ROUNDING)
    own = {hash_text(t) for r in viewed.records for t in (*r.captions, *r.long_captions)}
    assert not set(tokens["text_keys"].tolist()) <= own
    # Held out of a stream is a part of the store; its records have the views of the store, too.
    AlignmentDataset(viewed.records[2:5], viewed.processor, caption_store=store, is_part=True)
    fewer = replace(viewed.records[4], long_captions=("A photo. It is big.", "A wall."))
    with pytest.raises(ValueError, match="1 of 1 records of a batch are not in"):
        joined.collate([decode_sample(fewer)])
    with pytest.raises(ValueError, match="1 record with other captions"):
        AlignmentDataset([fewer], viewed.processor, caption_store=store, is_part=True)


def test_held_out_images_are_scored_on_captions(prepared: Prepared, viewed: Viewed) -> None:
    store = EmbeddingStore.open(viewed.store)
    dataset = AlignmentDataset(
        viewed.records, viewed.processor, caption_store=store, image_store=prepared.image_store
    )
    held_out = HeldOutImages(dataset, [0, 1, 7])
    embeds = torch.cat([batch["caption_embeds"] for batch in held_out.iterate_batches()])
    parts = [(item, long) for item in (0, 1, 7) for long in (False, True)]
    counts = [2, 0, 2, 1, 2, 2]
    rows = [store.rows_of(i, long=n)[:count] for (i, n), count in zip(parts, counts, strict=True)]
    assert torch.equal(embeds, store.read(np.concatenate(rows)))


def test_impossible_views_are_refused(prepared: Prepared, viewed: Viewed, tmp_path: Path) -> None:
    towers = {"vision_model": "v", "text_model": "t", "data": "d", "output": tmp_path}
    options = {"extract": ExtractConfig(sentence_views=2), "align": AlignConfig(**ONLINE)}
    with pytest.raises(ValueError, match="sentence_views=2 is for stored captions, and"):
        TrainConfig(**towers, **options)
    short = [replace(record, long_captions=()) for record in viewed.records]
    with pytest.raises(ValueError, match="and no long caption has two sentences"):
        extract(prepared.model, short, tmp_path / "s", ExtractConfig(**OPTIONS), modality="text")
    with pytest.raises(ValueError, match="and no long caption has two sentences"):
        prepared.align(tmp_path / "run", records=short, sentence_views=2, **ONLINE)
    other = ExtractConfig(**{**OPTIONS, "sentence_views": 2})
    with pytest.raises(ValueError, match="sentence_views"):
        extract(prepared.model, viewed.records, viewed.store, other, modality="text")
    changed = [*viewed.records[:-1], replace(viewed.records[-1], long_captions=("One. Two.",) * 2)]
    with pytest.raises(ValueError, match="1 record with other captions than in "):
        AlignmentDataset(changed, viewed.processor, caption_store=EmbeddingStore.open(viewed.store))


ONLINE = {"text_training": "frozen-online"}
