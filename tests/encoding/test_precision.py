"""Weights go straight to a device, in the dtype that they run in, and every one has to fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import export_tiny_model

from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.encoding.precision import load_on_device

CPU = torch.device("cpu")


def test_a_model_that_is_loaded_onto_a_device_is_as_from_pretrained(tmp_path: Path) -> None:
    folder = export_tiny_model(tmp_path / "model")
    plain = LLM2CLIPModel.from_pretrained(folder)
    loaded = load_on_device(LLM2CLIPModel, folder, CPU)
    states = plain.state_dict(), loaded.state_dict()
    assert not loaded.training and states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("misfit", ["Missing", "Unexpected"])
def test_a_weight_that_does_not_fit_is_refused_on_every_device(misfit: str, tmp_path: Path) -> None:
    folder = export_tiny_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    moved = weights.pop("text_projection.weight")
    if misfit == "Unexpected":
        weights |= {"text_projection.weight": moved, "stray.weight": moved.clone()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{misfit} \(1\)"):
        load_on_device(LLM2CLIPModel, folder, CPU)
