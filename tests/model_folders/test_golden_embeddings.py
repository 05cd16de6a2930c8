"""Recorded embeddings and files: every change is named, and damage is not written anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import Break, edit_json, edit_weights, remove, set_weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from shared_models import shared_model
from torch import Tensor

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.configs.export_config import ExportConfig
from modeling_llm2clip.doctor.file_checks import check_recorded_files
from modeling_llm2clip.doctor.model_report import NotApplicableError
from modeling_llm2clip.doctor.model_under_test import ModelUnderTest
from modeling_llm2clip.model_folders.golden_embeddings import (
    GOLDEN_FILE,
    compare_golden,
    read_golden,
    require_recorded_files,
)
from modeling_llm2clip.model_folders.model_loading import load_model, load_partial_model
from modeling_llm2clip.model_folders.model_writing import save_model, save_trained_model
from modeling_llm2clip.publishing.export_model import export_model


def add_a_token(content: dict[str, Any]) -> None:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"].append({"id": 319, "content": "photo", "special": False, **plain})


def normalize(kind: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        before = [content["normalizer"]] if content["normalizer"] else []
        content["normalizer"] = {"type": "Sequence", "normalizers": [*before, {"type": kind}]}

    return change


def swap_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]


def halve_a_weight(weights: dict[str, Any]) -> None:
    weights["text_model.embed_tokens.weight"][-1] /= 2  # of a token that no golden text has


def move_a_token(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["dtype"] = 3  # a word of vocabularies, and a field of other files


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights": ("weights", edit_weights(halve_a_weight)),
    "config": ("config.json", edit_json("config.json", lambda c: c.update(max_text_length=31))),
    # It decides what is refused: edited, it would let random weights pass.
    "random heads": (
        "config.json",
        edit_json("config.json", lambda c: c.update(random_heads=["text_adapter"])),
    ),
    "a tower": (
        "config.json",
        edit_json("config.json", lambda c: c["text_config"].update(rms_norm_eps=1e-7)),
    ),
    "processor": (
        "processor_config.json",
        edit_json("processor_config.json", lambda c: c["image_processor"].update(resample=2)),
    ),
    # No golden text shows these: each gets the same ids.
    "a token": ("tokenizer.json", edit_json("tokenizer.json", move_a_token)),
    "another token": ("tokenizer.json", edit_json("tokenizer.json", add_a_token)),
    "merges": ("tokenizer.json", edit_json("tokenizer.json", swap_merges)),
    "NFKC": ("tokenizer.json", edit_json("tokenizer.json", normalize("NFKC"))),
    "accents": ("tokenizer.json", edit_json("tokenizer.json", normalize("StripAccents"))),
    "truncated side": (
        "tokenizer_config.json",
        edit_json("tokenizer_config.json", lambda c: c.update(truncation_side="left")),
    ),
    "length in sentence-transformers": (
        "sentence_bert_config.json",
        edit_json("sentence_bert_config.json", lambda c: c.update(max_seq_length=16)),
    ),
    "added": (
        "added_tokens.json",
        lambda folder: (folder / "added_tokens.json").write_text('{"photo": 319}'),
    ),
    "removed": ("modules.json", lambda folder: (folder / "modules.json").unlink()),
}


def find_changed_files(folder: Path) -> list[str] | None:
    """Return the files that a refusal names; None where none are recorded."""
    try:
        return [] if require_recorded_files(folder) else None
    except ValueError as error:
        return str(error).split(": changed since")[0].split(", ")


@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_every_changed_file_is_named(
    name: str, change: Callable[[Path], object], copy: Path
) -> None:
    with safe_open(copy / GOLDEN_FILE, framework="pt") as file:
        assert {"texts", "dtype", "files"} == set(file.metadata())
    assert find_changed_files(copy) == []
    change(copy)
    assert find_changed_files(copy) == [name]
    with pytest.raises(ValueError, match=f"^{name}: changed since"):
        check_recorded_files(ModelUnderTest(copy, "cpu"))  # of the doctor


def save_in_place(folder: Path) -> None:
    LLM2CLIPModel.from_pretrained(folder).save_pretrained(folder)
    LLM2CLIPProcessor.from_pretrained(folder).save_pretrained(folder)


def save_in_shards(folder: Path) -> None:
    LLM2CLIPModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="50KB")


def save_by_sentence_transformers(folder: Path) -> None:
    SentenceTransformer(str(folder), device="cpu").save_pretrained(str(folder))


change_instructions = edit_json("config.json", lambda c: c.update(instructions={"a": "b: "}))


@pytest.mark.parametrize(
    "change", [save_in_place, save_in_shards, save_by_sentence_transformers, change_instructions]
)
def test_an_edit_that_affects_no_embedding_is_ignored(
    change: Callable[[Path], None], copy: Path
) -> None:
    change(copy)
    assert find_changed_files(copy) == []


def test_the_state_of_a_tokenizers_last_call_is_ignored(tmp_path: Path) -> None:
    model, processor = shared_model()
    processor(text=["a dog"])  # a tokenizer keeps its truncation and padding, and saves them
    folder = save_model(model, processor, tmp_path / "model")
    again = LLM2CLIPProcessor.from_pretrained(folder)
    for padding in (None, True, False, "max_length"):
        if padding is not None:
            again(text=["a dog"], padding=padding, max_length=20)
        again.save_pretrained(folder)
        assert find_changed_files(folder) == []


def test_a_folder_without_recorded_files_is_not_checked(copy: Path) -> None:
    forget_files(copy)
    assert find_changed_files(copy) is None
    with pytest.raises(NotApplicableError, match="records no files"):
        check_recorded_files(ModelUnderTest(copy, "cpu"))
    (copy / GOLDEN_FILE).unlink()
    assert find_changed_files(copy) is None


# What is written from a folder

WEIGHTS = {
    "llm": "text_model.layers.0.self_attn.v_proj.weight",
    "vision tower": "vision_model.encoder.layers.0.mlp.fc1.weight",
    "projection": "visual_projection.weight",
    "temperature": "logit_scale.log_scale",
}


def flip_bit(name: str) -> Break:
    """Flip the sign of the largest weight: one bit of the file."""

    def change(weight: Tensor) -> Tensor:
        weight.view(-1)[weight.abs().argmax()] *= -1
        return weight

    return set_weight(name, change)


def export(**settings: Any) -> Callable[[Path, Path], object]:
    return lambda source, output: export_model(source, output, ExportConfig(**settings))


def train(weight: str) -> Callable[[Path, Path], object]:
    def write(source: Path, output: Path) -> object:
        trained = {weight: load_file(source / "model.safetensors")[weight]}
        return save_trained_model(source, trained, output)

    return write


TRAINED = "text_projection.weight"
TRAINED_LLM = "text_model.norm.weight"
WAYS: dict[str, tuple[Callable[[Path, Path], object], tuple[str, ...]]] = {
    "whole": (export(), tuple(WEIGHTS)),
    "other dtype": (export(dtype="bfloat16"), ("llm", "temperature")),
    "smaller files": (export(max_shard_size="50KB"), ("llm",)),
    "text": (export(components="text"), ("llm",)),
    "vision": (export(components="vision"), ("projection",)),
    "vision tower": (export(components="vision-tower"), ("vision tower",)),
    "ONNX": (export(onnx=True), ("temperature",)),
    "trained": (train(TRAINED), ("llm", "vision tower", "temperature")),
    "trained LLM": (train(TRAINED_LLM), ("llm",)),
}


def write_by(way: str, source: Path, output: Path) -> object:
    """Write a folder from a folder; skips where the packages of a way are not installed."""
    for package in ("onnx", "onnxscript", "onnxruntime") if way == "ONNX" else ():
        pytest.importorskip(package)
    return WAYS[way][0](source, output)


@pytest.mark.parametrize(
    ("way", "damaged"),
    [
        *((way, damaged) for way, (_, parts) in WAYS.items() for damaged in parts),
        *((way, change) for way in ("whole", "trained") for change in ("weights", "processor")),
        *((way, "processor") for way in ("text", "vision tower", "ONNX")),
    ],
)
def test_nothing_is_written_from_a_damaged_folder(
    way: str, damaged: str, good: Path, tmp_path: Path
) -> None:
    """Of a flipped bit, or of a change that no golden input shows."""
    folder = Path(shutil.copytree(good, tmp_path / "damaged"))
    (flip_bit(WEIGHTS[damaged]) if damaged in WEIGHTS else CHANGES[damaged][1])(folder)
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match="recorded files"):
        write_by(way, folder, tmp_path / "new" / "model")
    assert list((tmp_path / "new").iterdir()) == []


def round_a_weight(weights: dict[str, Any]) -> None:
    weights[TRAINED_LLM] = weights[TRAINED_LLM].bfloat16()  # which moves no embedding far


@pytest.mark.parametrize("way", ["whole", "text", "vision tower", "ONNX", "trained"])
def test_a_folder_with_a_wrong_dtype_in_its_config_is_refused(
    way: str, good: Path, tmp_path: Path
) -> None:
    """It loads in the stated dtype, so a copy would lose precision."""
    folder = Path(shutil.copytree(good, tmp_path / "edited"))
    if way in ("text", "trained"):  # one weight of the LLM has another dtype
        edit_weights(round_a_weight)(folder)
        forget_files(folder)
        error = r"states float32, but 1 of \d+ weights are bfloat16"
    else:
        edit_json("config.json", lambda c: c.update(dtype="bfloat16"))(folder)
        error = r"config\.json states bfloat16.*weights are float32"
    with pytest.raises(ValueError, match=error):
        write_by(way, folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda golden: golden.pop("logit_scale"), "logit_scale was not recorded"),
        (lambda golden: golden.pop("text_embeds"), "text_embeds was not recorded"),
        # A later training takes these over, without running the LLM.
        (lambda golden: golden.pop("caption_embeds"), "caption_embeds was not recorded"),
        (lambda golden: golden["caption_embeds"][1].fill_(torch.nan), r"caption_embeds .* has NaN"),
        (
            lambda golden: golden.update(caption_embeds=golden["caption_embeds"][:3].clone()),
            "or not one row per text",
        ),
    ],
)
def test_incomplete_golden_embeddings_are_named(
    change: Callable[[dict[str, Tensor]], object], error: str, copy: Path
) -> None:
    edit_golden(copy, change)
    with pytest.raises(ValueError, match=error):
        compare_golden(copy, *load_model(copy, device="cpu"))


def edit_golden(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    with safe_open(folder / GOLDEN_FILE, framework="pt") as file:
        metadata = file.metadata()
    _, embeddings = read_golden(folder)  # type: ignore[misc]
    change(embeddings)
    save_file(embeddings, folder / GOLDEN_FILE, metadata)


def forget_files(folder: Path) -> None:
    """Keep only the embeddings, like older versions."""
    texts, embeddings = read_golden(folder)  # type: ignore[misc]
    save_file(embeddings, folder / GOLDEN_FILE, {"texts": json.dumps(texts)})


def test_an_intended_change_is_exported_after_its_records_are_deleted(
    good: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "edited"))
    edit_json("tokenizer.json", add_a_token)(folder)
    with pytest.raises(ValueError, match=r"tokenizer\.json: changed since.*delete golden_embed"):
        export_model(folder, tmp_path / "new")
    remove(GOLDEN_FILE)(folder)
    with pytest.warns(UserWarning, match="has no golden embeddings"):
        export_model(folder, tmp_path / "new")
    assert find_changed_files(tmp_path / "new") == []


def test_a_damaged_llm_that_is_not_run_still_shows_in_the_trained_model(
    good: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "damaged"))
    forget_files(folder)
    flip_bit(WEIGHTS["llm"])(folder)
    train(TRAINED)(folder, tmp_path / "new")
    with pytest.raises(ValueError, match="text_embeds moved by"):
        compare_golden(tmp_path / "new", *load_model(tmp_path / "new", device="cpu"))


@pytest.mark.parametrize(
    "break_file",
    [
        lambda file: file.write_bytes(file.read_bytes()[:200]),
        pytest.param(lambda file: file.write_bytes(b""), marks=pytest.mark.slow),
        pytest.param(lambda file: save_file(load_file(file), file), marks=pytest.mark.slow),
        lambda file: save_file(load_file(file), file, {"texts": "[", "files": "{}"}),
    ],
    ids=["truncated", "empty", "without metadata", "with other metadata"],
)
def test_damaged_golden_embeddings_are_named(
    break_file: Callable[[Path], object], copy: Path, tmp_path: Path
) -> None:
    break_file(copy / GOLDEN_FILE)
    with pytest.raises(ValueError, match=r"golden_embeddings\.safetensors is damaged \(.*Restore"):
        export_model(copy, tmp_path / "exported")


@pytest.mark.parametrize("way", ["whole", "vision tower", "trained"])
def test_a_folder_without_golden_embeddings_causes_a_warning(
    way: str, good: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "bare"))
    remove(GOLDEN_FILE)(folder)
    with pytest.warns(UserWarning, match="has no golden embeddings.*damage would not"):
        write_by(way, folder, tmp_path / "new")
    assert (tmp_path / "new").is_dir()


def test_without_the_llm_the_recorded_caption_embeddings_are_compared(good: Path) -> None:
    golden = read_golden(good)
    assert golden is not None and {"caption_embeds", "text_embeds"} <= set(golden[1])
    _, processor = load_model(good, device="cpu")
    partial = load_partial_model(good, with_vision_tower=True)
    found = compare_golden(good, partial, processor, runs_llm=False)
    assert found is not None and found.startswith("6 embeddings")  # four texts and two images
    with torch.no_grad():
        partial.text_projection.weight.mul_(-1)
    with pytest.raises(ValueError, match=r"text_embeds moved by .* in row"):
        compare_golden(good, partial, processor, runs_llm=False)
