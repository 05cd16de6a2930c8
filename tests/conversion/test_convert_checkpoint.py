"""A converted checkpoint gives what the official code gave, whatever layout it came in."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import (
    FORMAT_OF,
    GOLDEN,
    LLM,
    LLM2VEC,
    convert,
    convert_family,
    copy_llm,
    plan,
    read_captions,
    read_checkpoint,
    read_golden,
    save_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from modeling_llm2clip import LLM2CLIPTextModel, LLM2CLIPVisionModel
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.conversion.convert_checkpoint import ConversionPlan, make_image_processor
from modeling_llm2clip.conversion.source_checkpoint import LLMSource
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.model_folders.golden_embeddings import render_golden_images
from modeling_llm2clip.model_folders.model_folder import RECORD_BEFORE_TRAINING, RECORD_FILE
from modeling_llm2clip.model_folders.model_writing import save_trained_model
from modeling_llm2clip.publishing.export_model import export_model

FAMILIES = tuple(FORMAT_OF)
# Sums of float32 numbers in another order, over a few layers; logits reach 30.
MOST_DIFFERENCE = 1e-5

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Convert a family's checkpoint when its folder is first asked for."""
    return cache(lambda family: convert_family(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ConversionPlan]:
    """Plan the conversion of a family's checkpoint when it is first asked for."""

    def make(family: str) -> ConversionPlan:
        source = save_checkpoint(family, tmp_path_factory.mktemp(family))
        return plan(source, source_format=FORMAT_OF[family])

    return cache(make)


def load_weights(folder: Path) -> dict[str, Any]:
    weights = {}
    for path in folder.glob("model*.safetensors"):
        weights |= load_file(path)
    return weights


def assert_nothing_is_skipped(folder: Path) -> None:
    """What users load the folder through can be checked: no file for it is missing."""
    report = check_model(folder, device="cpu")
    assert report.healthy, str(report)
    passed = {check.name for check in report.checks if check.passed}
    assert {"golden embeddings", "sentence-transformers", "processor", "remote code"} <= passed


def read_dropped(folder: Path) -> dict[str, list[str]]:
    """Keys that were left out, by reason."""
    return json.loads((folder / RECORD_FILE).read_text())["dropped"]


def assert_same(planned: ConversionPlan, other: ConversionPlan) -> None:
    """The model planned from one source is that planned from another."""
    weights, expected = (
        {name: tensor.read().float() for name, tensor in one.weights.items()}
        for one in (planned, other)
    )
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def same_weights(first: Path, second: Path) -> bool:
    ours, theirs = load_weights(first), load_weights(second)
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@every_family
@pytest.mark.slow
def test_embeddings_and_logits_are_those_of_the_official_code(converted, family) -> None:
    golden = read_golden(family)
    model = AutoModel.from_pretrained(converted(family)).eval()
    processor = AutoProcessor.from_pretrained(converted(family))
    inputs = processor(text=read_captions()[0])
    with torch.inference_mode():
        found = {
            "image_features": model.get_image_features(golden["pixel_values"]).pooler_output,
            "caption_embeds": model.get_caption_embeds(**inputs),
            "text_features": model.get_text_features(**inputs).pooler_output,
            "logits_per_image": model(
                **inputs, pixel_values=golden["pixel_values"]
            ).logits_per_image,
        }
    differences = {name: float((found[name] - golden[name]).abs().max()) for name in found}
    assert max(differences.values()) <= MOST_DIFFERENCE, differences


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hub_clip", "eva02", "siglip2"])  # openai's is hub_clip's
def test_what_is_written_is_healthy_and_is_what_saving_the_model_would_write(
    converted, family, tmp_path
) -> None:
    folder = converted(family)
    assert_nothing_is_skipped(folder)
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
    assert ours == theirs
    assert same_weights(folder, tmp_path)
    record = json.loads((folder / RECORD_FILE).read_text())
    assert record["num_parameters"] == sum(p.numel() for p in model.parameters())


def test_the_record_has_sources_format_and_what_was_left_out(converted, plans) -> None:
    record = json.loads((converted("eva02") / RECORD_FILE).read_text())
    assert record["source_format"] == asdict(FORMAT_OF["eva02"])
    assert record["pixels"]["mean"][0] == pytest.approx(0.48145466)
    assert [file["name"] for file in record["files"]] == ["epoch_3.pt", "model.safetensors"]
    assert [path.name for path in plans("siglip2").files] == ["epoch_3.pt"]  # it holds its LLM
    ((reason, keys),) = record["dropped"].items()
    assert "rotary frequencies" in reason and len(keys) == 6
    assert set(keys) == {name for name in read_checkpoint("eva02") if "rope" in name}
    assert not any(plans(family).dropped for family in FAMILIES if family != "eva02")
    assert str(GOLDEN.parent.parent) not in json.dumps(record)  # names, not paths of this machine


def rename_to_old_eva(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name.replace("q_proj.bias", "q_bias").replace("v_proj.bias", "v_bias"): value
        for name, value in state.items()
    }


def test_older_eva02_names_make_the_same_model(plans, tmp_path) -> None:
    source = save_checkpoint("eva02", tmp_path, rename_to_old_eva(read_checkpoint("eva02")))
    assert_same(plan(source, source_format=FORMAT_OF["eva02"]), plans("eva02"))


def test_an_llm_beside_the_checkpoint_takes_the_place_of_one_inside(plans, tmp_path) -> None:
    state = {k: v for k, v in read_checkpoint("siglip2").items() if "text.text.model" not in k}
    source = save_checkpoint("siglip2", tmp_path, state)
    planned = plan(source, source_format=FORMAT_OF["siglip2"])
    assert_same(planned, plans("siglip2"))
    assert [path.name for path in planned.files] == ["epoch_3.pt", "model.safetensors"]


def test_an_llm_with_its_head_makes_the_same_model(plans, tmp_path) -> None:
    llm = copy_llm(tmp_path / "llama")
    weights = {
        f"model.{name}": value for name, value in load_file(llm / "model.safetensors").items()
    }
    weights["lm_head.weight"] = torch.ones(320, 32)
    # Without the scaling of the configuration, as older versions saved it.
    frequencies = 500_000.0 ** -(torch.arange(0, 8, 2) / 8)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = frequencies
    (llm / "model.safetensors").unlink()
    torch.save(weights, llm / "pytorch_model.bin")
    config = json.loads((llm / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "McGill-NLP/somewhere--modeling_llama_encoder.LlamaBiModel"}
    (llm / "config.json").write_text(json.dumps(config))
    source = save_checkpoint("openai", tmp_path / "source")
    planned = plan(source, source_format=FORMAT_OF["openai"], llm=LLMSource(llm))
    assert_same(planned, plans("openai"))
    assert sorted(planned.dropped) == [
        "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq",
    ]  # fmt: skip
    assert "auto_map" not in planned.config.text_config.to_dict()


@pytest.mark.slow
def test_what_rounding_undoes_of_a_lora_is_counted(tmp_path) -> None:
    source, lora = save_checkpoint("openai", tmp_path / "source"), tmp_path / "lora"
    shutil.copytree(LLM2VEC / "llama_lora", lora)
    factors = load_file(lora / "adapter_model.safetensors")
    small = {name: 0.05 * value for name, value in factors.items()}
    save_file(small, lora / "adapter_model.safetensors")
    options: Any = {"source_format": FORMAT_OF["openai"], "components": "text"}
    with pytest.warns(UserWarning, match=r"LoRA lora changes \d.*% of the entries .*bfloat16"):
        llm = LLMSource(LLM, loras=(lora,))
        folder = convert(source, tmp_path / "model", llm=llm, dtype="bfloat16", **options)
    written, base = load_file(folder / "model.safetensors"), plan(source, **options).weights
    layers = [name for name in base if name.startswith("text_model.") and "_proj." in name]
    differ = [written[name] != base[name].read().bfloat16() for name in layers]
    share = sum(int(part.sum()) for part in differ) / sum(part.numel() for part in differ)
    record = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
    assert record["llm"]["loras"][0]["share_changed_by_merging"] == share < 0.5


@pytest.mark.parametrize(
    ("components", "model_class"), [("text", LLM2CLIPTextModel), ("vision", LLM2CLIPVisionModel)]
)
@pytest.mark.slow
def test_a_text_only_or_vision_only_model_has_the_weights_of_the_whole_and_no_others(
    converted, tmp_path, components, model_class
) -> None:
    llm = copy_llm(tmp_path / "llama")
    if components == "vision":  # whose weights are not read
        (llm / "model.safetensors").unlink()
    folder = convert_family("eva02", tmp_path, components=components, llm=LLMSource(llm))
    assert_nothing_is_skipped(folder)
    model, whole = (model_class.from_pretrained(source) for source in (folder, converted("eva02")))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True)
    )
    assert set(load_weights(folder)) == set(model.state_dict())
    assert "logit_scale" in read_dropped(folder)["belongs to the tower that was not requested"]


