"""Every way of breaking a checkpoint is found, named and reported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from breaking import (
    Break,
    append,
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
)

from modeling_llm2clip.doctor.check_model import _PLANNED_CHECKS, check_model
from modeling_llm2clip.doctor.file_checks import check_remote_code
from modeling_llm2clip.doctor.forward_checks import check_sentence_transformers
from modeling_llm2clip.doctor.model_report import NotApplicableError
from modeling_llm2clip.doctor.model_under_test import ModelUnderTest
from modeling_llm2clip.model_folders.model_loading import text_quantization_config


class Case(NamedTuple):
    """A way to break a checkpoint, the check that must fail, and what it must say.

    Attributes:
        alone: whether no other check may see it.
    """

    break_it: Break
    check: str
    says: str
    alone: bool = False


EMBEDDINGS = "text_model.embed_tokens.weight"
HALF = "modeling_llm2clip.LLM2CLIPTextModel"
VISION_WEIGHT = "vision_model.encoder.layers.0.mlp.fc1.weight"
CASES = {
    "causal flag lost": Case(set_causal(None), "config", r"lacks \['text_config.is_causal'\]"),
    "causal flag flipped": Case(set_causal(True), "config", r"bidirectional=True contradicts"),
    "both causal flags flipped": Case(
        set_causal(True, bidirectional=False), "golden embeddings", r"text_embeds moved by .*LLM"
    ),
    "setting lost": Case(
        edit_json("config.json", lambda c: c.pop("text_pooling")), "config", r"text_pooling"
    ),
    "setting misspelt": Case(set_config(max_text_lenght=9), "config", r"max_text_lenght"),
    "other model type": Case(set_config(model_type="clip"), "config", r"model_type='clip'"),
    "config lost": Case(remove("config.json"), "config", r"has no config.json"),
    "older format": Case(set_config(format_version=0), "config", r"format 0.*convert"),
    "newer format": Case(set_config(format_version=99), "config", r"format 99.*Upgrade"),
    "prompt lost": Case(
        edit_json("tokenizer.json", lambda t: t.update(post_processor=None)),
        "prompt", r"does not begin with the prompt \[",
    ),
    "suffix truncated": Case(
        edit_json("tokenizer.json", lambda t: t["post_processor"]["single"].pop()),
        "prompt", r"does not end with the prompt's suffix \[",
    ),
    "text not stripped": Case(
        edit_json("tokenizer.json", lambda t: t.update(normalizer=None)),
        "prompt", r"not stripped",
    ),
    "special flag flipped": Case(
        edit_json(
            "config.json",
            lambda c: c.update(prompt_suffix_ends_special=not c["prompt_suffix_ends_special"]),
        ),
        "prompt", r"prompt_suffix_ends_special is",
    ),
    "span off by one": Case(
        edit_json("config.json", lambda c: c["prompt_prefix_ids"].pop()),
        "pooled span", r"'x' has 1 tokens and the suffix 1, but 3 are pooled",
    ),
    "adapter key renamed": Case(
        edit_weights(rename_adapter_key),
        "weights", r"Missing \(1\): \['text_adapter.blocks.0.up.weight'\]. Unexpected \(1\): "
        r"\['text_adapter.blocks.0.first.weight'\]",
    ),
    "weight of another shape": Case(
        set_weight("visual_projection.weight", lambda w: w[:-1]),
        "weights", r"shape \(1; saved, expected\).*visual_projection.weight",
    ),
    "weight file truncated": Case(
        truncate("model.safetensors"), "weights", r"model.safetensors: .* file is truncated"
    ),
    "weight file lost": Case(
        remove("model.safetensors"), "finite weights", r"has no weights"
    ),
    "projection transposed": Case(
        set_weight("text_projection.weight", lambda w: w.T),
        "golden embeddings", r"text_embeds moved by .*text projection", alone=True,
    ),
    "weight value altered": Case(
        set_weight(VISION_WEIGHT, lambda w: w * 1.1),
        "golden embeddings", r"image_embeds moved by .*vision tower", alone=True,
    ),
    "adapter normalization flipped": Case(
        set_config(normalize_text_before_adapter=False), "golden embeddings", r"text_embeds moved"
    ),
    "image mean altered": Case(
        edit_json(
            "processor_config.json",
            lambda p: p["image_processor"].update(image_mean=[0.3, 0.3, 0.3]),
        ),
        "golden embeddings", r"image_embeds moved by .*image processor",
    ),
    "dtype mixed": Case(
        set_weight("text_adapter.norm.weight", lambda w: w.bfloat16()),
        "weight dtype", r"1 of \d+ weights are not float32: \['text_adapter.norm.weight \(bf.*",
    ),
    "temperature in half precision": Case(
        set_weight("logit_scale.log_scale", lambda w: w.half()),
        "weight dtype", r"logit_scale.log_scale is float16, not float32",
    ),
    "dtype misstated": Case(
        set_config(dtype="bfloat16"), "weight dtype", r"has bfloat16, the weights are float32"
    ),
    "falsely marked as quantized": Case(
        set_config(quantization_config=text_quantization_config("4bit").to_dict()),
        "weight dtype", r"says that weights are quantized, but the files hold \['float32'\]",
    ),
    "temperature altered": Case(
        set_weight("logit_scale.log_scale", lambda w: w + 1),
        "golden embeddings", r"logit_scale is 3\.65\d\d, recorded was 2\.65\d\d", alone=True,
    ),
    "temperature too high": Case(
        set_row("logit_scale.log_scale", 0, 10.0), "temperature", r"wanted one within \[1, 100\]"
    ),
    "NaN in one row": Case(
        set_row(EMBEDDINGS, 17, torch.nan),
        "finite weights", rf"{EMBEDDINGS} has NaN or infinity",
    ),
    "NaN in one row of the projection": Case(
        set_row("text_projection.weight", 3, torch.nan),
        "finite outputs", r"text_embeds row 0 \('a dog'\)",
    ),
    "overflow with finite weights": Case(
        set_row("visual_projection.weight", 0, 3e38), "finite outputs", r"image_embeds row"
    ),
    "tokenizer of a larger vocabulary": Case(
        take_other_tokenizer(vocabulary_size=330),
        "tokenizer", r"ids up to 329, the LLM's embedding table only 320 rows",
    ),
    "other tokenizer of the same size": Case(
        take_other_tokenizer(vocabulary_size=320),
        "golden embeddings", r"text_embeds moved by .*tokenizer", alone=True,
    ),
    "padding side": Case(
        edit_json("tokenizer_config.json", lambda t: t.update(padding_side="left")),
        "tokenizer", r"pads on the left",
    ),
    "tokenizer length": Case(
        edit_json("tokenizer_config.json", lambda t: t.update(model_max_length=64)),
        "text length", r"config.max_text_length=32, tokenizer.model_max_length=64",
    ),
    "processor length": Case(
        edit_json("processor_config.json", lambda p: p.update(max_text_length=16)),
        "text length", r"processor.max_text_length=16",
    ),
    "processor truncates earlier": Case(
        edit_json("processor_config.json", lambda p: p.update(max_text_length=16)),
        "tokenizer path", r"different input_ids \(shapes",
    ),
    "processor lost": Case(remove("processor_config.json"), "processor", r"\w"),
    "remote code altered": Case(
        append("heads_llm2clip.py", "# another line\n"),
        "remote code", r"altered: \['heads_llm2clip.py'\]", alone=True,
    ),
    "remote code lost": Case(
        remove("packing_llm2clip.py"), "remote code", r"missing: \['packing_llm2clip.py'\]"
    ),
    "remote code elsewhere": Case(
        edit_json("config.json", lambda c: c["auto_map"].update(AutoModel="o/n--m.LLM2CLIPModel")),
        "remote code", r"config.json names other code: \['AutoModel: o/n--m.LLM2CLIPModel'\]",
        alone=True,
    ),
    "sentence-transformers truncates earlier": Case(
        edit_json(
            "sentence_bert_config.json",
            lambda s: s["processing_kwargs"]["text"].update(max_length=12),
        ),
        "sentence-transformers", r"nothing after their instruction.*max_seq_length",
    ),
    "instruction that is measured wrongly": Case(
        edit_json(
            "config_sentence_transformers.json", lambda s: s["prompts"].update(query="Search:\n")
        ),
        "sentence-transformers", r"'query': 'Search:\\n' before", alone=True,
    ),
    "instruction by default": Case(
        edit_json(
            "config_sentence_transformers.json", lambda s: s.update(default_prompt_name="query")
        ),
        "sentence-transformers", r"default_prompt_name='query' puts an instruction", alone=True,
    ),
    "another similarity": Case(
        edit_json(
            "config_sentence_transformers.json", lambda s: s.update(similarity_fn_name="euclidean")
        ),
        "sentence-transformers", r"similarity_fn_name='euclidean' is not the cosine", alone=True,
    ),
    "sentence-transformers does not normalize": Case(
        lambda folder: (folder / "modules.json").write_text(
            json.dumps(json.loads((folder / "modules.json").read_text(encoding="utf-8"))[:1])
        ),
        "sentence-transformers", r"texts by .*images by",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_broken_checkpoint_fails_the_check_that_names_the_error(name: str, copy: Path) -> None:
    case = CASES[name]
    case.break_it(copy)
    report = check_model(copy)
    check = find(report, case.check)
    assert not report.healthy
    assert (check.passed, check.skipped) == (False, False), str(report)
    assert re.search(case.says, check.message), check.message
    # A check of its own names every edited file, whatever the edit does.
    others = [check for check in report.failed if check.name != "recorded files"]
    assert len(others) <= 1 or not case.alone, str(report)
    assert len(report.checks) == len(_PLANNED_CHECKS) + 1  # nothing is silently left out
    assert all(check.message for check in report.checks)


PROCESSOR, TOKENIZER = "processor_config.json", "tokenizer_config.json"
MAP_ERRORS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "half a model": (
        "config.json", lambda c: c["auto_map"].update(AutoModel=HALF),
        rf"config.json names other code: \['AutoModel: {HALF}'\]",
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
        r"processor_config.json names other code: \['AutoProcessor: o/n--p.P'\]",
    ),
    "no processor": (
        PROCESSOR, lambda p: p.pop("auto_map"),
        r"processor_config.json lacks \['AutoProcessor'\]",
    ),
    "a tokenizer of another repository": (
        TOKENIZER, lambda t: t.update(auto_map={"AutoTokenizer": ["o/n--t.T", None]}),
        r"tokenizer_config.json names other code: \[\"AutoTokenizer: \['o/n--t.T', None\]",
    ),
    "no object": (
        TOKENIZER, lambda t: t.update(auto_map="o/n"), r"of tokenizer_config.json is 'o/n', wanted"
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
    CASES["adapter key renamed"].break_it(copy)
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
        ("modules.json", r"modules.json: .* unit length; save_pretrained of the model writes"),
        ("processor", r"without its processor; save_pretrained of the processor"),
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
    edit_json("config_sentence_transformers.json", lambda s: s["prompts"].update(a="A dog: "))(copy)
    found = {check.name: check for check in check_model(copy).checks}["sentence-transformers"]
    assert not found.passed
    assert "a model that is loaded and saved elsewhere would lose these" in found.message


@pytest.mark.slow
def test_the_report_has_a_line_for_every_check_and_a_verdict(good: Path, copy: Path) -> None:
    CASES["remote code altered"].break_it(copy)
    lines = str(check_model(copy)).splitlines()
    assert len(lines) == len(_PLANNED_CHECKS) + 2
    assert sum(line.startswith("FAILED") for line in lines) == 1
    assert lines[-1] == f"{copy}: 1 of {len(_PLANNED_CHECKS) + 1} FAILED"
    assert str(check_model(good)).endswith(f"{good}: healthy")
