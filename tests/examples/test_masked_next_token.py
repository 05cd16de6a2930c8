"""The script of stage 0 runs on a tiny LLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_folders import save_tiny_llm
from transformers import AutoModel, AutoModelForCausalLM

from modeling_llm2clip.building.lora_merging import merge_lora

pytestmark = pytest.mark.slow  # each is a process of its own
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "scripts" / "masked_next_token.py"


def run_script(folder: Path, llm: Path) -> subprocess.CompletedProcess[str]:
    lines = [
        json.dumps({"image": f"{n}.jpg", "captions": [f"a dog sits on mat {n}"]}) + "\n"
        for n in range(8)
    ]
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    return subprocess.run(
        [
            sys.executable, str(SCRIPT), str(llm), str(folder / "captions.jsonl"),
            str(folder / "stage0"), "--max-steps", "2", "--per-device-train-batch-size", "4",
        ],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_masked_next_token_writes_a_lora_of_the_llm_without_its_head(tmp_path: Path) -> None:
    llm = save_tiny_llm(tmp_path / "llm")
    AutoModelForCausalLM.from_pretrained(llm).save_pretrained(llm)  # gives it a head
    done = run_script(tmp_path, llm)
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "stage0" / "adapter_model.safetensors")
    # Two layers of seven linear ones, two matrices each.
    assert len(weights) == 28 and all(tensor.isfinite().all() for tensor in weights.values())
    headless = AutoModel.from_pretrained(llm)
    before = {name: tensor.clone() for name, tensor in headless.state_dict().items()}
    merge_lora(headless, tmp_path / "stage0")
    merged = headless.state_dict()
    assert before.keys() == merged.keys()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}


def test_masked_next_token_refuses_an_llm_without_its_head(tmp_path: Path) -> None:
    done = run_script(tmp_path, save_tiny_llm(tmp_path / "llm"))
    assert done.returncode == 1
    assert "lm_head.weight" in done.stderr and "whole LLM" in done.stderr
    assert not (tmp_path / "stage0").exists()
