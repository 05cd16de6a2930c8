"""Laws of the command `embed`: which data it takes, and what it says of those it does not."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers.utils import logging

from modeling_llm2clip.__main__ import main


def run_embed(model: Path, data: Path, output: Path, modality: str, *flags: str) -> int:
    command = ["embed", str(model), str(data), str(output), "--modality", modality]
    return main([*command, "--device", "cpu", *flags])


def read_ids(folder: Path) -> list[str]:
    ids: list[str] = pq.read_table(folder)["id"].to_pylist()
    return ids


def test_images_need_no_captions(model: Path, images: Path, tmp_path: Path) -> None:
    contents = [(images / f"{number}.png").read_bytes() for number in range(3)]
    file = tmp_path / "images.parquet"
    rows = [{"bytes": content, "path": f"{n}.png"} for n, content in enumerate(contents)]
    pq.write_table(pa.table({"image": rows}), file)
    assert run_embed(model, file, tmp_path / "out", "image") == 0
    assert read_ids(tmp_path / "out") == [f"images.parquet/{number}.png" for number in range(3)]


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
        assert r"sea\udcff.png': its name is not Unicode. Rename it." in error
        assert f"image unreadable: {1 if flags else 2} (" in error
    assert run_embed(model, folder, tmp_path / "out", "image", "--skip-invalid") == 0
    shown = capsys.readouterr()
    assert "Skipped 1 image without a Unicode name: " in shown.err
    assert r"sea\udcff.png'. Rename." in shown.err
    assert "Skipped 1 undecodable image: 1.png." in shown.out
    assert read_ids(tmp_path / "out") == ["0.png"]


@pytest.mark.parametrize("command", ["embed a folder", "embed pairs", "index"])
def test_no_progress_bar_is_shown_where_none_is_wanted(
    command: str,
    model: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command == "index":
        pytest.importorskip("lancedb")
    if command != "embed pairs":
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "0.png").write_bytes((images / "0.png").read_bytes())
        images = tmp_path / "images"
    words = [command.partition(" ")[0], str(model), str(images)]
    flags = ["--device", "cpu", *([] if command == "index" else ["--modality", "image"])]
    assert main([*words, str(tmp_path / "silent"), *flags, "--no-show-progress"]) == 0
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
