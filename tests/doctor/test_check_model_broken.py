"""Every way of breaking a checkpoint is found, named and reported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import (
    Break,
    append,
    choose_checks,
    edit_json,
    edit_weights,
    find,
    load_tested,
    remove,
    rename_adapter_key,
    set_causal,
    set_config,
    set_row,
    set_weight,
    take_other_tokenizer,
    truncate,
    update,
)
from shared_models import mostly_slow

from modeling_llm2clip.doctor import check_model as module
from modeling_llm2clip.doctor.check_model import _PLANNED_CHECKS, check_model
from modeling_llm2clip.doctor.file_checks import check_remote_code
from modeling_llm2clip.doctor.forward_checks import check_sentence_transformers
from modeling_llm2clip.doctor.model_report import NotApplicableError
from modeling_llm2clip.doctor.model_under_test import ModelUnderTest
from modeling_llm2clip.model_folders.model_loading import text_quantization_config

PROCESSOR, TOKENIZER = "processor_config.json", "tokenizer_config.json"
SETTINGS = "config_sentence_transformers.json"
EMBEDDINGS = "text_model.embed_tokens.weight"
HALF = "modeling_llm2clip.LLM2CLIPTextModel"
VISION_WEIGHT = "vision_model.encoder.layers.0.mlp.fc1.weight"
# A way to break a checkpoint, the check that must fail, and what it must say.
CASES: dict[str, tuple[Break, str, str]] = {
    "causal flag lost": (set_causal(None), "config", r"lacks \['text_config.is_causal'\]"),
    "causal flag flipped": (set_causal(True), "config", r"bidirectional=True contradicts"),
    "both causal flags flipped": (
        set_causal(True, bidirectional=False), "golden embeddings", r"text_embeds moved by .*LLM"
    ),
    "setting lost": (
        edit_json("config.json", lambda c: c.pop("text_pooling")), "config", r"text_pooling"
    ),
    "setting misspelt": (set_config(max_text_lenght=9), "config", r"max_text_lenght"),
    "other model type": (set_config(model_type="clip"), "config", r"model_type='clip'"),
    "config lost": (remove("config.json"), "config", r"has no config.json"),
    "prompt lost": (
        update("tokenizer.json", post_processor=None), "prompt", r"does not start with the prompt"
    ),
    "suffix truncated": (
        edit_json("tokenizer.json", lambda t: t["post_processor"]["single"].pop()),
        "prompt", r"does not end with the prompt suffix \[",
    ),
    "text not stripped": (update("tokenizer.json", normalizer=None), "prompt", r"not stripped"),
    "special flag flipped": (
        edit_json(
            "config.json",
            lambda c: c.update(prompt_suffix_ends_special=not c["prompt_suffix_ends_special"]),
        ),
        "prompt", r"prompt_suffix_ends_special is",
    ),
    "span off by one": (
        edit_json("config.json", lambda c: c["prompt_prefix_ids"].pop()),
        "pooled span", r"'x' has 1 tokens plus 1 in the suffix, but 3 are pooled",
    ),
    "adapter key renamed": (
        edit_weights(rename_adapter_key),
        "weights", r"Missing \(1\): \['text_adapter.blocks.0.up.weight'\]. Unexpected \(1\): "
        r"\['text_adapter.blocks.0.first.weight'\]",
    ),
    "weight of another shape": (
        set_weight("visual_projection.weight", lambda w: w[:-1]),
        "weights", r"shape \(1; saved, expected\).*visual_projection.weight",
    ),
    "weight file truncated": (
        truncate("model.safetensors"), "weights", r"model.safetensors: .* file is truncated"
    ),
    "weight file lost": (
        remove("model.safetensors"), "finite weights", r"has no weights"
    ),
    "weight value altered": (
        set_weight(VISION_WEIGHT, lambda w: w * 1.1),
        "golden embeddings", r"image_embeds moved by .*vision tower"
    ),
    "image mean altered": (
        edit_json(
            "processor_config.json",
            lambda p: p["image_processor"].update(image_mean=[0.3, 0.3, 0.3]),
        ),
        "golden embeddings", r"image_embeds moved by .*image processor",
    ),
    "dtype mixed": (
        set_weight("text_adapter.norm.weight", lambda w: w.bfloat16()),
        "weight dtype", r"1 of \d+ weights are not float32: \['text_adapter.norm.weight \(bf.*",
    ),
    "temperature in half precision": (
        set_weight("logit_scale.log_scale", lambda w: w.half()),
        "weight dtype", r"logit_scale.log_scale is float16, not float32",
    ),
    "dtype misstated": (
        set_config(dtype="bfloat16"), "weight dtype", r"has bfloat16, the weights are float32"
    ),
    "falsely marked as quantized": (
        set_config(quantization_config=text_quantization_config("4bit").to_dict()),
        "weight dtype", r"are quantized, but the files contain only \['float32'\]",
    ),
    "temperature altered": (
        set_weight("logit_scale.log_scale", lambda w: w + 1),
        "golden embeddings", r"logit_scale is 3\.65\d\d, but 2\.65\d\d"
    ),
    "temperature too high": (
        set_row("logit_scale.log_scale", 0, 10.0), "temperature", r"a value within \[1, 100\]"
    ),
    "NaN in one row": (
        set_row(EMBEDDINGS, 17, torch.nan),
        "finite weights", rf"{EMBEDDINGS} has NaN or infinity",
    ),
    "NaN in one row of the projection": (
        set_row("text_projection.weight", 3, torch.nan),
        "finite outputs", r"text_embeds row 0 \('a dog'\)",
    ),
    "overflow with finite weights": (
        set_row("visual_projection.weight", 0, 3e38), "finite outputs", r"image_embeds row"
    ),
    "tokenizer of a larger vocabulary": (
        take_other_tokenizer(vocabulary_size=330),
        "tokenizer", r"ids up to 329, but the LLM's embedding table has only 320 rows",
    ),
    "other tokenizer of the same size": (
        take_other_tokenizer(vocabulary_size=320),
        "golden embeddings", r"text_embeds moved by .*tokenizer"
    ),
    "padding side": (update(TOKENIZER, padding_side="left"), "tokenizer", r"pads on the left"),
    "tokenizer length": (
        update(TOKENIZER, model_max_length=64), "text length",
        r"config.max_text_length=32, tokenizer.model_max_length=64",
    ),
    "processor length": (
        update(PROCESSOR, max_text_length=16), "text length", r"processor.max_text_length=16"
    ),
    "processor truncates earlier": (
        update(PROCESSOR, max_text_length=16), "tokenizer path", r"different input_ids \(shapes",
    ),
    "processor lost": (remove(PROCESSOR), "processor", r"\w"),
    "remote code altered": (
        append("heads_llm2clip.py", "# another line\n"),
        "remote code", r"altered: \['heads_llm2clip.py'\]"
    ),
    "remote code lost": (
        remove("packing_llm2clip.py"), "remote code", r"missing: \['packing_llm2clip.py'\]"
    ),
    "sentence-transformers truncates earlier": (
        edit_json(
            "sentence_bert_config.json",
            lambda s: s["processing_kwargs"]["text"].update(max_length=12),
        ),
        "sentence-transformers", r"nothing after their instruction.*max_seq_length",
    ),
    "instruction that is measured wrongly": (
        edit_json(SETTINGS, lambda s: s["prompts"].update(query="Search:\n")),
        "sentence-transformers", r"'query': 'Search:\\n' before"
    ),
    "instruction by default": (
        update(SETTINGS, default_prompt_name="query"), "sentence-transformers",
        r"default_prompt_name='query' prepends an instruction"
    ),
    "another similarity": (
        update(SETTINGS, similarity_fn_name="euclidean"), "sentence-transformers",
        r"similarity_fn_name='euclidean' is not the cosine"
    ),
    "sentence-transformers does not normalize": (
        lambda folder: (folder / "modules.json").write_text(
            json.dumps(json.loads((folder / "modules.json").read_text(encoding="utf-8"))[:1])
        ),
        "sentence-transformers", r"texts by .*images by",
    ),
}  # fmt: skip
# Of these, no other check may fail.
ALONE = {
    "weight value altered", "temperature altered",
    "other tokenizer of the same size", "remote code altered",
    "instruction that is measured wrongly", "instruction by default", "another similarity",
}  # fmt: skip
# Found by the same comparison as others.
SIMILAR = {
    "causal flag flipped", "both causal flags flipped", "setting misspelt", "temperature altered",
    "temperature in half precision", "processor length", "remote code lost",
    "another similarity",
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(CASES, CASES.keys() - SIMILAR))
def test_a_broken_checkpoint_fails_the_check_that_names_the_error(
    name: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it, failing, says = CASES[name]
    break_it(copy)
    if name not in ALONE:
        monkeypatch.setattr(
            module, "_PLANNED_CHECKS", choose_checks(_PLANNED_CHECKS, failing, "processor")
        )
    report = check_model(copy)
    check = find(report, failing)
    assert not report.healthy
    assert (check.passed, check.skipped) == (False, False), str(report)
    assert re.search(says, check.message), check.message
    # A check of its own names every edited file, whatever the edit does.
    others = [check for check in report.failed if check.name != "recorded files"]
    assert len(others) == 1 or name not in ALONE, str(report)
    assert len(report.checks) == len(module._PLANNED_CHECKS) + 1


MAP_ERRORS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "half a model": (
        "config.json", lambda c: c["auto_map"].update(AutoModel=HALF),
        rf"config.json refers to other code: \['AutoModel: {HALF}'\]",
    ),
    "no model": (
        "config.json", lambda c: c["auto_map"].pop("AutoModel"),
        r"config.json lacks \['AutoModel'\]",
    ),
    "no config": (
        "config.json", lambda c: c["auto_map"].pop("AutoConfig"),
        r"config.json lacks \['AutoConfig'\]",
    ),
    "nothing": (
        "config.json", lambda c: c.pop("auto_map"), r"config.json lacks \['AutoConfig', 'AutoModel'"
    ),
    "the processor of another repository": (
        PROCESSOR, lambda p: p["auto_map"].update(AutoProcessor="o/n--p.P"),
        r"processor_config.json refers to other code: \['AutoProcessor: o/n--p.P'\]",
    ),
    "no processor": (
        PROCESSOR, lambda p: p.pop("auto_map"),
        r"processor_config.json lacks \['AutoProcessor'\]",
    ),
    "a tokenizer of another repository": (
        TOKENIZER, lambda t: t.update(auto_map={"AutoTokenizer": ["o/n--t.T", None]}),
        r"tokenizer_config.json refers to other code: \[\"AutoTokenizer: \['o/n--t.T', None\]",
    ),
    "no object": (
        TOKENIZER, lambda t: t.update(auto_map="o/n"), r"tokenizer_config.json is 'o/n', expected"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MAP_ERRORS)
def test_every_file_that_sends_a_loader_to_other_code_is_named(name: str, copy: Path) -> None:
    file, change, message = MAP_ERRORS[name]
    check_remote_code(ModelUnderTest(copy, "cpu"))
    edit_json(file, change)(copy)
    with pytest.raises(ValueError, match=message):
        check_remote_code(ModelUnderTest(copy, "cpu"))


def test_what_cannot_run_is_skipped_with_the_check_it_needs(copy: Path) -> None:
    CASES["adapter key renamed"][0](copy)
    report = check_model(copy)
    skipped = {check.name: check.message for check in report.checks if check.skipped}
    assert skipped["temperature"] == "needs 'weights', which failed"
    assert skipped["golden embeddings"] == "needs 'finite outputs', which did not run"
    assert [check.name for check in report.failed] == ["recorded files", "weights"]
    assert find(report, "prompt").passed  # what does not need the weights runs


@pytest.mark.parametrize("source", ["no such folder", "missing", Path("owner/name")], ids=str)
def test_a_source_that_is_nowhere_fails_and_skips_the_rest(source: str | Path) -> None:
    report = check_model(source)
    assert [check.name for check in report.failed] == ["folder"]
    assert "no such folder" in report.checks[0].message
    assert all(check.skipped for check in report.checks[1:])
    assert len(report.checks) == len(_PLANNED_CHECKS) + 1


def test_a_folder_that_was_saved_and_not_exported_is_healthy(good: Path, tmp_path: Path) -> None:
    tested = load_tested(good)
    tested.model.save_pretrained(tmp_path)
    tested.processor.save_pretrained(tmp_path)
    report = check_model(tmp_path)
    assert report.healthy, str(report)
    skipped = [check.name for check in report.checks if check.skipped]
    assert skipped == ["recorded files"]


@pytest.mark.parametrize(
    ("lost", "remedy"),
    [
        (
            "modules.json",
            r"modules.json, .* normalizing its embeddings; the model's save_pretrained",
        ),
        ("processor", r"without its processor; the processor's save_pretrained"),
    ],
)
def test_a_folder_that_sentence_transformers_cannot_load_is_reported_with_the_remedy(
    lost: str, remedy: str, copy: Path
) -> None:
    tested = load_tested(copy)
    if lost == "processor":
        tested.processor = None
    else:
        (copy / lost).unlink()
    with pytest.raises(NotApplicableError, match=remedy):
        check_sentence_transformers(tested)


def test_instructions_that_saving_would_lose_are_reported(copy: Path) -> None:
    edit_json(SETTINGS, lambda s: s["prompts"].update(a="A dog: "))(copy)
    check = find(check_model(copy), "sentence-transformers")
    assert not check.passed
    assert "which would be lost if the model is loaded and saved elsewhere" in check.message


@pytest.mark.slow
def test_the_report_has_a_line_for_every_check_and_a_verdict(good: Path, copy: Path) -> None:
    CASES["remote code altered"][0](copy)
    lines = str(check_model(copy)).splitlines()
    assert len(lines) == len(_PLANNED_CHECKS) + 2
    assert sum(line.startswith("FAILED") for line in lines) == 1
    assert lines[-1] == f"{copy}: 1 of {len(_PLANNED_CHECKS) + 1} FAILED"
    assert str(check_model(good)).endswith(f"{good}: healthy")
