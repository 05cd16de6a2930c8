"""Stage 3, what a step sees: captions, sentence views, batches and images."""

from __future__ import annotations

import io
import os
import resource
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
from modeling_llm2clip.encoding import batches
from modeling_llm2clip.encoding.batches import find_min_jpeg_side
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.encoding.pixel_normalization import find_normalization
from modeling_llm2clip.image_loading_llm2clip import load_images
from modeling_llm2clip.training.alignment.alignment_data import (
    AlignmentDataset,
    AlignmentStream,
)
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.alignment.held_out import HeldOutImages
from modeling_llm2clip.training.alignment.run_data import RecordData, count_workers
from modeling_llm2clip.training.alignment.sampling import (
    ResumableBatchSampler,
    Samples,
    choose_captions,
    draw_samples,
    rank_keys,
)


def make_loader(dataset: AlignmentDataset, folder: Path) -> Any:
    """Batches of four samples, which a process makes."""
    data = RecordData(dataset, np.arange(4), AlignConfig(**SHORT_RUN, num_workers=1))
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True)
    return data.make_loader(arguments, batch_size=4, num_steps=1)


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
        loader = make_loader(prepared.dataset(records), tmp_path)
        loader.multiprocessing_context = "spawn"
        os.utime(shard, ns=(1, 1))
        with pytest.raises(ValueError, match="the file changed while it was in use"):
            list(loader)


@pytest.mark.slow  # beside the other test of its models
def test_a_batch_that_finds_no_shared_memory_is_an_error_not_a_wait(
    tmp_path: Path, prepared: Prepared
) -> None:
    loader = make_loader(prepared.dataset(), tmp_path)
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
    draws = draw_samples(np.arange(count), 0, seed=1).draws
    numbers = choose_captions(
        np.full(count, num_short), np.full(count, num_long), draws, long_caption_ratio=ratio
    )
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


def test_ranks_of_keys_are_random_and_each_keys_own() -> None:
    keys = np.random.default_rng(7).integers(-(2**63), 2**63 - 1, 4000)
    first, second = (rank_keys(keys, seed) for seed in (0, 1))
    assert np.array_equal(first[5:9], rank_keys(keys[5:9], 0))
    # Binomial: of the 1,000 lowest ranks by one seed, a quarter by the other, four deviations.
    shared = set(first.argsort()[:1000].tolist()) & set(second.argsort()[:1000].tolist())
    assert abs(len(shared) - 250) < 4 * (1000 * 0.25 * 0.75) ** 0.5


