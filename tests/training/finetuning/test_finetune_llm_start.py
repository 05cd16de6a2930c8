"""Stage 1, the LoRA that a run begins from: of the same shape, and of this very LLM."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tiny import tiny_model
from tuning import GROUPS, RECORDS, SHORT, tune

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.model_folders.fingerprint import fingerprint_text
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.training.finetuning.finetune_llm import finetune_llm

ONE_STEP = replace(SHORT, max_steps=1)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune(tmp_path_factory.mktemp("tuned") / "run", ONE_STEP).lora


def edit_config(lora: Path, copy: Path, **changed: Any) -> Path:
    shutil.copytree(lora, copy)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    return copy


def test_a_lora_of_another_scale_is_refused(lora: Path, tmp_path: Path) -> None:
    other = replace(ONE_STEP, lora_rank=8, lora_alpha=16, init_lora=lora)
    with pytest.raises(ValueError, match=r"r=16, in this run 8; lora_alpha=32, in this run 16"):
        tune(tmp_path / "run", other)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_rslora", True),
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 64}),
        ("bias", "all"),
        ("modules_to_save", ["norm"]),
        ("init_lora_weights", "pissa"),
    ],
)
def test_a_lora_whose_weights_mean_something_else_is_refused(
    lora: Path, tmp_path: Path, name: str, value: Any
) -> None:
    other = edit_config(lora, tmp_path / "lora", **{name: value})
    with pytest.raises(ValueError, match=rf"lora has {name}="):
        tune(tmp_path / "run", replace(ONE_STEP, init_lora=other))


def test_a_folder_without_a_lora_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing has no adapter_config\.json\. Give the folder"):
        tune(tmp_path / "run", replace(ONE_STEP, init_lora=tmp_path / "nothing"))


def test_a_lora_of_another_base_is_refused(lora: Path, tmp_path: Path) -> None:
    other = edit_config(lora, tmp_path / "lora", base_model_name_or_path="someone/Another-LLM")
    config = replace(ONE_STEP, init_lora=other)
    model, processor = tiny_model()
    model.text_model.config._name_or_path = "owner/tiny-llm"
    with pytest.raises(ValueError, match=r"base 'someone/Another-LLM', but the LLM is 'owner/tiny"):
        finetune_llm((model, processor), RECORDS, tmp_path / "run", config)
    model, processor = tiny_model()
    model.text_model.config._name_or_path = "a-mirror/another-llm"  # as for merging
    finetune_llm((model, processor), RECORDS, tmp_path / "other", config)


@pytest.mark.slow
def test_a_model_that_a_lora_is_merged_into_is_not_fine_tuned_from_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(*tiny_model(), tmp_path / "base")
    data = tmp_path / "captions.jsonl"
    data.write_text(
        "\n".join(json.dumps({"group_id": g.group_id, "captions": g.captions}) for g in GROUPS)
    )
    flags = [
        "--max-steps",
        "1",
        "--per-device-train-batch-size",
        "4",
        "--num-held-out",
        "4",
        "--device",
        "cpu",
    ]
    first = tmp_path / "first"
    assert main(["finetune-llm", str(folder), str(data), str(first), *flags]) == 0
    with safe_open(first / "lora" / "adapter_model.safetensors", framework="pt") as opened:
        assert opened.metadata()["base_weights"] == fingerprint_text(folder)["weights"]
    flags += ["--init-lora", str(first / "lora")]
    command = [
        "finetune-llm",
        str(first / "model"),
        str(data),
        str(tmp_path / "twice"),
        *flags,
        "--no-merge",
    ]
    assert main(command) == 2
    assert "trained on an LLM with other weights" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()
    second = ["finetune-llm", str(folder), str(data), str(tmp_path / "second"), "--no-merge"]
    assert main([*second, *flags]) == 0
