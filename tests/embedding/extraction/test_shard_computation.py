"""Shards are written while the next one is encoded, and copied together from a GPU."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from extracting import EXACT, extract_captions
from host_reads import HostReads
from interruptions import read_bytes
from running_ahead import run_ahead
from tiny import draw_noise
from torch import Tensor

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.configs.encoding_config import EmbedConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.embedding.embed import embed
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.embedding.shard_computation import ShardWork
from modeling_llm2clip.embedding.shard_encoding import TextShardEncoder
from modeling_llm2clip.embedding.sharded_writer import ShardedWriter
from modeling_llm2clip.encoding import batches, encode

SOON = 30  # seconds


def test_a_shard_is_written_and_held_while_the_next_one_is_encoded(
    model: Path, records: list[CaptionedImage], undisturbed: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, begun = tmp_path / "store", [threading.Event() for _ in range(len(undisturbed))]
    write, encode_shard = ShardedWriter.write, TextShardEncoder.encode

    def note(self: TextShardEncoder, prepared: Any) -> Any:
        next(event for event in begun if not event.is_set()).set()
        return encode_shard(self, prepared)

    def wait(self: ShardedWriter[Any], shard: int, *others: Any) -> None:
        if shard + 1 < self.manifest.num_shards:
            assert begun[shard + 1].wait(SOON)
        with pytest.raises(ValueError, match="Another run is computing"), self.hold(shard):
            pass
        write(self, shard, *others)

    monkeypatch.setattr(TextShardEncoder, "encode", note)
    monkeypatch.setattr(ShardedWriter, "write", wait)
    assert read_bytes(extract_captions(model, records, folder)) == undisturbed


@pytest.mark.parametrize("is_last", [False, True])
def test_an_error_of_the_thread_that_writes_is_raised_after_the_next_batch(
    is_last: bool, model: Path, records: list[CaptionedImage], undisturbed: dict[str, bytes],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    num_shards = sum(name.endswith(".safetensors") for name in undisturbed)
    bad = num_shards - 1 if is_last else 0
    tried, batches_of = [], [0] * num_shards
    write, encode_shard, encode_all = (
        ShardedWriter.write, TextShardEncoder.encode, ShardWork._encode,
    )  # fmt: skip

    def fail(self: ShardedWriter[Any], shard: int, *others: Any) -> None:
        tried.append(shard)
        if shard == bad:
            raise OSError("the cable is out")
        write(self, shard, *others)

    def wait_first(self: ShardWork, prepared: Any, written: Any, *others: Any) -> Any:
        wait([written], SOON)
        return encode_all(self, prepared, written, *others)

    def count(self: TextShardEncoder, prepared: Any) -> Any:
        assert len(prepared.batches) > 1
        number = batches_of.index(0)
        for batch in encode_shard(self, prepared):
            batches_of[number] += 1
            yield batch

    monkeypatch.setattr(ShardedWriter, "write", fail)
    monkeypatch.setattr(ShardWork, "_encode", wait_first)
    monkeypatch.setattr(TextShardEncoder, "encode", count)
    with pytest.raises(OSError, match="the cable is out"):
        extract_captions(model, records, tmp_path / "store", replace(EXACT, batch_size=1))
    assert tried == list(range(bad + 1))
    assert is_last or batches_of[1:3] == [1, 0]


def test_embeddings_that_are_copied_by_shard_are_those_that_are_copied_by_batch(
    model: Path, images: Path, extracted: Path, records: list[CaptionedImage], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    loaded = load_records(images)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with_broken = [*loaded, replace(loaded[0], image=broken, name="broken.png", group_id="b")]
    exact = replace(EXACT, batch_size=3)
    final = EmbedConfig(skip_invalid=True, batch_size=3, rows_per_shard=7, show_progress=False)

    def run(name: str) -> list[dict[str, bytes]]:
        stored = extract(model, loaded, tmp_path / name / "images", exact, modality="image")
        embedded = embed(model, with_broken, tmp_path / name / "out", final, modality="image")
        return [read_bytes(stored), read_bytes(embedded)]

    by_batch = run("by batch")
    run_ahead(monkeypatch)
    assert run("by shard") == by_batch
    assert read_bytes(extract_captions(model, records, tmp_path / "s")) == read_bytes(extracted)


@pytest.mark.parametrize("beside", [False, True], ids=["by batch", "by shard"])
def test_inputs_whose_embeddings_are_not_finite_are_named(
    beside: bool, model: Path, records: list[CaptionedImage], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pair = LLM2CLIPModel.from_pretrained(model), LLM2CLIPProcessor.from_pretrained(model)
    with torch.no_grad():
        ids = pair[1].list_ids([records[0].captions[0]])[0][0]
        pair[0].text_model.get_input_embeddings().weight[ids[len(ids) // 2]] = torch.nan
    if beside:
        run_ahead(monkeypatch)
    with pytest.raises(ValueError, match=r"NaN or infinity for \d+ of \d+ inputs: number \d+ \('"):
        extract_captions(pair, records, tmp_path / "store")  # type: ignore[arg-type]
    text = records[0].captions[0]
    with pytest.raises(ValueError, match=r"NaN or infinity for 1 of \d+ inputs: number 2 \('"):
        encode.encode_texts(*pair, ["?", text])


def test_many_batches_are_copied_together_and_no_more_than_fit(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{'a dog and ' * number}a cat" for number in range(12)]
    pair = LLM2CLIPModel.from_pretrained(model), LLM2CLIPProcessor.from_pretrained(model)
    expected = encode.encode_texts(*pair, texts, token_budget=64)
    counts: list[int] = []
    start_copy = batches.start_copy

    def note(tensor: Tensor) -> Any:
        counts.append(len(tensor))
        return start_copy(tensor)

    monkeypatch.setattr(batches, "start_copy", note)
    run_ahead(monkeypatch)
    for room, num_copies in ((2**28, 1), (4 * 32 * 2, 6)):  # bytes of two embeddings, and more
        counts.clear()
        monkeypatch.setattr(batches, "_COPIED_AT_ONCE", room)
        embeds = encode.encode_texts(*pair, texts, token_budget=64)
        assert sum(counts) == len(texts) and len(counts) <= num_copies
        # Projected in other groups of rows, float32.
        torch.testing.assert_close(embeds, expected, atol=2e-6, rtol=0)
    assert len(counts) > 1


def test_no_batch_of_images_that_stays_on_its_device_is_read(model: Path) -> None:
    encoder = encode.TorchEncoder(
        LLM2CLIPModel.from_pretrained(model), LLM2CLIPProcessor.from_pretrained(model)
    )
    images, plan = [draw_noise()] * 4, [[0, 1], [2, 3]]
    reads: dict[bool, list[str]] = {}
    for to_cpu in (True, False):
        with HostReads() as seen:
            for batch in encoder.iterate_images(images, plan, to_cpu=to_cpu):
                assert batch.embeds.shape == (2, encoder.embedding_dim)
        reads[to_cpu] = seen.names
    assert len(reads[True]) >= 2 and reads[False] == []  # each batch is checked, or none
