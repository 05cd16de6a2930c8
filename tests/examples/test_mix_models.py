"""The script that mixes two models."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from aligning import prepare
from safetensors.torch import load_file

from modeling_llm2clip.doctor.check_model import check_model

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "scripts" / "mix_models.py"


@pytest.mark.slow
def test_the_weights_between_two_models_are_a_healthy_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(tmp_path / "prepared", num_colored=30)
    options = {"vision_training": "full", "layer_decay": 1.0, "learning_rate": 1e-2}
    run = prepared.align(tmp_path / "run", held_out_ratio=0, **options)
    mixed = tmp_path / "mixed"

    def mix(before: Path) -> None:
        arguments = [SCRIPT, before, run.model, mixed, "--share", "0.25"]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        runpy.run_path(str(SCRIPT), run_name="__main__")

    mix(prepared.model)
    first, last, between = (
        load_file(f / "model.safetensors") for f in (prepared.model, run.model, mixed)
    )
    changed = [name for name in last if not torch.equal(first[name], last[name])]
    assert any(name.startswith("vision_model.") for name in changed)
    for name, value in between.items():
        wanted = torch.lerp(first[name], last[name], 0.25) if name in changed else last[name]
        assert torch.equal(value, wanted)
    assert check_model(mixed, device="cpu").healthy
    other = prepare(tmp_path / "other", num_colored=2, has_stores=False, projection_dim=16)
    with pytest.raises(SystemExit, match="cannot be mixed"):
        mix(other.model)
