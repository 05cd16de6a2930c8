"""Embeddings in place of a model: found by name, refused if they are broken or of another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import TEXTS, save_tiny_images, write_named_embeddings
from tiny_folders import export_tiny_model

from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.configs.evaluation_config import (
    EncoderConfig,
    EvaluatedModel,
    EvaluationConfig,
)
from modeling_llm2clip.data.named_embeddings import side_file
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.evaluation.encoders.auto import detect_model_type, load_encoder
from modeling_llm2clip.evaluation.encoders.encoder import EvaluationEncoder
from modeling_llm2clip.evaluation.evaluate import evaluate

# float32 stores hold what the model computed; the sums of one text do not change with its batch
# by more than their rounding.
ROUNDING = 1e-5


def write_sides(folder: Path, *, width: int = 4, image_width: int = 4) -> Path:
    write_named_embeddings(side_file(folder, "texts"), TEXTS, torch.eye(len(TEXTS))[:, :width])
    names = [f"{number}.png" for number in range(3)]
    write_named_embeddings(side_file(folder, "images"), names, torch.ones(3, image_width))
    return folder


def open_stores(
    folder: Path, data: Path, config: EncoderConfig | None = None, *, head: Path | None = None
) -> EvaluationEncoder:
    stores = EvaluatedModel(
        source=str(folder), extracted_from=str(data), head=None if head is None else str(head)
    )
    return load_encoder(stores, config)


def test_embeddings_are_found_by_name_in_any_order(tmp_path: Path) -> None:
    encoder = load_encoder(write_sides(tmp_path, width=8, image_width=8))
    assert detect_model_type(tmp_path) == "embeddings"
    found = encoder.encode_texts([TEXTS[5], TEXTS[0], TEXTS[5]])
    assert torch.equal(found.embeds, torch.eye(8)[[5, 0, 5]])
    assert found.is_truncated is None  # nobody knows
    images = encoder.encode_images([None, None], names=["2.png", "0.png"])
    assert torch.equal(images, torch.ones(2, 8))


def test_a_name_without_an_embedding_is_named(tmp_path: Path) -> None:
    encoder = load_encoder(write_sides(tmp_path))
    with pytest.raises(ValueError, match=r"no embedding for 1 of 2 images: \['9\.png'\]"):
        encoder.encode_images([None, None], names=["0.png", "9.png"])


def test_one_side_alone_is_enough_for_its_tasks(tmp_path: Path) -> None:
    write_named_embeddings(side_file(tmp_path, "texts"), TEXTS, torch.eye(len(TEXTS)))
    encoder = load_encoder(tmp_path)
    assert encoder.description.images is None and encoder.description.text is not None


@pytest.mark.parametrize("option", ["head", "extracted_from"])
def test_final_embeddings_need_nothing_else(tmp_path: Path, option: str) -> None:
    model = EvaluatedModel(source=str(write_sides(tmp_path / "sides")), **{option: str(tmp_path)})
    with pytest.raises(ValueError, match=r"final embeddings; .* only for stores"):
        load_encoder(model)


def test_sides_of_unlike_width_are_refused(tmp_path: Path) -> None:
    write_sides(tmp_path, width=4, image_width=6)
    with pytest.raises(ValueError, match=r"widths \{'texts': 4, 'images': 6\}"):
        load_encoder(tmp_path)


def test_other_names_of_the_same_embeddings_are_other_embeddings(tmp_path: Path) -> None:
    before = load_encoder(write_sides(tmp_path)).description.fingerprint
    names = [f"{(number + 1) % 3}.png" for number in range(3)]
    write_named_embeddings(side_file(tmp_path, "images"), names, torch.ones(3, 4))
    after = load_encoder(tmp_path).description.fingerprint
    assert {name for name in before if before[name] != after[name]} == {"images names"}


def test_a_file_beside_named_embeddings_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "texts.tmp").write_text("mine")
    write_sides(tmp_path)
    assert (tmp_path / "texts.tmp").read_text() == "mine"


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, captioned images, and both stores of them."""
    root = tmp_path_factory.mktemp("extracted")
    model = export_tiny_model(root / "model")
    lines = [
        {"image": path.name, "captions": [text, f"{text} once more"], "long_captions": [text * 3]}
        for path, text in zip(save_tiny_images(root / "data", len(TEXTS)), TEXTS, strict=True)
    ]
    (root / "data" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    records = load_records(root / "data")
    exact = ExtractConfig(store_dtype="float32", show_progress=False)
    extract(model, records, root / "stores" / "captions", exact, modality="text")
    extract(model, records, root / "stores" / "images", exact, modality="image")
    return root, model, records


def test_stores_through_their_models_head_are_the_models_embeddings(extracted: Any) -> None:
    root, model, records = extracted
    stored = open_stores(root / "stores", root / "data", head=model)
    ours = load_encoder(model)
    texts = [text for r in records for text in (*r.captions, *r.long_captions)]
    images, names = [r.image for r in records], [r.name for r in records]
    for found, wanted in (
        (stored.encode_texts(texts).embeds, ours.encode_texts(texts).embeds),
        (stored.encode_images(images, names=names),
         ours.encode_images(images, names=names)),
    ):  # fmt: skip
        torch.testing.assert_close(
            F.normalize(found, dim=-1), F.normalize(wanted, dim=-1), rtol=0, atol=ROUNDING
        )


def test_the_head_and_its_dtype_are_described(extracted: Any, tmp_path: Path) -> None:
    root, model, _ = extracted
    other = Path(shutil.copytree(model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config["normalize_text_before_adapter"] = not config["normalize_text_before_adapter"]
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    described = [
        open_stores(root / "stores", root / "data", settings, head=head).description
        for head, settings in (
            (model, EncoderConfig()),
            (other, EncoderConfig()),
            (model, EncoderConfig(dtype="bfloat16")),
        )
    ]
    assert described[0].fingerprint != described[1].fingerprint
    assert [found.dtype for found in described] == ["float32", "float32", "bfloat16+float32"]


def test_a_caption_store_alone_needs_no_head(extracted: Any) -> None:
    root, _, records = extracted
    encoder = open_stores(root / "stores" / "captions", root / "data")
    assert encoder.encode_texts([records[2].captions[1]]).embeds.shape == (1, 32)
    assert encoder.description.text == {"stored_as": "stores", "dtype": "float32", "width": 32}


def test_stored_images_and_captions_are_not_compared_without_a_head(extracted: Any) -> None:
    # Both towers of this model are 32 wide, so that nothing else would stop it.
    root, _, _ = extracted
    encoder = open_stores(root / "stores", root / "data")
    assert encoder.description.images is None
    with pytest.raises(ValueError, match=r"images as the tower encodes them.*--head"):
        open_stores(root / "stores" / "images", root / "data")


def test_stores_without_their_data_or_with_another_are_refused(
    extracted: Any, tmp_path: Path
) -> None:
    root, _, _ = extracted
    data = Path(shutil.copytree(root / "data", tmp_path / "data"))
    lines = (data / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    (data / "captions.jsonl").write_text("\n".join(lines[1:]), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"do not say which row belongs to which text.*--extracted-from"
    ):
        load_encoder(root / "stores" / "captions")
    with pytest.raises(ValueError, match=r"extracted from another dataset.*8 items, here 7"):
        open_stores(root / "stores" / "captions", data)


def test_a_store_of_other_images_of_the_same_names_is_refused(
    extracted: Any, tmp_path: Path
) -> None:
    root, model, records = extracted
    data = Path(shutil.copytree(root / "data", tmp_path / "data"))
    assert open_stores(root / "stores", data, head=model)
    shutil.copy(data / records[1].name, data / records[0].name)
    with pytest.raises(ValueError, match=r"made from other images of these names"):
        open_stores(root / "stores", data, head=model)


def test_stores_have_the_scores_of_the_model_that_computed_them(
    extracted: Any, tmp_path: Path
) -> None:
    root, model, _ = extracted
    stores = EvaluatedModel(
        source=str(root / "stores"), extracted_from=str(root / "data"), head=str(model)
    )
    stored, ours = evaluate(
        [stores, model],
        root / "data",
        EvaluationConfig(output=tmp_path, show_progress=False),
        tasks=("retrieval",),
    )
    assert stored.scores == ours.scores
    assert stored.protocol["model"]["model_type"] == "embeddings"
    assert stored.counts["texts_truncated"] is None


def test_a_head_that_did_not_compute_the_stores_is_refused(extracted: Any, tmp_path: Path) -> None:
    root, _, _ = extracted
    other = export_tiny_model(tmp_path / "other", vision="vit", llm="qwen2")
    with pytest.raises(ValueError, match=r"made by another model"):
        open_stores(root / "stores", root / "data", head=other)
