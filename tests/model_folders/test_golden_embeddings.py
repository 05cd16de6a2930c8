"""The files that recorded embeddings were computed with: every change is named, no save counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import edit_json, edit_weights, find
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.model_folders.golden_embeddings import (
    GOLDEN_FILE,
    compute_golden,
    find_changed_files,
    read_golden,
)


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


@pytest.mark.parametrize(
    "change", [add_a_token, normalize("NFKC"), normalize("StripAccents"), swap_merges]
)
def test_doctor_names_an_edited_tokenizer_that_the_golden_texts_do_not_show(
    change: Callable[[dict[str, Any]], None], copy: Path
) -> None:
    edit_json("tokenizer.json", change)(copy)
    report = check_model(copy, device="cpu")
    check = find(report, "recorded files")
    assert not check.passed and check.message.startswith("tokenizer.json: not as when"), report


def halve_a_weight(weights: dict[str, Any]) -> None:
    weights["text_model.embed_tokens.weight"][-1] /= 2  # of a token that no golden text has


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights": ("weights", edit_weights(halve_a_weight)),
    "config": ("config.json", edit_json("config.json", lambda c: c.update(max_text_length=31))),
    "a tower": (
        "config.json",
        edit_json("config.json", lambda c: c["text_config"].update(rms_norm_eps=1e-7)),
    ),
    "processor": (
        "processor_config.json",
        edit_json("processor_config.json", lambda c: c["image_processor"].update(resample=2)),
    ),
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


@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_every_changed_file_is_named(
    name: str, change: Callable[[Path], object], copy: Path
) -> None:
    assert find_changed_files(copy) == []
    change(copy)
    assert find_changed_files(copy) == [name]


def save_in_place(folder: Path) -> None:
    LLM2CLIPModel.from_pretrained(folder).save_pretrained(folder)
    LLM2CLIPProcessor.from_pretrained(folder).save_pretrained(folder)


def save_in_shards(folder: Path) -> None:
    LLM2CLIPModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="50KB")


def save_by_sentence_transformers(folder: Path) -> None:
    SentenceTransformer(str(folder), device="cpu").save_pretrained(str(folder))


@pytest.mark.parametrize("save", [save_in_place, save_in_shards, save_by_sentence_transformers])
def test_saving_an_unchanged_model_again_changes_no_recorded_file(
    save: Callable[[Path], None], copy: Path
) -> None:
    save(copy)
    assert find_changed_files(copy) == []


def test_instructions_and_the_state_of_training_are_no_change(copy: Path) -> None:
    edit_json(
        "config.json", lambda c: c.update(instructions={"a": "b: "}, projections_trained=True)
    )(copy)
    assert find_changed_files(copy) == []


def test_a_folder_without_records_is_not_judged(copy: Path) -> None:
    texts, _ = read_golden(copy)  # type: ignore[misc]
    save_file(load_file(copy / GOLDEN_FILE), copy / GOLDEN_FILE, {"texts": json.dumps(texts)})
    assert find_changed_files(copy) is None
    check = find(check_model(copy, device="cpu"), "recorded files")
    assert check.skipped and "records no files" in check.message
    (copy / GOLDEN_FILE).unlink()
    assert find_changed_files(copy) is None


def test_the_record_is_beside_the_embeddings_of_the_folder(good: Path) -> None:
    with safe_open(good / GOLDEN_FILE, framework="pt") as file:
        assert {"texts", "dtype", "files"} == set(file.metadata())
    model = LLM2CLIPModel.from_pretrained(good)
    found = compute_golden(model, LLM2CLIPProcessor.from_pretrained(good))
    _, recorded = read_golden(good)  # type: ignore[misc]
    for name, embeddings in found.items():
        # The same weights at other addresses, whose alignment selects other kernels.
        torch.testing.assert_close(embeddings, recorded[name], atol=1e-6, rtol=0)
