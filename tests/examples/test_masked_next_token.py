"""The script of stage 0 runs on a tiny LLM."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from launches import run_python
from safetensors.torch import load_file
from tiny_folders import save_tiny_llm
from transformers import AutoModel, AutoModelForCausalLM

from modeling_llm2clip.building.lora_merging import merge_lora

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "scripts" / "masked_next_token.py"


def list_arguments(folder: Path, llm: Path) -> list[str]:
    lines = [
        json.dumps({"image": f"{n}.jpg", "captions": [f"a dog sits on mat {n}"]}) + "\n"
        for n in range(8)
    ]
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    paths = (SCRIPT, llm, folder / "captions.jsonl", folder / "stage0")
    return [*map(str, paths), "--max-steps", "2", "--per-device-train-batch-size", "4"]


def test_masked_next_token_writes_a_lora_of_the_llm_without_its_head(tmp_path: Path) -> None:
    llm = save_tiny_llm(tmp_path / "llm")
    AutoModelForCausalLM.from_pretrained(llm).save_pretrained(llm)  # gives it a head
    run_python(*list_arguments(tmp_path, llm))
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


def test_masked_next_token_refuses_an_llm_without_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = list_arguments(tmp_path, save_tiny_llm(tmp_path / "llm"))
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=r"lm_head\.weight.*complete LLM"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not (tmp_path / "stage0").exists()
