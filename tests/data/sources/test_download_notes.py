"""img2dataset's output is read without changes: Parquet, or tar shards with notes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from downloads import (
    CAPTIONS,
    IMAGES,
    URLS,
    describe_rows,
    write_downloaded_parquet,
    write_downloaded_tar,
    write_notes,
)

from modeling_llm2clip.cli.options import read_captioned_images
from modeling_llm2clip.configs.config_fields import DataConfig
from modeling_llm2clip.data.records import record_index
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.record_table import skipped_file
from modeling_llm2clip.data.streams.record_streams import stream_records


def content(record: Any) -> Any:
    return replace(record, image=None), record.image.read_bytes(), record.url


@pytest.mark.parametrize("write", [write_downloaded_tar, write_downloaded_parquet])
def test_output_of_img2dataset_is_read_and_streamed_without_changes(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = write(tmp_path / "data")
    records = load_records(folder, check_images=True)
    assert [record.captions for record in records] == [(CAPTIONS[0],), (CAPTIONS[2],)]
    assert [record.image.read_bytes() for record in records] == [IMAGES[0], IMAGES[2]]  # type: ignore[union-attr]
    assert [record.url for record in records] == [URLS[0], URLS[2]]
    assert [Path(record.name).stem for record in records] == ["000000000", "000000002"]
    assert len({record.group_id for record in records}) == 2
    stream = stream_records(folder, buffer_size=1)
    assert [content(record) for record in stream] == [content(record) for record in records]
    assert stream.report.lost_samples == 0


@pytest.mark.parametrize("column", ["jpg", "png", "webp"])
def test_rows_without_an_image_are_counted_and_not_errors(
    column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_downloaded_parquet(tmp_path / "data", column=column)
    expected = {"image not downloaded: failed_to_download": 1}
    assert load_records(folder).skipped == expected
    monkeypatch.setattr(record_index, "_MOST_ROWS_IN_MEMORY", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built, found = load_records(folder), load_records(folder)
    assert found.file == built.file is not None
    assert built.skipped == found.skipped == expected
    # Notes that are damaged or gone count nothing else: all is read again.
    notes = skipped_file(built.file)
    notes.write_text(notes.read_text(encoding="utf-8").replace("1", "7"), encoding="utf-8")
    again = load_records(folder)
    assert again.skipped == expected and again.file not in (None, built.file)
    skipped_file(again.file).unlink()
    assert load_records(folder).skipped == expected
    stream = stream_records(folder)
    assert len(list(stream)) == 2 and stream.report.skipped_samples == 1
    assert stream.report.problems.counts == expected


@pytest.mark.parametrize("show_progress", [True, False])
def test_a_command_decodes_what_it_trains_on_and_says_what_it_left_out(
    show_progress: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_downloaded_parquet(tmp_path / "data")
    records = read_captioned_images(
        str(data), DataConfig(cache=False), require_images=True, trains_on_images=True,
        show_progress=show_progress,
    )  # fmt: skip
    assert [record.captions for record in records] == [(CAPTIONS[0],), (CAPTIONS[2],)]
    shown = capsys.readouterr().err
    assert "skipped 1 row: image not downloaded: failed_to_download" in shown
    assert ("decode:" in shown) is show_progress


def test_columns_that_the_user_kept_are_fields(tmp_path: Path) -> None:
    rows = [{**row, "clip_score": 3} for row in describe_rows()]
    write_notes(tmp_path / "0.parquet", rows, column="jpg")
    with pytest.raises(ValueError, match="unknown field 'clip_score': 2 "):
        load_records(tmp_path)
    assert len(load_records(tmp_path, ignore_fields=["clip_score"])) == 2
