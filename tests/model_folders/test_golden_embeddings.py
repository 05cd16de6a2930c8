"""Golden embeddings: what is written from a folder is what the folder was, or nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import Break, remove, set_weight
from safetensors.torch import load_file
from shared_models import shared_model
from torch import Tensor

from modeling_llm2clip.configs.export_config import ExportConfig
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.model_folders.golden_embeddings import (
    GOLDEN_FILE,
    compare_golden,
    read_golden,
)
from modeling_llm2clip.model_folders.model_loading import load_model, load_partial_model
from modeling_llm2clip.model_folders.model_writing import save_model, save_trained_model
from modeling_llm2clip.publishing.export_model import export_model
from modeling_llm2clip.publishing.export_plan import plan_export

WEIGHTS = {
    "llm": "text_model.layers.0.self_attn.v_proj.weight",
    "vision tower": "vision_model.encoder.layers.0.mlp.fc1.weight",
    "projection": "visual_projection.weight",
    "temperature": "logit_scale.log_scale",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy folder; not to be changed."""
    return save_model(*shared_model(), tmp_path_factory.mktemp("golden") / "model")


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
    "other dtype": (export(dtype="bfloat16"), ("llm", "vision tower", "temperature")),
    "smaller files": (export(max_shard_size="50KB"), ("llm",)),
    "text": (export(components="text"), ("llm",)),
    "vision": (export(components="vision"), ("vision tower", "projection")),
    "vision tower": (export(components="vision-tower"), ("vision tower",)),
    "ONNX": (export(onnx=True), ("llm", "vision tower", "temperature")),
    "dry run": (plan_export, ("llm", "vision tower")),
    "trained": (train(TRAINED), ("vision tower", "projection", "temperature")),
    "trained LLM": (train(TRAINED_LLM), ("llm", "vision tower")),
}  # fmt: skip


@pytest.mark.parametrize(
    ("way", "damaged"), [(way, damaged) for way, (_, parts) in WAYS.items() for damaged in parts]
)
def test_nothing_is_written_from_a_folder_with_a_flipped_bit(
    way: str, damaged: str, source: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "damaged"))
    flip_bit(WEIGHTS[damaged])(folder)
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match="golden embeddings"):
        WAYS[way][0](folder, tmp_path / "new" / "model")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_damaged_llm_that_is_not_run_still_shows_in_what_was_trained(
    source: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "damaged"))
    flip_bit(WEIGHTS["llm"])(folder)
    train(TRAINED)(folder, tmp_path / "new")
    failed = [check.name for check in check_model(tmp_path / "new", device="cpu").failed]
    assert failed == ["golden embeddings"]


@pytest.mark.parametrize("way", ["whole", "vision tower", "trained"])
def test_a_folder_without_golden_embeddings_is_said_to_be_unchecked(
    way: str, source: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "bare"))
    remove(GOLDEN_FILE)(folder)
    with pytest.warns(UserWarning, match="has no golden embeddings.*damage to it would not be"):
        WAYS[way][0](folder, tmp_path / "new")
    assert (tmp_path / "new").is_dir()


def test_without_the_llm_the_recorded_caption_embeddings_are_compared(source: Path) -> None:
    golden = read_golden(source)
    assert golden is not None and {"caption_embeds", "text_embeds"} <= set(golden[1])
    _, processor = load_model(source, device="cpu")
    partial = load_partial_model(source, with_vision_tower=True)
    found = compare_golden(source, partial, processor, runs_llm=False)
    assert found is not None and found.startswith("6 embeddings")  # four texts and two images
    with torch.no_grad():
        partial.text_projection.weight.mul_(-1)
    with pytest.raises(ValueError, match=r"text_embeds moved by .* in row"):
        compare_golden(source, partial, processor, runs_llm=False)
