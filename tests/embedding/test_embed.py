"""Laws of `embed`: the embeddings are the model's, in every dtype; what is refused."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from embedding_runs import IMAGE, TEXT, embed_texts, make_few_texts, read_embeddings
from failing_disk import make_failing_file
from interruptions import read_bytes, refusing_for
from PIL import Image
from tiny import tiny_model
from transformers.utils import logging

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.encoding_config import EmbedConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.embedding.embed import describe_embeddings, embed
from modeling_llm2clip.embedding.embedding_manifest import EmbeddingManifest
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.image_loading_llm2clip import LIMITS_VARIABLE, ImageLimits
from modeling_llm2clip.model_folders.fingerprint import fingerprint_embeddings
from modeling_llm2clip.model_folders.model_writing import save_model


def read_description(folder: Path) -> dict[str, Any]:
    file = next(folder.glob("*.parquet"))
    described: dict[str, Any] = json.loads(pq.read_schema(file).metadata[b"llm2clip"])
    return described


def require_close(embeddings: np.ndarray[Any, Any], expected: torch.Tensor) -> None:
    # Sums of float32 in another order: the inputs had other neighbors.
    torch.testing.assert_close(torch.from_numpy(embeddings.copy()), expected, atol=1e-5, rtol=1e-5)


def test_every_caption_has_its_final_embedding(
    whole: Any, embedded: Path, records: list[CaptionedImage]
) -> None:
    texts = [text for r in records for text in (*r.captions, *r.long_captions)]
    ids, embeddings = read_embeddings(embedded)
    assert pq.read_table(embedded)["text"].to_pylist() == texts
    assert len(set(ids)) == len(texts) and ids[0] == "0.png#0"
    require_close(embeddings, encode_texts(*whole, texts))
    files = {file.name for file in embedded.iterdir()}
    num_shards = EmbeddingManifest.read(embedded).num_shards
    assert num_shards == -(-len(texts) // 16)
    assert len(files) == num_shards + 1 and "_manifest.json" in files


def test_every_file_names_its_model(
    model: Path, records: list[CaptionedImage], tmp_path: Path
) -> None:
    folder = embed_texts(model, records[:2], tmp_path / "texts", replace(TEXT, dtype="float16"))
    described = read_description(folder)
    assert described["fingerprint"] == fingerprint_embeddings(model, "text")
    assert "{text}" in described["prompt"]
    assert (described["dtype"], described["dim"]) == ("float16", 32)
    assert (described["modality"], described["model"]) == ("text", str(model))
    field = pq.read_schema(next(folder.glob("*.parquet"))).field("embedding")
    assert str(field.type) == "fixed_size_list<element: halffloat>[32]"


def test_images_are_embedded_once_with_the_columns_asked_for(
    model: Path, whole: Any, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "embeddings"
    assert embed_images(model, images, folder, "--columns", "image_file", "lang") == 0
    out = capsys.readouterr().out
    assert f"Wrote {folder}: 10 embeddings of 32 dimensions in float32, 3 files." in out
    ids, embeddings = read_embeddings(folder)
    assert ids == [f"{number}.png" for number in range(10)]
    paths = [images / name for name in ids]
    table = pq.read_table(folder)
    assert table.column_names == ["id", "embedding", "image_file", "lang"]
    assert table["image_file"].to_pylist() == list(map(str, paths))
    require_close(embeddings, encode_images(*whole, paths))


def run_embed(model: Path, data: Path, output: Path, modality: str, *flags: str) -> int:
    command = ["embed", str(model), str(data), str(output), "--modality", modality]
    return main([*command, "--device", "cpu", *flags])


def embed_images(model: Path, data: Path, output: Path, *flags: str) -> int:
    sizes = ("--rows-per-shard", "4", "--batch-size", "3")
    return run_embed(model, data, output, "image", *sizes, *flags)


def test_a_folder_with_only_images_is_embedded(
    model: Path, whole: Any, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    (photos / "below").mkdir(parents=True)
    for number in (0, 1):
        (photos / "below" / f"{number}.png").write_bytes((images / f"{number}.png").read_bytes())
    (photos / "raw.nef").touch()
    assert embed_images(model, photos, tmp_path / "out") == 0
    assert "Skipped 1 image file in formats that this Pillow cannot read" in capsys.readouterr().err
    ids, embeddings = read_embeddings(tmp_path / "out")
    assert ids == ["below/0.png", "below/1.png"]
    require_close(embeddings, encode_images(*whole, [photos / name for name in ids]))
    (photos / "below" / "2.png").write_bytes(b"no image")
    assert embed_images(model, photos, tmp_path / "other") == 2
    assert "image unreadable: 1 " in capsys.readouterr().err
    assert embed_images(model, photos, tmp_path / "x", "--image-dir", str(photos)) == 2
    assert "is a folder of images without a captions file" in capsys.readouterr().err
    assert run_embed(model, photos, tmp_path / "x", "text") == 2
    assert "has no captions.jsonl" in capsys.readouterr().err


def test_int8_ranges_are_recorded_and_can_be_used_again_for_the_same_embeddings(
    model: Path, records: list[CaptionedImage], embedded: Path, images: Path, tmp_path: Path
) -> None:
    """Other embeddings would be clipped, and their bytes would mean other values."""
    exact = read_embeddings(embedded)[1]
    config = replace(TEXT, dtype="int8")
    folder = embed_texts(model, records, tmp_path / "int8", config)
    low, high = np.array(read_description(folder)["int8_ranges"], np.float32)
    _, values = read_embeddings(folder)
    assert values.dtype == np.int8
    steps = (high - low) / 255
    restored = low + (values.astype(np.float32) + 128.5) * steps
    # The sample has one caption per record, so that the others may be clipped.
    inside = (exact >= low) & (exact <= high)
    assert 0.5 < inside.mean() < 1
    # Half a step, and what float32 rounds of it.
    assert (np.abs(restored - exact) <= steps / 2 + 1e-6)[inside].all()
    assert any("clipped to the int8 ranges" in line for line in describe_embeddings(folder))

    again = replace(config, int8_ranges=folder)
    other = embed_texts(model, records[:3], tmp_path / "other", again)
    assert read_description(other)["int8_ranges"] == read_description(folder)["int8_ranges"]
    _, same = read_embeddings(other)
    np.testing.assert_array_equal(same, values[: len(same)])

    new = tmp_path / "new"
    with pytest.raises(ValueError, match="has no int8 ranges"):
        embed_texts(model, records, new, replace(again, int8_ranges=embedded))
    with pytest.raises(
        ValueError, match="different embeddings: dimensions: 32 in the store, 16 now"
    ):
        embed_texts(model, records, new, replace(again, truncate_dim=16))
    for_images = replace(IMAGE, dtype="int8", int8_ranges=folder)
    with pytest.raises(ValueError, match=r"different embeddings: .*modality: 'text' in the store"):
        embed(model, load_records(images), new, for_images, modality="image")
    prompted = save_model(*tiny_model(max_text_length=128, prompt="chatml"), tmp_path / "model")
    with pytest.raises(ValueError, match=r"different embeddings: .*prompt: "):
        embed_texts(prompted, records, new, again)
    assert not new.exists()
    # The prompt of a text is on record as text.
    embed_texts(prompted, make_few_texts(1), new)
    assert read_description(new)["prompt"] == "<|begin|><|im_start|>user\n{text}<|im_end|>"


def test_truncated_and_binary_embeddings_are_those_of_the_model(
    model: Path, records: list[CaptionedImage], embedded: Path, tmp_path: Path
) -> None:
    exact = read_embeddings(embedded)[1]
    config = replace(TEXT, truncate_dim=16)
    _, short = read_embeddings(embed_texts(model, records, tmp_path / "short", config))
    expected = exact[:, :16] / np.linalg.norm(exact[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-6)  # float32
    config = replace(config, dtype="ubinary")
    _, bits = read_embeddings(embed_texts(model, records, tmp_path / "bits", config))
    np.testing.assert_array_equal(np.unpackbits(bits, axis=1), exact[:, :16] > 0)
    for refused, message in (
        ({"truncate_dim": 33}, "exceeds the model.s 32 dimensions"),
        ({"truncate_dim": 12, "dtype": "binary"}, "Set truncate_dim=8"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_texts(model, records, tmp_path / "x", replace(TEXT, **refused))  # type: ignore[arg-type]


def break_images(images: Path, folder: Path) -> Path:
    """Copy a dataset, and overwrite two of its images."""
    folder.mkdir()
    for file in images.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for number in (2, 3):
        (folder / f"{number}.png").write_bytes(b"no image")
    return folder


def test_broken_images_are_named_together_or_left_out_and_counted(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = break_images(images, tmp_path / "data")
    folder = tmp_path / "embeddings"
    assert embed_images(model, data, folder) == 2
    error = capsys.readouterr().err
    assert "image unreadable: 2 " in error and "2.png" in error and "3.png" in error
    with pytest.raises(ValueError, match=r"(?s)image unreadable: 2 \(.*2\.png.*3\.png"):
        embed(model, load_records(data), folder, IMAGE, modality="image")
    assert embed_images(model, data, folder, "--skip-invalid", "--check-images") == 2
    assert "cannot be combined with --skip-invalid" in capsys.readouterr().err
    assert embed_images(model, data, folder, "--skip-invalid") == 0
    out = capsys.readouterr().out
    assert "8 embeddings" in out and "Skipped 2 undecodable images: 2.png, 3.png." in out
    ids, embeddings = read_embeddings(folder)
    assert ids == [f"{number}.png" for number in (0, 1, *range(4, 10))]
    assert embeddings.any(axis=1).all()
    assert EmbeddingManifest.read(folder).shards[0].skipped == ("2.png", "3.png")
    # A file of broken images alone has no rows.
    config = replace(IMAGE, rows_per_shard=1, skip_invalid=True, dtype="int8")
    folder = embed(model, load_records(data), tmp_path / "alone", config, modality="image")
    assert [shard.rows for shard in EmbeddingManifest.read(folder).shards[:4]] == [1, 1, 0, 0]
    assert len(read_embeddings(folder)[0]) == 8


def test_a_disk_that_fails_ends_the_run_and_skips_no_image(
    model: Path, images: Path, tmp_path: Path
) -> None:
    """A skipped image would stay skipped after the disk is repaired."""
    data = break_images(images, tmp_path / "data")
    records = load_records(data)
    config = replace(IMAGE, rows_per_shard=2, skip_invalid=True)
    wanted = embed(model, records, tmp_path / "undisturbed", config, modality="image")
    for disaster in (make_failing_file, Path.unlink):
        content = (data / "5.png").read_bytes()
        folder = tmp_path / disaster.__name__
        disaster(data / "5.png")
        with pytest.raises(OSError, match=r"5\.png: cannot be read"):
            embed(model, records, folder, config, modality="image")
        (data / "5.png").unlink(missing_ok=True)
        (data / "5.png").write_bytes(content)
        embed(model, records, folder, config, modality="image")
        assert read_bytes(folder) == read_bytes(wanted)
        assert len(read_embeddings(folder)[0]) == 8


def test_partitions_leave_out_the_same_images_or_are_refused(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines with different limits would disagree on which images are too large."""
    data = break_images(images, tmp_path / "data")
    Image.new("RGB", (300, 300)).save(data / "4.png")
    records = load_records(data)
    config = replace(IMAGE, rows_per_shard=4)
    skipping = replace(config, skip_invalid=True)

    def run(name: str, config: EmbedConfig, part: str, megapixels: float) -> Path:
        limits = {**asdict(ImageLimits()), "max_megapixels": megapixels}
        monkeypatch.setenv(LIMITS_VARIABLE, json.dumps(limits))
        return embed(model, records, tmp_path / name, config, modality="image", partition=part)

    run("out", skipping, "1/3", 160)
    for other in (skipping, config):
        for megapixels in (0.05, 300):
            with pytest.raises(ValueError, match=r"a different output: image limits: .*: 160"):
                run("out", other, "2/3", megapixels)
    run("out", config, "2/3", 160)
    assert len(read_embeddings(run("out", skipping, "3/3", 160))[0]) == 8