@pytest.mark.parametrize("preprocessing", ["openai", "half"])
def test_pixels_are_those_of_the_official_transform(preprocessing) -> None:
    source_format = replace(FORMAT_OF["siglip2"], preprocessing=preprocessing)
    processor = make_image_processor(source_format, 40)
    found = processor(images=[render_golden_images()[0]], return_tensors="pt")["pixel_values"][0]
    wanted = load_file(GOLDEN / "preprocessing.safetensors")[preprocessing]
    # Both resize 8-bit pixels, in two libraries: three steps of 255, over a deviation of 0.26.
    assert float((found - wanted).abs().max()) <= 3 / 255 / 0.26


def test_a_temperature_rounded_up_to_half_precision_is_100(tmp_path) -> None:
    state = read_checkpoint("openai")
    state["logit_scale"] = torch.tensor(100.0).log().half()
    assert state["logit_scale"].float() > math.log(100)
    planned = plan(save_checkpoint("openai", tmp_path, state), source_format=FORMAT_OF["openai"])
    written = float(planned.weights["logit_scale.log_scale"].read())
    assert written == pytest.approx(math.log(100), abs=5e-7)  # float32 of ln 100


@pytest.mark.slow
def test_the_command_converts_and_says_what_it_left_out(tmp_path, capsys) -> None:
    source = save_checkpoint("eva02", tmp_path / "source")
    flags = ["--source-format", "eva02", "--text-model", str(LLM), "--dtype", "float32"]
    flags += ["--max-text-length", "200", "--license", "mit", "--text-license", "llama3"]
    (tmp_path / "source" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert main(["convert", str(source), str(tmp_path / "model"), *flags]) == 0
    printed = capsys.readouterr().out
    assert "All checks passed" in printed and "Dropped (rotary frequencies" in printed
    card = (tmp_path / "model" / "README.md").read_text()
    assert "license: mit" in card and "# model\n" in card
    assert "| vision tower `epoch_3.pt` | apache-2.0 |" in card  # on the source's own card
    assert "| language model `llama` | llama3 |" in card


def test_an_export_keeps_the_record_and_a_training_calls_it_one_of_before(
    converted, tmp_path
) -> None:
    source = converted("eva02")
    folder = export_model(source, tmp_path / "again")
    assert (folder / RECORD_FILE).read_bytes() == (source / RECORD_FILE).read_bytes()
    changed = {"text_projection.weight": load_weights(source)["text_projection.weight"] + 1}
    save_trained_model(source, changed, tmp_path / "trained")
    assert not (tmp_path / "trained" / RECORD_FILE).exists()
    record = tmp_path / "trained" / RECORD_BEFORE_TRAINING
    assert record.read_bytes() == (source / RECORD_FILE).read_bytes()


def test_the_script_is_the_command() -> None:
    script = GOLDEN.parent / "convert_llm2clip_to_hf.py"
    done = subprocess.run(
        [sys.executable, str(script), "-h"],
        capture_output=True, text=True, check=False, timeout=120,
        env={"PYTHONPATH": str(GOLDEN.parent.parent), "PATH": "", "COLUMNS": "100"},
    )  # fmt: skip
    assert done.returncode == 0 and "Usage: llm2clip convert" in done.stdout


def test_a_safetensors_file_may_take_the_place_of_a_training_checkpoint(plans, tmp_path) -> None:
    save_file(read_checkpoint("openai"), tmp_path / "weights.safetensors")
    planned = plan(tmp_path / "weights.safetensors", source_format=FORMAT_OF["openai"])
    assert_same(planned, plans("openai"))


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch) -> None:
    source = save_checkpoint("openai", tmp_path / "source")
    usage = shutil.disk_usage(tmp_path)._replace(free=60 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"has 0\.06 GB free, but the model takes 0\.07 GB"):
        convert(source, tmp_path / "model", source_format=FORMAT_OF["openai"])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