def test_every_epoch_shows_every_image_once_in_another_order() -> None:
    sampler = ResumableBatchSampler(np.arange(12), batch_size=4, num_steps=6, seed=0)
    batches = list(sampler)
    epochs = [np.concatenate([b.items for b in half]) for half in (batches[:3], batches[3:])]
    assert all(sorted(items.tolist()) == list(range(12)) for items in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert all(require_equal(batch, sampler.read_step(n)) for n, batch in enumerate(batches))
    assert len({batch.noise_seed for batch in batches}) == 6


def require_equal(first: Samples, second: Samples) -> bool:
    return all(np.array_equal(*pair) for pair in zip(first, second, strict=True))


def test_processes_share_the_batches_of_one() -> None:
    """Images and captions; their noise is another one."""
    settings: dict[str, Any] = {"batch_size": 4, "num_steps": 5, "seed": 0}
    shares = [
        ResumableBatchSampler(np.arange(10), rank=rank, num_processes=2, **settings)
        for rank in range(2)
    ]
    for whole, *parts in zip(
        ResumableBatchSampler(np.arange(10), **settings), *shares, strict=True
    ):
        for name in ("items", "draws"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            assert np.array_equal(getattr(whole, name), joined)
        assert parts[0].noise_seed != parts[1].noise_seed


def draw_noise_of(prepared: Prepared, share: float, samples: Samples) -> dict[str, torch.Tensor]:
    options = {"seed": 5, "image_noise": share, "caption_noise": share}
    dataset = prepared.dataset(None, "caption", "image", **options)
    return dataset.make_inputs(dataset.__getitems__(samples))


def test_noise_is_projected_and_a_loss_gets_embeddings_without_it(prepared: Prepared) -> None:
    samples = draw_samples(np.arange(NUM_RECORDS), 3, seed=5)
    clean, noisy = (draw_noise_of(prepared, share, samples) for share in (0.0, 1.0))
    model = AlignmentModel.from_pretrained(prepared.model, with_llm=False, with_vision_tower=False)
    with torch.no_grad():
        (_, wanted), (_, found) = (model.eval()(batch) for batch in (clean, noisy))
        moved = model.to_image_embeds(noisy["vision_embeds"] + noisy["vision_noise"])
    assert torch.equal(found.vision_embeds, wanted.vision_embeds)
    assert torch.equal(found.caption_embeds, wanted.caption_embeds)
    assert torch.equal(found.image_embeds, moved)
    for side in ("image_embeds", "text_embeds"):
        assert not torch.isclose(getattr(found, side), getattr(wanted, side)).all(dim=1).any()


def test_noise_is_normal_as_long_as_asked_and_each_batchs_own(prepared: Prepared) -> None:
    def draw(step: int, rank: int = 0) -> dict[str, torch.Tensor]:
        items = np.tile(np.arange(NUM_RECORDS), 50)
        samples = draw_samples(items, step, seed=5, rank=rank, num_processes=2)
        return draw_noise_of(prepared, 0.5, samples)

    first = draw(0)
    for name in ("vision", "caption"):
        noise, embeds = first[f"{name}_noise"], first[f"{name}_embeds"]
        unit = noise * (embeds.shape[1] ** 0.5 / 0.5) / embeds.norm(dim=1, keepdim=True)
        # The mean and the mean square of independent normal numbers, four standard errors.
        assert abs(float(unit.mean())) < 4 * unit.numel() ** -0.5
        assert abs(float(unit.square().mean()) - 1) < 4 * (2 / unit.numel()) ** 0.5
        assert torch.equal(draw(0)[f"{name}_noise"], noise)
        for other in (draw(1), draw(0, rank=1)):
            assert not torch.equal(other[f"{name}_noise"], noise)


@pytest.mark.parametrize("decoding", ["full", "scaled"])
def test_training_and_extraction_see_the_same_pixels(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoding: Any
) -> None:
    """A batch has bytes, which the model normalizes, made of few decoded images at a time."""
    pixels = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    files = [tmp_path / f"{number}.jpg" for number in range(3)]
    for number, file in enumerate(files):
        Image.fromarray(np.roll(pixels, number)).save(file, quality=95)
    processor, config = prepared.processor, AlignConfig(jpeg_decoding=decoding)
    records = [replace(prepared.records[n], image=file) for n, file in enumerate(files)]
    least = find_min_jpeg_side(processor.image_processor, decoding)
    extracted = processor(images=[load_images(file, min_jpeg_side=least) for file in files])
    monkeypatch.setattr(batches, "_PIXELS_AT_ONCE", 1)
    at_once, call = [], LLM2CLIPProcessor.__call__
    dataset = AlignmentDataset(records, processor, config)
    stream = AlignmentStream(stream_records(prepared.data), processor, config)
    monkeypatch.setattr(
        LLM2CLIPProcessor,
        "__call__",
        lambda self, images=None, text=None: (
            at_once.append(len(images or ())) or call(self, images=images, text=text)
        ),
    )
    of_dataset = dataset.read_pairs(np.arange(3), np.zeros(3, np.int64))["pixel_values"]
    of_stream = stream.collate([stream.prepare_sample(record) for record in records])
    assert max(at_once[:-1]) == 1  # the last call tokenizes
    normalization = find_normalization(processor, torch.device("cpu"))
    assert normalization is not None
    for trained_on in (of_dataset, of_stream["pixel_values"]):
        assert trained_on.dtype == torch.uint8
        found = normalization.apply(trained_on)
        torch.testing.assert_close(found, extracted["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "decodes", "num_cores", "wanted"),
    [("cuda", True, 6, 3), ("cuda", True, 28, 14), ("cuda", True, 256, 32),
     ("cuda", False, 6, 0), ("cpu", True, 6, 0)],
)  # fmt: skip
def test_the_processes_of_one_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, device: str, decodes: bool, num_cores: int, wanted: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
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
    dataset = prepared.dataset(records)
    items, numbers = np.array([0, 0, 1, 2, 2, 1]), np.array([0, 1, 0, 0, 1, 1])
    wanted = [hash_text(text) for text in ("one", "two", "two", "three", "one", "long")]
    assert dataset.read_text_keys(items, numbers).tolist() == wanted


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
    return Viewed(records, folder, prepared.processor)


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


def test_views_of_a_store_are_sampled(prepared: Prepared, viewed: Viewed) -> None:
    """By records and by a stream; equal texts of a batch have one key."""
    store = EmbeddingStore.open(viewed.store)
    dataset = AlignmentDataset(
        viewed.records, viewed.processor, AlignConfig(seed=5), caption_store=store
    )
    samples = draw_samples(np.tile(np.arange(24), 12), 0, seed=5)
    batch = dataset.__getitems__(samples)
    keys = [set(map(hash_text, viewed.list_texts(item))) for item in range(24)]
    for item in range(24):  # equal texts of several shards share a key
        assert set(batch["text_keys"][samples.items == item].tolist()) <= keys[item]
    # Nothing is left out by its kind.
    assert len(set(batch["text_keys"].tolist())) > 0.9 * len(set.union(*keys))
    joined = AlignmentStream(
        stream_records(prepared.data), viewed.processor, AlignConfig(seed=3), caption_store=store
    )
    stored = joined.collate([joined.prepare_sample(record) for record in viewed.records])
    found = stored["text_keys"].tolist()
    assert all(key in own for key, own in zip(found, keys, strict=True))
    own = {hash_text(t) for r in viewed.records for t in (*r.captions, *r.long_captions)}
    assert not set(found) <= own
    # Held out of a stream is a part of the store; its records have the views of the store, too.
    AlignmentDataset(viewed.records[2:5], viewed.processor, caption_store=store, is_part=True)
    fewer = replace(viewed.records[4], long_captions=("A photo. It is big.", "A wall."))
    with pytest.raises(ValueError, match="1 of 1 records of a batch are not in"):
        joined.collate([joined.prepare_sample(fewer)])
    with pytest.raises(ValueError, match="1 record with captions that differ"):
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
    with pytest.raises(ValueError, match="sentence_views=2 has no effect with"):
        TrainConfig(**towers, **options)
    short = [replace(record, long_captions=()) for record in viewed.records]
    with pytest.raises(ValueError, match=": no long caption has two sentences"):
        extract(prepared.model, short, tmp_path / "s", ExtractConfig(**OPTIONS), modality="text")
    other = ExtractConfig(**{**OPTIONS, "sentence_views": 2})
    with pytest.raises(ValueError, match="sentence_views"):
        extract(prepared.model, viewed.records, viewed.store, other, modality="text")
    changed = [*viewed.records[:-1], replace(viewed.records[-1], long_captions=("One. Two.",) * 2)]
    with pytest.raises(ValueError, match="1 record with captions that differ from those in "):
        AlignmentDataset(changed, viewed.processor, caption_store=EmbeddingStore.open(viewed.store))


ONLINE = {"text_training": "frozen-online"}
