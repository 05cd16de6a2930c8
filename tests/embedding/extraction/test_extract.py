"""Laws of extraction: a store holds the model's embeddings, each once; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from extracting import EXACT, extract_captions
from interruptions import read_bytes
from read_only import read_only

from modeling_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.encoding_config import EmbedConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage, Modality
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.data.store.store_manifest import StoreManifest
from modeling_llm2clip.embedding.embed import embed
from modeling_llm2clip.embedding.extract import describe_extraction, extract
from modeling_llm2clip.embedding.shard_encoding import TextShardEncoder
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.model_folders.fingerprint import fingerprint_text, fingerprint_vision


def test_every_record_finds_the_embeddings_of_its_captions(
    model: Path, whole: Any, records: list[CaptionedImage], extracted: Path
) -> None:
    store = EmbeddingStore.open(extracted, check="full")
    assert len(store) == len(records)
    rows: list[int] = []
    for item, record in enumerate(records):
        assert (store.names[item], store.group_ids[item]) == (record.name, record.group_id)
        for texts, long in ((record.captions, False), (record.long_captions, True)):
            rows += store.rows_of(item, long=long).tolist()
            assert len(store.rows_of(item, long=long)) == len(texts)
    texts = [text for record in records for text in (*record.captions, *record.long_captions)]
    expected = encode_texts(*whole, texts, project=False)
    # Sums of float32 in another order: the captions had other neighbors.
    torch.testing.assert_close(store.read(rows), expected, atol=1e-5, rtol=1e-5)
    store.require_fingerprint(fingerprint_text(model))


def test_duplicates_are_computed_once_and_truncated_captions_counted(
    model: Path, tmp_path: Path
) -> None:
    records = [
        CaptionedImage(None, "a", "a", ("a dog", "a cat"), ("dog " * 200,)),
        CaptionedImage(None, "b", "b", ("a cat", "a cat"), ("dog " * 200, "cat " * 200)),
    ]
    folder = extract_captions(model, records, tmp_path / "store")
    store = EmbeddingStore.open(folder)
    shown = "4 embeddings of 32 dimensions for 7 captions of 2 records, 2 truncated."
    assert shown in describe_extraction(folder)[0]
    assert store.rows_of(1).tolist() == [store.rows_of(0)[1]] * 2
    assert store.rows_of(1, long=True)[0] == store.rows_of(0, long=True)[0]


def test_a_caption_is_tokenized_once_a_shard_and_the_first_shard_does_not_wait_for_the_others(
    model: Path, records: list[CaptionedImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized: list[str] = []
    before_first_shard: list[int] = []
    list_ids, encode = LLM2CLIPProcessor.list_ids, TextShardEncoder.encode

    def note_texts(self: LLM2CLIPProcessor, texts: Any) -> Any:
        texts = list(texts)
        tokenized.extend(texts)
        return list_ids(self, texts)

    def note_shard(self: TextShardEncoder, prepared: Any) -> Any:
        before_first_shard.append(len(tokenized))
        return encode(self, prepared)

    monkeypatch.setattr(LLM2CLIPProcessor, "list_ids", note_texts)
    monkeypatch.setattr(TextShardEncoder, "encode", note_shard)
    folder = extract_captions(model, records, tmp_path / "store")
    texts = [text for r in records for text in (*r.captions, *r.long_captions)]
    shards = [dict.fromkeys(texts[start : start + 16]) for start in range(0, len(texts), 16)]
    assert tokenized == [text for shard in shards for text in shard]
    assert before_first_shard[0] <= 2 * 16 < len(tokenized) == StoreManifest.read(folder).num_rows


def test_images_are_stored_once_and_found_by_every_record(
    model: Path, whole: Any, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "store"
    options = ["--modality", "image", "--rows-per-shard", "8", "--batch-size", "3"]
    options += ["--store-dtype", "float32", "--device", "cpu"]
    assert main(["extract", str(model), str(images), str(folder), *options]) == 0
    shown = "10 embeddings of 32 dimensions for 10 images of 15 records."
    assert shown in capsys.readouterr().out
    store = EmbeddingStore.open(folder, check="full")
    records = load_records(images)
    expected = encode_images(*whole, [record.path for record in records], project=False)
    rows = [int(store.rows_of(item)[0]) for item in range(len(store))]
    # Sums of float32 in another order: the images had other neighbors.
    torch.testing.assert_close(store.read(rows), expected, atol=1e-5, rtol=1e-5)
    assert store.manifest.num_rows == len(set(rows)) == 10
    assert list(store.names) == [record.name for record in records]
    assert list(store.langs) == [record.lang for record in records]
    assert store.rows_of(0, long=True).tolist() == []
    store.require_fingerprint(fingerprint_vision(model))


@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_run_loads_the_tokenizer_once(
    modality: Modality, model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An LLM's tokenizer takes half a second to load."""
    loaded: list[Any] = []
    read = LLM2CLIPProcessor.get_processor_dict

    def read_and_note(source: Any, **kwargs: Any) -> Any:
        loaded.append(source)
        return read(source, **kwargs)

    monkeypatch.setattr(LLM2CLIPProcessor, "get_processor_dict", read_and_note)
    records = load_records(images)
    extract(model, records, tmp_path / "store", EXACT, modality=modality)
    assert len(loaded) == 1
    config = EmbedConfig(device="cpu", show_progress=False)
    embed(model, records, tmp_path / "embeddings", config, modality=modality)
    assert len(loaded) == 2


def test_a_loaded_pair_gives_the_store_of_its_folder(
    whole: Any, records: list[CaptionedImage], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    folder = extract(whole, records, tmp_path / "store", EXACT, modality="text")
    assert read_bytes(folder) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_complete_store_that_is_read_only_is_taken_as_it_is(
    model: Path, records: list[CaptionedImage], tmp_path: Path
) -> None:
    folder = extract_captions(model, records[:2], tmp_path / "store")
    before = read_bytes(folder)
    with read_only(folder):
        extract_captions(model, records[:2], folder)
    assert read_bytes(folder) == before
    [shard] = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"1 damaged file: shard-00000.*SHA-256"):
        extract_captions(model, records[:2], folder)


def test_an_impossible_partition_is_refused(tmp_path: Path) -> None:
    for partition in ("0/2", "3/2", "2", "a/b", "-1/2", "1/2/3"):
        with pytest.raises(ValueError, match="must look like 2/8"):
            extract("no-model", [], tmp_path / "store", modality="text", partition=partition)


def test_an_empty_dataset_is_refused(model: Path, tmp_path: Path) -> None:
    for modality in ("text", "image"):
        with pytest.raises(ValueError, match=r"(?i)empty|no images"):
            extract(model, [], tmp_path / "store", EXACT, modality=modality)
    assert not (tmp_path / "store").exists()


def test_a_flag_of_the_other_extraction_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["extract", "no-model", "no-data", str(tmp_path / "store"), "--modality"]
    assert main([*command, "text", "--jpeg-decoding", "scaled"]) == 2
    assert "jpeg_decoding: only for --modality image" in capsys.readouterr().err
    assert main([*command, "image", "--sentence-views", "2"]) == 2
    assert "sentence_views: only for --modality text" in capsys.readouterr().err


def test_records_without_images_are_refused_before_the_model_is_loaded(
    records: list[CaptionedImage], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"30 records without an image: 0\.png"):
        extract(tmp_path / "empty", records, tmp_path / "store", EXACT, modality="image")
