"""Towers run in the dtype that device and option mean; bfloat16 by default only if it is close.

A GPU, or a CPU that multiplies bfloat16, is a value here: every CPU computes in bfloat16, too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_folders import export_tiny_model

from benchmarks.accuracy.precision_effect import COSINE
from modeling_llm2clip import (
    LLM2CLIPModel,
    LLM2CLIPProcessor,
    LLM2CLIPTextModel,
    LLM2CLIPVisionModel,
)
from modeling_llm2clip.encoding import devices
from modeling_llm2clip.encoding.devices import find_device
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.encoding.precision import (
    DeviceTraits,
    choose_tower_dtype,
    describe_precision,
)
from modeling_llm2clip.model_folders import guarded_loading
from modeling_llm2clip.model_folders.golden_embeddings import GOLDEN_FILE
from modeling_llm2clip.model_folders.guarded_loading import LEAST_COSINE, load_in_precision
from modeling_llm2clip.model_folders.model_loading import load_model

CPU = torch.device("cpu")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
GPU = DeviceTraits("cuda", has_bfloat16=True, free_bytes=2**40)
FULL_GPU = DeviceTraits("cuda", has_bfloat16=True, free_bytes=0)
OLD_GPU = DeviceTraits("cuda", has_bfloat16=False, free_bytes=2**40)
MACHINE = DeviceTraits("cpu", has_bfloat16=False)
FAST_CPU = DeviceTraits("cpu", has_bfloat16=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export_tiny_model(tmp_path / "model", text_adapter_layers=1)


def disturb(folder: Path, tower: str = "text_model") -> None:
    """Sharpen the attention of a tower so much that eight bits choose other tokens."""
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if tower in name and "q_proj" in name:
            weights[name] *= 300
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def require_rounded(
    model: Any,
    folder: Path,
    *,
    towers: torch.dtype,
    heads: torch.dtype,
    vision: torch.dtype | None = None,
) -> None:
    """Require each weight to be the stored one in the dtype of its part, bit for bit."""
    stored = load_file(folder / "model.safetensors")
    of_vision = vision or towers
    parts = {"text_model": towers, "vision_model": of_vision}
    for name, weight in model.named_parameters():
        dtype = parts.get(name.partition(".")[0], heads)
        dtype = FLOAT32 if name.startswith("logit_scale.") else dtype
        assert weight.dtype == dtype, name
        assert torch.equal(weight, stored[name].to(dtype)), name


@pytest.mark.parametrize(
    ("precision", "traits", "stored", "chosen"),
    [
        ("auto", MACHINE, FLOAT32, (FLOAT32, False)),
        ("auto", MACHINE, BFLOAT16, (BFLOAT16, False)),
        ("auto", FAST_CPU, FLOAT32, (BFLOAT16, True)),
        ("auto", FAST_CPU, torch.float16, (torch.float16, False)),
        ("float32", FAST_CPU, FLOAT32, (FLOAT32, False)),
        ("auto", DeviceTraits("mps", has_bfloat16=False), FLOAT32, (FLOAT32, False)),
        ("auto", GPU, FLOAT32, (BFLOAT16, True)),
        ("auto", GPU, torch.float16, (torch.float16, False)),
        ("auto", OLD_GPU, FLOAT32, (FLOAT32, False)),
        ("bfloat16", GPU, FLOAT32, (BFLOAT16, False)),
        ("float32", GPU, BFLOAT16, (FLOAT32, False)),
        ("float32", MACHINE, BFLOAT16, (FLOAT32, False)),
    ],
)
def test_option_device_and_stored_dtype_determine_the_towers_dtype(
    precision: str, traits: DeviceTraits, stored: torch.dtype, chosen: Any
) -> None:
    assert choose_tower_dtype(precision, traits, stored) == chosen


@pytest.mark.parametrize(("traits", "number"), [(GPU, 64), (FAST_CPU, 16)], ids=["GPU", "CPU"])
def test_bfloat16_hardware_rounds_towers_but_no_head_if_embeddings_stay(
    traits: DeviceTraits,
    number: int,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[dict[str, torch.Tensor]] = []
    embed = guarded_loading._embed_examples

    def note(*args: Any, **options: Any) -> dict[str, torch.Tensor]:
        compared.append(embed(*args, **options))
        return compared[-1]

    monkeypatch.setattr(guarded_loading, "_embed_examples", note)
    model = load_in_precision(LLM2CLIPModel, folder, CPU, traits=traits)
    counts = {name: len(embeds.unique(dim=0)) for name, embeds in compared[0].items()}
    assert counts == dict.fromkeys(("text", "image", "text projected", "image projected"), number)
    require_rounded(model, folder, towers=BFLOAT16, heads=FLOAT32)
    said = capsys.readouterr().err
    assert said.count("runs in bfloat16") == 2 and "the same weights in float32" in said
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    texts = ["a dog", "two red apples on a table"]
    rounded, exact = (
        encode_texts(each, processor, texts)
        for each in (model, LLM2CLIPModel.from_pretrained(folder))
    )
    assert not torch.equal(rounded, exact)
    assert F.cosine_similarity(rounded, exact).min() >= LEAST_COSINE


@pytest.mark.parametrize("tower", ["text_model", "vision_model"])
@pytest.mark.parametrize("traits", [GPU, FULL_GPU, FAST_CPU], ids=["GPU", "full GPU", "CPU"])
def test_each_tower_stays_in_float32_by_itself(
    traits: DeviceTraits, tower: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disturb(folder, tower)  # from its golden embeddings, too
    model = load_in_precision(LLM2CLIPModel, folder, CPU, traits=traits)
    dtypes = {"text_model": BFLOAT16, "vision_model": BFLOAT16, tower: FLOAT32}
    text, vision = dtypes["text_model"], dtypes["vision_model"]
    require_rounded(model, folder, towers=text, vision=vision, heads=FLOAT32)
    said = capsys.readouterr().err
    assert f"The {tower.partition('_')[0]} tower runs in float32: the smallest cosine" in said
    assert said.count("tower runs in bfloat16") == 1
    described = describe_precision(model, FLOAT32)["precision"]
    assert described == f"{text} text and {vision} vision".replace("torch.", "")
    part = LLM2CLIPTextModel if tower == "text_model" else LLM2CLIPVisionModel
    alone = load_in_precision(part, folder, CPU, traits=traits)  # compares only its tower
    assert alone.dtype == FLOAT32 and describe_precision(alone, FLOAT32) == {}
    assert len(COSINE.findall(capsys.readouterr().err)) == 1  # the benchmark reads it there


@pytest.mark.parametrize("moved", [[1.0, 0.9], [1.0, torch.nan]])  # the first by 0.0014
def test_one_embedding_that_moves_keeps_its_tower_in_float32(
    moved: list[float], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, rounded = torch.ones(2, 64, 2)
    rounded[7] = torch.tensor(moved)
    embeds = iter([exact, rounded])
    monkeypatch.setattr(
        guarded_loading, "_embed_examples", lambda *_, **__: {"text": next(embeds), "image": exact}
    )
    model = load_in_precision(LLM2CLIPModel, folder, CPU, traits=GPU)
    require_rounded(model, folder, towers=FLOAT32, vision=BFLOAT16, heads=FLOAT32)


def test_without_memory_golden_embeddings_are_compared_or_nothing_is_rounded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (folder / "model.safetensors").stat().st_size
    full = replace(GPU, free_bytes=int(1.75 * size) - 1)  # float32, bfloat16 and a batch
    model = load_in_precision(LLM2CLIPModel, folder, CPU, traits=full)
    require_rounded(model, folder, towers=BFLOAT16, heads=FLOAT32)
    assert "the folder's golden embeddings" in capsys.readouterr().err
    (folder / GOLDEN_FILE).unlink()
    model = load_in_precision(LLM2CLIPModel, folder, CPU, traits=FULL_GPU)
    require_rounded(model, folder, towers=FLOAT32, heads=FLOAT32)
    assert "cannot be checked without golden" in capsys.readouterr().err


def test_a_bfloat16_folder_runs_as_stored_or_in_float32(tmp_path: Path) -> None:
    folder = export_tiny_model(tmp_path / "half", dtype=BFLOAT16)
    for traits, precision, towers, heads in (
        (MACHINE, "auto", BFLOAT16, BFLOAT16),
        (MACHINE, "bfloat16", BFLOAT16, BFLOAT16),
        (MACHINE, "float32", FLOAT32, FLOAT32),
        (FAST_CPU, "auto", BFLOAT16, BFLOAT16),
        (GPU, "auto", BFLOAT16, FLOAT32),
    ):
        model = load_in_precision(LLM2CLIPModel, folder, CPU, precision, traits=traits)
        require_rounded(model, folder, towers=towers, heads=heads)
    loaded, _ = load_model(folder, device="cpu", precision="float32")
    assert loaded.dtype == FLOAT32


def test_a_device_without_bfloat16_refuses_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "has_bfloat16", lambda _: False)
    assert find_device("cpu", precision="float32") == CPU
    with pytest.raises(ValueError, match="cpu does not compute in bfloat16"):
        load_model(folder, device="cpu", precision="bfloat16")
    with pytest.raises(ValueError, match="precision='float32' cannot be combined with dtype"):
        load_model(folder, device="cpu", precision="float32", dtype=FLOAT32)
