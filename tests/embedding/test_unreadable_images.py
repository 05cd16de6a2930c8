"""Undecodable images in a dataset that is being encoded: all are named, no shard is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from embedding_runs import IMAGE
from extracting import EXACT
from interruptions import read_bytes
from tiny_folders import save_captioned_images

from modeling_llm2clip import DataValidationError
from modeling_llm2clip.configs.encoding_config import EmbedConfig, ExtractConfig
from modeling_llm2clip.data.images import image_sources
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.embedding import embed as embedding
from modeling_llm2clip.embedding import extract as extraction

_COUNT = 18
Run = Callable[[Path], Path]
_RUNS: list[tuple[Callable[..., Path], ExtractConfig | EmbedConfig]] = [
    # Eight images a shard, or four.
    (
        extraction.extract,
        ExtractConfig(**{**vars(EXACT), "rows_per_shard": 8, "batch_size": 2}),
    ),
    (embedding.embed, IMAGE),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return save_captioned_images(folder, count=_COUNT)


@pytest.fixture(params=_RUNS, ids=["extract", "embed"])
def run(request: Any, model: Path, data: Path) -> Run:
    """Encodes the current images of the folder."""
    function, config = request.param
    return lambda output: function(model, load_records(data), output, config, modality="image")


def break_images(data: Path, numbers: Sequence[int]) -> None:
    for file in (data / f"{n}.png" for n in numbers):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])


def test_all_are_named_and_a_repaired_image_is_another_output(
    run: Run, data: Path, tmp_path: Path
) -> None:
    whole = (data / "9.png").read_bytes(), (data / "17.png").read_bytes()
    break_images(data, (9, 17))
    with pytest.raises(DataValidationError, match=r"(?s)2 err.*9\.png.*17\.png.*new folder") as e:
        run(tmp_path / "output")
    assert e.value.counts == {"image unreadable": 2}
    before = read_bytes(tmp_path / "output")
    assert any(name.startswith("_complete-00000") for name in before)
    (data / "9.png").write_bytes(whole[0])
    (data / "17.png").write_bytes(whole[1])
    with pytest.raises(ValueError, match="holds a different output: images"):
        run(tmp_path / "output")
    assert read_bytes(tmp_path / "output") == before


def test_all_are_named_where_the_sample_of_int8_ranges_meets_one(
    model: Path, data: Path, tmp_path: Path
) -> None:
    break_images(data, (0, 9))
    config = replace(IMAGE, dtype="int8")
    with pytest.raises(DataValidationError, match="image unreadable: 2 "):
        embedding.embed(model, load_records(data), tmp_path / "out", config, modality="image")
    assert not (tmp_path / "out").exists()


def test_each_image_is_decoded_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []
    decode = image_sources.open_image

    def note(image: Any, **options: Any) -> Any:
        decoded.append(image)
        return decode(image, **options)

    monkeypatch.setattr(image_sources, "open_image", note)
    run(tmp_path / "output")
    assert len(decoded) == len(set(decoded)) == _COUNT
