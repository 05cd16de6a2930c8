"""Laws of sentence views: what `extract` stores is what `align` samples, and what no score sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from aligning import Prepared
from interruptions import read_bytes

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.configs.train_config import TrainConfig
from modeling_llm2clip.data.captions.sentence_views import with_views
from modeling_llm2clip.data.records.record_columns import hash_text
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.data.streams.record_streams import stream_records
from modeling_llm2clip.embedding.extract import describe_extraction, extract, merge_store
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.training.alignment.alignment_data import (
    AlignmentDataset,
    AlignmentStream,
    decode_sample,
)
from modeling_llm2clip.training.alignment.held_out import HeldOutImages

NUM_VIEWS = 3
OPTIONS: dict[str, Any] = {
    "store_dtype": "float32", "max_shard_size": "2KiB", "token_budget": 256, "device": "cpu",
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


def test_a_store_has_the_views_after_the_long_captions(
    prepared: Prepared, viewed: Viewed, tmp_path: Path
) -> None:
    store, model = EmbeddingStore.open(viewed.store), LLM2CLIPModel.from_pretrained(prepared.model)
    for item in (0, 1, 2, 23):
        rows = np.concatenate([store.rows_of(item), store.rows_of(item, long=True)])
        wanted = encode_texts(model, viewed.processor, viewed.list_texts(item), project=False)
        torch.testing.assert_close(store.read(rows), wanted, **ROUNDING)
    num_views = sum(len(viewed.list_texts(n)) for n in range(24)) - 48 - 45
    assert (
        f"{num_views:,} sentence views, 1 single-sentence long caption, 0 truncated"
        in (describe_extraction(viewed.store)[0])
    )
    for part in ("1/2", "2/2"):
        extract(
            prepared.model, viewed.records, tmp_path / "parts", ExtractConfig(**OPTIONS),
            modality="text", partition=part,
        )  # fmt: skip
    assert read_bytes(merge_store(tmp_path / "parts")) == read_bytes(viewed.store)


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


def test_held_out_images_are_scored_on_their_own_captions(
    prepared: Prepared, viewed: Viewed
) -> None:
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


def test_views_that_cannot_be_made_are_refused(
    prepared: Prepared, viewed: Viewed, tmp_path: Path
) -> None:
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
