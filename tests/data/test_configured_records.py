"""What a command reads as its flags say, and what it says of rows that it left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from downloads import CAPTIONS, URLS, write_downloaded_tar

from modeling_llm2clip.cli.options import read_captioned_images
from modeling_llm2clip.configs.data_config import DataConfig
from modeling_llm2clip.data.captions.caption_joins import read_configured_records


@pytest.fixture(autouse=True)
def _own(own_cache: Path) -> None:
    """No index of another test."""


def test_published_captions_come_after_the_own_ones_and_the_rest_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_downloaded_tar(tmp_path / "data")
    lines = [{"url": URLS[0], "caption": "published"}, {"url": "https://x.example", "caption": "?"}]
    file = tmp_path / "captions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    config = DataConfig(captions_from=file)
    read = [
        read_configured_records(data, config, require_images=True, check_images=True)
        for _ in range(2)
    ]
    for records in read:  # the second reading has left the first one's file alone
        assert [record.captions for record in records] == [
            (CAPTIONS[0], "published"),
            (CAPTIONS[2],),
        ]
    shown = capsys.readouterr().err
    assert "1 record matched; without a row: 1" in shown
    assert "1 row without a record (https://x.example)" in shown


def test_without_published_captions_nothing_is_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_downloaded_tar(tmp_path / "data")
    records = read_configured_records(data, DataConfig(), require_images=False, check_images=False)
    assert [record.captions for record in records] == [(CAPTIONS[0],), (CAPTIONS[2],)]
    assert "matched" not in capsys.readouterr().err


@pytest.mark.parametrize("show_progress", [True, False])
def test_progress_is_shown_only_where_it_is_wanted(
    show_progress: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_downloaded_tar(tmp_path / "data")
    read_captioned_images(str(data), DataConfig(), require_images=True, show_progress=show_progress)
    assert ("decode:" in capsys.readouterr().err) is show_progress
