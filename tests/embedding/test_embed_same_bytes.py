"""`embed` writes the same bytes if it is stopped, resumed or partitioned."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from embedding_runs import IMAGE, TEXT, embed_texts
from interruptions import read_bytes, stop_after_one

from modeling_llm2clip.configs.encoding_config import EmbeddingColumn
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage, Modality
from modeling_llm2clip.embedding.embed import describe_embeddings, embed
from modeling_llm2clip.embedding.embedding_manifest import EmbeddingManifest
from modeling_llm2clip.scheduling.graceful_stop import StageInterrupt


def test_a_stopped_run_goes_on_after_its_last_file_and_leaves_the_same_bytes(
    model: Path, records: list[CaptionedImage], embedded: Path, tmp_path: Path,
    written: list[int], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "texts"
    num_stops = 0
    for _ in range(100):
        stop_after_one(monkeypatch, partial(len, written))
        try:
            embed_texts(model, records, folder)
        except StageInterrupt as error:
            assert f"Complete shards are in {folder}. Continue with the same call." in str(error)
            num_stops += 1
        else:
            break
    manifest = EmbeddingManifest.read(folder)
    # While one shard is written, the next may be computed.
    assert len(written) == manifest.num_shards >= num_stops > 0
    assert sum(written) == manifest.num_inputs  # nothing was computed twice
    assert read_bytes(folder) == read_bytes(embedded)


def test_a_complete_output_is_checked_and_a_deleted_file_computed_again(
    model: Path, records: list[CaptionedImage], embedded: Path, tmp_path: Path, written: list[int]
) -> None:
    folder = embed_texts(model, records, shutil.copytree(embedded, tmp_path / "texts"))
    assert not written
    name = "embeddings-00001-of-00004.parquet"
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"1 damaged file: {name}: SHA-256 is .*delete"):
        embed_texts(model, records, folder)
    (folder / name).unlink()
    embed_texts(model, records, folder)
    assert sum(written) == 16
    assert read_bytes(folder) == read_bytes(embedded)


def test_partitions_leave_the_same_bytes_and_the_last_one_completes_them(
    model: Path, records: list[CaptionedImage], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    for part, num_files in ((3, 1), (1, 3), (2, 4)):
        embed(model, records, folder, TEXT, modality="text", partition=f"{part}/3")
        assert len(list(folder.glob("*.parquet"))) == num_files
        line = describe_embeddings(folder)[0]
        assert line.startswith(f"{num_files} of 4 files are" if part != 2 else "Wrote ")
    assert read_bytes(folder) == undisturbed


CHANGES: dict[EmbeddingColumn, dict[str, Any]] = {
    "url": {"url": "https://example.org/moved.png"},
    "group_id": {"group_id": "another"},
    "keywords": {"keywords": ("new",)},
    "place": {"place": "captions.jsonl, line 9"},
    "long_captions": {"long_captions": ("A new text.",)},
    "lang": {"lang": "fr"},
    "image_file": {"image": Path("elsewhere", "0.png")},
    "text": {"captions": ("A new text.",)},
}


@pytest.mark.parametrize("modality", ["text", pytest.param("image", marks=pytest.mark.slow)])
def test_partitions_of_other_values_of_a_column_are_refused(
    modality: Modality, model: Path, images: Path, tmp_path: Path
) -> None:
    """Fields that are not in a column may change between partitions."""
    records = list(load_records(images))
    # Texts are not of images, and another image is refused as such.
    columns = [name for name in CHANGES if modality == "text" or name not in ("text", "image_file")]
    config = replace(IMAGE, columns=(*columns, "name"), rows_per_shard=5)
    folder = tmp_path / "out"
    embed(model, records, folder, config, modality=modality, partition="1/2")

    def require_refusal(column: EmbeddingColumn, partition: str | None) -> None:
        edited = [*records[:-1], replace(records[-1], **CHANGES[column])]
        with pytest.raises(ValueError, match=r"a different output: (data|values of columns): "):
            embed(model, edited, folder, config, modality=modality, partition=partition)

    for column, partition in zip(columns, cycle(("2/2", "1/2", None)), strict=False):
        require_refusal(column, partition)
    embed(model, records, folder, config, modality=modality, partition="2/2")
    assert EmbeddingManifest.read(folder).complete
    require_refusal("url", None)  # a rerun keeps no stale values
    if modality == "text":
        return
    edited = [replace(record, url="https://example.org", group_id="one") for record in records]
    config = replace(IMAGE, columns=("name", "lang"))
    for part, data in (("1/2", records), ("2/2", edited)):
        embed(model, data, tmp_path / "few", config, modality="image", partition=part)
    assert EmbeddingManifest.read(tmp_path / "few").complete
