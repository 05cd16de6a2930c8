"""Image embeddings that a search keeps by default: where, for whom, and after a break."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shared_models import shared_model
from tiny import draw_noise, tiny_model

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.data.named_embeddings import read_named_embeddings
from modeling_llm2clip.search import embedding_cache
from modeling_llm2clip.search.embedding_cache import EmbeddingCache

BATCH = 2


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        draw_noise(seed=number).save(folder / f"{number}.png")
    return folder


def save_model(folder: Path, **settings: Any) -> str:
    model, processor = tiny_model(**settings) if settings else shared_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def list_kept(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


def find_known(shown: str) -> str:
    (line,) = [line for line in shown.splitlines() if "of them known" in line]
    return line


def test_the_first_search_keeps_its_embeddings_outside_the_image_folder(
    images: Path, own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search", save_model(tmp_path / "model"), str(images), "a dog"]
    before = sorted(images.rglob("*"))
    assert main([*command, "--no-keep-index"]) == 0
    assert find_known(capsys.readouterr().err).endswith("embeddings are not kept.")
    assert list_kept(own_cache) == []
    assert main(command) == 0
    first = capsys.readouterr()
    (file,) = list_kept(own_cache)
    assert find_known(first.err) == f"6 images, 0 of them known; embeddings in {file}."
    assert main(command) == 0
    second = capsys.readouterr()
    assert find_known(second.err) == f"6 images, 6 of them known; embeddings in {file}."
    assert first.out == second.out
    assert sorted(images.rglob("*")) == before


def test_each_model_and_each_folder_keeps_its_own_embeddings(
    images: Path, own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [save_model(tmp_path / "clip"), save_model(tmp_path / "vit", vision="vit")]
    shutil.copytree(images, tmp_path / "others" / images.name)
    for model, folder in itertools.product(models, (images, tmp_path / "others" / images.name)):
        assert main(["search", model, str(folder), "a dog"]) == 0  # none is refused
        assert "6 images, 0 of them known" in capsys.readouterr().err
    assert len(list_kept(own_cache)) == 4
    assert len({file.parent for file in list_kept(own_cache)}) == 2


def test_a_cache_that_cannot_be_written_is_reported_and_the_search_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "no folder").write_text("mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
    assert main(["search", save_model(tmp_path / "model"), str(images), "a dog"]) == 0
    shown = capsys.readouterr()
    assert "The image embeddings are not kept: " in shown.err and "no folder" in shown.err
    assert shown.out.count(".png") == 6


def test_a_file_to_keep_in_and_no_keeping_exclude_each_other(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["search", "m", str(images), "a dog", "--no-keep-index", "--index", "a.safetensors"]
    assert main(words) == 2
    assert "--index a.safetensors excludes --no-keep-index" in capsys.readouterr().err


def test_every_whole_batch_before_a_break_is_kept(images: Path, tmp_path: Path) -> None:
    paths = sorted(images.iterdir())
    paths[-1].write_bytes(b"no image")  # in the third batch
    with pytest.raises(ValueError, match=r"5\.png: not an image"):
        EmbeddingCache(tmp_path / "kept").encode(*shared_model(), paths, batch_size=BATCH)
    again = EmbeddingCache(tmp_path / "kept")
    assert again.find_new(paths) == paths[4:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_search_has_kept_what_was_encoded_before_its_last_write(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_cache, "_SECONDS_BETWEEN_WRITES", -1)
    model, processor = shared_model()
    paths = sorted(images.iterdir())
    child = os.fork()
    if child == 0:
        calls = itertools.count(1)

        def die_at_the_last(**inputs: Any) -> Any:
            return processor(**inputs) if next(calls) < len(paths) else os._exit(9)

        EmbeddingCache(tmp_path / "kept").encode(model, die_at_the_last, paths, batch_size=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    # Three batches are prepared ahead of the tower.
    assert len(EmbeddingCache(tmp_path / "kept").find_new(paths)) <= 4


def test_one_progress_bar_counts_all_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1030, 4, 4, 3), dtype=np.uint8)
    paths = [tmp_path / f"{number}.bmp" for number in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    EmbeddingCache().encode(*shared_model(), paths, batch_size=128, show_progress=True)
    totals = re.findall(r"\d+/(\d+) \[", capsys.readouterr().err)
    assert set(totals) == {"1030"}


def test_more_embeddings_than_a_file_holds_are_refused_before_anything_is_encoded(
    images: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["search", save_model(tmp_path / "model"), str(images), "a dog"]
    monkeypatch.setattr(embedding_cache, "_MAX_EMBEDDINGS", 5)
    assert main(command) == 2
    assert "holds at most 5 embeddings; with 6 new images" in capsys.readouterr().err
    assert list_kept(own_cache) == []
    assert main([*command, "--no-keep-index"]) == 0


def test_a_header_has_room_for_the_most_that_is_kept(tmp_path: Path) -> None:
    """What a name takes of the header is measured, since 1.4 million would take minutes."""
    sizes = []
    for count in (100, 200):
        kept = EmbeddingCache(tmp_path / f"{count}")
        kept._embeddings = {f"{number:064x}": make_row(number) for number in range(count)}
        kept._try_to_write()
        content = (tmp_path / f"{count}").read_bytes()
        sizes.append(int.from_bytes(content[:8], "little"))
        assert len(read_named_embeddings(tmp_path / f"{count}").names) == count
    a_name = (sizes[1] - sizes[0]) / 100
    # 8 bytes of alignment at most, in either of the two.
    assert sizes[0] + (embedding_cache._MAX_EMBEDDINGS - 100) * (a_name + 0.08) < 100_000_000


def make_row(number: int) -> torch.Tensor:
    return torch.full((1,), float(number))


def test_what_another_search_is_writing_is_left_alone(images: Path, tmp_path: Path) -> None:
    half = tmp_path / "kept.tmp"  # as `write_atomically` calls it
    half.write_bytes(b"half of it")
    EmbeddingCache(tmp_path / "kept").encode(*shared_model(), sorted(images.iterdir()))
    assert half.read_bytes() == b"half of it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "kept", "kept.tmp"]
