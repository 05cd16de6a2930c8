"""Laws of fingerprints: copies of a model agree, and every other maker differs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import Break, edit_json
from tiny import tiny_model, tiny_tokenizer
from transformers import CLIPVisionConfig, LlamaConfig

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.model_folders.fingerprint import (
    fingerprint_model,
    fingerprint_text,
    fingerprint_vision,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(), tmp_path_factory.mktemp("model"))


def save(parts: tuple[Any, Any], folder: Path, **options: Any) -> Path:
    model, processor = parts
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    return folder


def difference(left: dict[str, str], right: dict[str, str]) -> set[str]:
    assert set(left) == set(right)
    return {name for name in left if left[name] != right[name]}


@pytest.mark.parametrize("vision", ["vit", "dinov2"])  # whose weights are renamed on loading
def test_loading_and_saving_again_changes_nothing(vision: str, tmp_path: Path) -> None:
    first = save(tiny_model(vision), tmp_path / "first", max_shard_size="50KB")
    assert len(list(first.glob("*.safetensors"))) > 1
    loaded = LLM2CLIPModel.from_pretrained(first), LLM2CLIPProcessor.from_pretrained(first)
    loaded[1](text=["a dog"], return_tensors="pt")  # a call must leave no trace
    second = save(loaded, tmp_path / "second")
    assert fingerprint_text(first) == fingerprint_text(second)
    assert fingerprint_vision(first) == fingerprint_vision(second)


def _change_weight(model: LLM2CLIPModel, _: Any) -> None:
    with torch.no_grad():
        next(model.text_model.parameters())[0, 0] += 1


def _make_causal(model: LLM2CLIPModel, _: Any) -> None:
    model.config.bidirectional = False
    model.config.text_config.is_causal = True


ROTARY = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        (_change_weight, "weights"),
        (lambda m, _: setattr(m.config.text_config, "rope_parameters", ROTARY), "architecture"),
        (lambda model, _: setattr(model.config, "prompt_suffix_ids", [5]), "prompt"),
        (lambda model, _: setattr(model.config, "text_pooling", "last_token"), "pooling"),
        (_make_causal, "direction"),
        (lambda _, processor: setattr(processor, "max_text_length", 31), "max_text_length"),
        (lambda _, p: setattr(p, "tokenizer", tiny_tokenizer(begins=False)), "tokenizer"),
        (lambda _, processor: processor.tokenizer.add_tokens("photo"), "tokenizer"),
    ],
)
def test_every_change_to_a_captions_embedding_changes_one_entry(
    folder: Path, tmp_path: Path, change: Callable[[Any, Any], None], entry: str
) -> None:
    parts = tiny_model()
    change(*parts)
    changed = save(parts, tmp_path)
    assert difference(fingerprint_text(changed), fingerprint_text(folder)) == {entry}
    # Images do not depend on it.
    assert fingerprint_vision(changed) == fingerprint_vision(folder)


@pytest.mark.parametrize("fingerprint", [fingerprint_text, fingerprint_vision])
def test_fields_that_a_transformers_version_adds_change_nothing(
    fingerprint: Callable[[Path], dict[str, str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(folder)
    for family in (LlamaConfig, CLIPVisionConfig):
        to_diff_dict = family.to_diff_dict
        # As 5.6 does beside the frequencies of Gemma 3, and 5.24 does not.
        monkeypatch.setattr(
            family, "to_diff_dict", lambda self, f=to_diff_dict: {**f(self), "rope_theta": None}
        )
    assert fingerprint(folder) == before


def test_another_dtype_is_another_model(folder: Path, tmp_path: Path) -> None:
    half = fingerprint_text(save(tiny_model(dtype=torch.bfloat16), tmp_path))
    assert difference(half, fingerprint_text(folder)) == {"weights", "dtype"}
    assert half["dtype"] == "bfloat16"


def edit_image_processor(change: Callable[[dict[str, Any]], object]) -> Break:
    return edit_json("processor_config.json", lambda c: change(c["image_processor"]))


def change_library(content: dict[str, Any]) -> None:
    name = content["image_processor_type"]
    content["image_processor_type"] = (
        name.removesuffix("Pil") if name.endswith("Pil") else f"{name}Pil"
    )


def quantize(content: dict[str, Any]) -> None:
    content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def rename_source(content: dict[str, Any]) -> None:
    content["eos_token_id"] = 5
    content["text_config"]["_name_or_path"] = "owner/other"


# A change of a file, and the entries that differ for texts and for images.
EDITS: dict[str, tuple[Break, set[str], set[str]]] = {
    "colors": (
        edit_image_processor(lambda c: c.update(image_mean=[0.1, 0.2, 0.3])),
        set(), {"image_processor"},
    ),
    # Its settings are the same, and it is free to do something else with them.
    "class of the image processor": (
        edit_image_processor(lambda c: c.update(image_processor_type="ViTImageProcessor")),
        set(), {"image_processor"},
    ),
    "library of the image processor": (edit_image_processor(change_library), set(), set()),
    "quantization": (edit_json("config.json", quantize), {"architecture"}, set()),
    # Where a tower came from, and what the tokenizer's special ids are called.
    "names": (edit_json("config.json", rename_source), set(), set()),
    "head": (  # both are taken before it
        edit_json("config.json", lambda c: c.update(normalize_text_before_adapter=False)),
        set(), set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_file_is_another_model_if_it_affects_embeddings(
    name: str, folder: Path, tmp_path: Path
) -> None:
    edit, of_texts, of_images = EDITS[name]
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    edit(other)
    assert difference(fingerprint_text(other), fingerprint_text(folder)) == of_texts
    assert difference(fingerprint_vision(other), fingerprint_vision(folder)) == of_images
    models = fingerprint_model(other), fingerprint_model(folder)
    assert difference(*models) == ({"normalize_text_before_adapter"} if name == "head" else set())


@pytest.mark.parametrize(
    "settings", [{"truncation_side": "left"}, {"split_special_tokens": True}], ids=str
)
def test_settings_outside_the_tokenizer_file_that_change_ids_count(
    settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    edit_json("tokenizer_config.json", lambda content: content.update(settings))(other)
    text = "<|im_end|> a dog" * 40
    ids = [LLM2CLIPProcessor.from_pretrained(f)(text=[text])["input_ids"] for f in (folder, other)]
    assert ids[0].tolist() != ids[1].tolist()
    assert difference(fingerprint_text(other), fingerprint_text(folder)) == {"tokenizer"}


def test_adapter_and_projections_do_not_count(folder: Path, tmp_path: Path) -> None:
    model, processor = tiny_model()
    with torch.no_grad():
        for module in (model.text_adapter, model.text_projection, model.visual_projection):
            for parameter in module.parameters():
                parameter += 1
    changed = save((model, processor), tmp_path)
    assert fingerprint_text(changed) == fingerprint_text(folder)
    assert fingerprint_vision(changed) == fingerprint_vision(folder)
