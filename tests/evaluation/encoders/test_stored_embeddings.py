"""Embeddings in place of a model: found by name, refused if they are broken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_encoders import TEXTS, write_named_embeddings

from modeling_llm2clip.data.named_embeddings import side_file
from modeling_llm2clip.data.store.store_manifest import MANIFEST_FILE
from modeling_llm2clip.evaluation.encoders.auto import detect_model_type, load_encoder


def write_sides(folder: Path, *, width: int = 4, image_width: int = 4) -> Path:
    write_named_embeddings(side_file(folder, "texts"), TEXTS, torch.eye(len(TEXTS))[:, :width])
    names = [f"{number}.png" for number in range(3)]
    write_named_embeddings(side_file(folder, "images"), names, torch.ones(3, image_width))
    return folder


def test_embeddings_are_found_by_name_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "texts.tmp").write_text("mine")
    encoder = load_encoder(write_sides(tmp_path, width=8, image_width=8))
    assert detect_model_type(tmp_path) == "embeddings"
    found = encoder.encode_texts([TEXTS[5], TEXTS[0], TEXTS[5]])
    assert torch.equal(found.embeds, torch.eye(8)[[5, 0, 5]])
    assert found.is_truncated is None  # nobody knows
    images = encoder.encode_images([None, None], names=["2.png", "0.png"])
    assert torch.equal(images, torch.ones(2, 8))
    assert (tmp_path / "texts.tmp").read_text() == "mine"  # a file beside them


def test_a_name_without_an_embedding_is_named(tmp_path: Path) -> None:
    encoder = load_encoder(write_sides(tmp_path))
    with pytest.raises(ValueError, match=r"no embedding for 1 of 2 images: '9\.png'"):
        encoder.encode_images([None, None], names=["0.png", "9.png"])


def test_one_side_alone_is_enough_for_its_tasks(tmp_path: Path) -> None:
    write_named_embeddings(side_file(tmp_path, "texts"), TEXTS, torch.eye(len(TEXTS)))
    encoder = load_encoder(tmp_path)
    assert encoder.description.images is None and encoder.description.text is not None


def test_sides_of_unlike_width_are_refused(tmp_path: Path) -> None:
    write_sides(tmp_path, width=4, image_width=6)
    with pytest.raises(ValueError, match=r"widths differ: \{'texts': 4, 'images': 6\}"):
        load_encoder(tmp_path)


def test_other_names_of_the_same_embeddings_are_other_embeddings(tmp_path: Path) -> None:
    before = load_encoder(write_sides(tmp_path)).description.fingerprint
    names = [f"{(number + 1) % 3}.png" for number in range(3)]
    write_named_embeddings(side_file(tmp_path, "images"), names, torch.ones(3, 4))
    after = load_encoder(tmp_path).description.fingerprint
    assert {name for name in before if before[name] != after[name]} == {"images names"}


def test_a_store_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for name in ("captions", "images"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST_FILE).touch()
    for folder in (tmp_path, tmp_path / "captions"):
        with pytest.raises(ValueError, match=r"before projection.*evaluate the model itself"):
            load_encoder(folder)
