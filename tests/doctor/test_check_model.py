"""A healthy checkpoint passes every check, whatever its family, dtype, settings and files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import choose_checks, find
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer

from modeling_llm2clip.doctor import check_model as module
from modeling_llm2clip.doctor.check_model import _PLANNED_CHECKS, check_model
from modeling_llm2clip.model_folders.golden_embeddings import GOLDEN_FILE
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel


def test_a_healthy_checkpoint_passes_every_check_and_skips_none(good: Path) -> None:
    report = check_model(good)
    assert report.healthy, str(report)
    assert [check for check in report.checks if not check.passed] == []
    assert [c.name for c in report.checks] == ["folder", *(plan.name for plan in _PLANNED_CHECKS)]


def test_missing_golden_embeddings_are_reported(copy: Path) -> None:
    (copy / GOLDEN_FILE).unlink()
    report = check_model(copy)
    assert report.healthy
    check = find(report, "golden embeddings")
    assert check.concern and "`llm2clip export" in check.message
    assert "licenses, training data and summary of the training images" in str(report)


def test_texts_are_compared_with_a_model_of_this_kind_alone(good: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ValueError, match=r"sentence-transformers.* LLM2CLIP model is needed here"):
        check_model(good, text_like=tmp_path)


def test_without_sentence_transformers_its_check_is_skipped_with_a_note(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as if not installed
    report = check_model(good)
    check = find(report, "sentence-transformers")
    assert report.healthy
    assert check.skipped
    assert "not installed" in check.message


@pytest.mark.parametrize(
    ("vision", "llm", "arguments"),
    [
        ("siglip2", "gemma3_text", {"dtype": torch.bfloat16}),
        pytest.param("timm", "qwen3", {"dtype": torch.float16}, marks=pytest.mark.slow),
        ("dinov2", "phi", {"vision_pooling": "cls", "text_pooling": "last_token"}),
        pytest.param("vit", "llama", {"bidirectional": False}, marks=pytest.mark.slow),
        pytest.param("siglip", "gemma2", {"prompt": "none"}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_families_dtypes_and_settings_are_healthy_too(
    vision: str, llm: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    model, processor = tiny_model(vision, llm, **arguments)
    report = check_model(save_model(model, processor, tmp_path / "exported"))
    assert [check for check in report.checks if not check.passed] == [], str(report)


def test_a_text_only_checkpoint_is_healthy_and_says_what_is_absent(
    good: Path, tmp_path: Path
) -> None:
    LLM2CLIPTextModel.from_pretrained(good).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(good / name, tmp_path / name)
    report = check_model(tmp_path)
    assert report.healthy, str(report)
    assert find(report, "pooled span").passed
    assert find(report, "temperature").message == "the folder holds an LLM2CLIPTextModel"


@pytest.mark.parametrize("option", ["eos_token", "extra_special_tokens"])
def test_a_suffix_that_is_a_special_token_is_flagged_as_the_saved_tokenizer_has_it(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {option: "<|eot_id|>" if option == "eos_token" else ["<|eot_id|>"]}
    )
    model, processor = tiny_model(tokenizer=tokenizer)
    folder = save_model(
        model, processor, tmp_path / "exported", instructions={"query": "Find an image: "}
    )
    names = ("prompt", "tokenizer path", "sentence-transformers")
    monkeypatch.setattr(module, "_PLANNED_CHECKS", choose_checks(_PLANNED_CHECKS, *names))
    report = check_model(folder)
    assert report.healthy, str(report)


def test_weights_in_several_files_are_all_read(copy: Path) -> None:
    model = LLM2CLIPModel.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="100KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    assert check_model(copy).healthy
    shard = sorted(copy.glob("model-*.safetensors"))[-1]
    weights = load_file(shard)
    first = sorted(name for name in weights if name != "logit_scale.log_scale")[0]
    weights[first].view(-1)[0] = torch.inf
    save_file(weights, shard, metadata={"format": "pt"})
    assert find(check_model(copy), "finite weights").message.startswith(
        f"{first} has NaN or infinity"
    )


@pytest.mark.slow
def test_a_hub_id_is_downloaded_and_examined(good: Path, tmp_path: Path) -> None:
    code = """
import sys
sys.modules["sentence_transformers"] = None  # as if not installed: its import takes long
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.publishing.push_to_hub import push_to_hub
push_to_hub(sys.argv[1], "owner/model")
report = check_model("owner/model")
print(report)
assert report.healthy
assert "is not on the Hub" in check_model("owner/absent").checks[0].message
"""
    with HubServer() as hub:
        done = subprocess.run(
            [sys.executable, "-c", code, str(good)],
            env=hub.environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=120,
            cwd=Path(__file__).parents[2],
        )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