def test_another_model_prompt_dtype_option_or_dataset_is_refused_with_both_values(
    model: Path, records: list[CaptionedImage], embedded: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(embedded, tmp_path / "texts")

    def refused(other: Path, data: Any, config: EmbedConfig, *entries: str) -> None:
        with refusing_for(*entries, folder=folder, content=read_bytes(embedded)):
            embed_texts(other, data, folder, config)

    changed = tiny_model(max_text_length=128)
    with torch.no_grad():
        changed[0].text_projection.weight[0] += 0.5
    refused(save_model(*changed, tmp_path / "head"), records, TEXT, "head weights")
    with torch.no_grad():
        changed[0].text_model.norm.weight[0] += 0.5
    changed_model = save_model(*changed, tmp_path / "both")
    refused(changed_model, records, TEXT, "weights", "head weights")
    prompted = tiny_model(max_text_length=128, prompt="chatml")
    refused(save_model(*prompted, tmp_path / "prompt"), records, TEXT, "prompt", "tokenizer")
    refused(model, records, replace(TEXT, dtype="float16"), "embedding dtype")
    refused(model, records, replace(TEXT, truncate_dim=8), "dimensions")
    refused(model, records, replace(TEXT, columns=()), "columns")
    refused(model, records, replace(TEXT, rows_per_shard=8), "rows_per_shard")
    refused(model, [records[1], records[0], *records[2:]], TEXT, "data")


def test_a_folder_with_other_things_is_refused_before_the_model_is_loaded(
    records: list[CaptionedImage], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"has no embeddings: notes\.txt\. Choose a new"):
        embed_texts(tmp_path / "no-model", records, tmp_path / "full")
    with pytest.raises(NotADirectoryError, match=r"notes\.txt is not a folder\. Choose another"):
        embed_texts(tmp_path / "no-model", records, tmp_path / "full" / "notes.txt")


def test_an_untrained_model_is_refused(records: list[CaptionedImage], tmp_path: Path) -> None:
    pair = tiny_model()
    pair[0].config.random_heads = ["text_projection"]
    save_model(*pair, tmp_path / "untrained")
    with pytest.raises(ValueError, match=r"refused for embed: it is untrained"):
        embed_texts(tmp_path / "untrained", records, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int4"}, "dtype='int4': Input should be 'float32'"),
        ({"columns": ("text", "text")}, "has duplicates"),
        ({"columns": ("price",)}, "columns.0='price': Input should be 'text'"),
        ({"int8_ranges": "folder"}, "needs dtype='int8', not 'float32'"),
        ({"rows_per_shard": 0}, "rows_per_shard=0"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbedConfig(**changes)


def test_flags_that_do_not_fit_are_refused(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for modality, flags, message in (
        ("text", ["--skip-invalid"], "skip_invalid: only for --modality image"),
        ("image", ["--partition", "3/2"], "must look like 2/8"),
        ("image", ["--columns", "text"], "text cannot be combined with modality image"),
    ):
        assert run_embed(model, images, tmp_path / "x", modality, *flags) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_images_need_no_captions(model: Path, images: Path, tmp_path: Path) -> None:
    contents = [(images / f"{number}.png").read_bytes() for number in range(3)]
    file = tmp_path / "images.parquet"
    rows = [{"bytes": content, "path": f"{n}.png"} for n, content in enumerate(contents)]
    pq.write_table(pa.table({"image": rows}), file)
    assert run_embed(model, file, tmp_path / "out", "image") == 0
    assert read_embeddings(tmp_path / "out")[0] == [
        f"images.parquet/{number}.png" for number in range(3)
    ]


def test_texts_need_no_images(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "texts.csv"
    file.write_text("id,text\nsku-1,a red apple\n,a dog\n", encoding="utf-8")
    assert run_embed(model, file, tmp_path / "out", "text", "--columns", "name", "text") == 0
    assert pq.read_table(tmp_path / "out").drop_columns(["embedding"]).to_pylist() == [
        {"id": "sku-1#0", "name": "sku-1", "text": "a red apple"},
        {"id": "texts.csv/1#0", "name": "texts.csv/1", "text": "a dog"},
    ]
    capsys.readouterr()
    file.write_text("id,text\n1,a red apple\n1,a dog\n2,\n", encoding="utf-8")
    assert run_embed(model, file, tmp_path / "other", "text") == 2
    error = capsys.readouterr().err
    assert "name or id repeated in one language: 1 (texts.csv row 1)" in error
    assert "no caption: 1 (texts.csv row 2)" in error and "distractors" not in error
    assert run_embed(model, file, tmp_path / "other", "image") == 2
    assert "found .csv." in capsys.readouterr().err


def test_an_image_whose_name_is_not_unicode_is_named_and_counted_or_left_out(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("0.png", os.fsdecode(b"sea\xff.png")):
        (folder / name).write_bytes((images / "0.png").read_bytes())
    (folder / "1.png").write_bytes(b"no image")
    for flags in ((), ("--no-check-images",)):
        assert run_embed(model, folder, tmp_path / "out", "image", *flags) == 2
        error = capsys.readouterr().err
        assert r"sea\udcff.png': its file name is not valid Unicode. Rename it." in error
        assert f"image unreadable: {1 if flags else 2} (" in error
    assert run_embed(model, folder, tmp_path / "out", "image", "--skip-invalid") == 0
    shown = capsys.readouterr()
    assert "Skipped 1 image whose name is not valid Unicode: " in shown.err
    assert r"sea\udcff.png'. Rename them." in shown.err
    assert "Skipped 1 undecodable image: 1.png." in shown.out
    assert read_embeddings(tmp_path / "out")[0] == ["0.png"]


@pytest.mark.parametrize("command", ["embed", "index"])
def test_progress_bars_can_be_turned_off(
    command: str, model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither for a folder of images nor for one of pairs."""
    flags = ["--device", "cpu", *([] if command == "index" else ["--modality", "image"])]
    if command == "index":
        pytest.importorskip("lancedb")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes((images / "0.png").read_bytes())
    for data in (tmp_path / "images", images)[: 1 if command == "index" else 2]:
        words = [command, str(model), str(data)]
        output = str(tmp_path / f"silent-{data.parent.name}")
        assert main([*words, output, *flags, "--no-show-progress"]) == 0
        assert "it/s" not in (error := capsys.readouterr().err) and " images/s" not in error
    logging.enable_progress_bar()  # as in a new process
    assert main([*words, str(tmp_path / "shown"), *flags]) == 0
    assert "Loading weights" in (error := capsys.readouterr().err) and " images/s" in error


def test_an_error_of_the_data_names_each_option_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a dog", "price": 3}', encoding="utf-8")
    assert run_embed(model, file, tmp_path / "out", "text") == 2
    assert capsys.readouterr().err.count("ignore_fields") == 1
