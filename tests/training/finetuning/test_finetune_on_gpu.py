"""The GPU branches of fine-tuning, run on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host_reads import StepWatch
from running_ahead import run_ahead
from safetensors.torch import load_file
from sentence_transformers.base.losses import gradcache
from tiny import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from tuning import RECORDS, SHORT

from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.training.finetuning import finetune_llm as stage
from modeling_llm2clip.training.finetuning.finetune_llm import finetune_llm
from modeling_llm2clip.training.finetuning.finetune_trainer import CaptionEncoder, FinetuneTrainer


class WatchIds(StepWatch):
    """Also requires that token ids stay on the CPU."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        assert parts["train_dataloader"].device is None
        super().on_step_begin(args, state, control, **parts)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as an asynchronous device."""
    run_ahead(monkeypatch)


def leave_out(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Do not count reads in a function that reads token ids, which are on the CPU."""
    function = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, run)


@pytest.mark.slow
@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_no_step_between_two_logs_synchronizes_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mini_batch_size: int | None
) -> None:
    for name in ("preprocess", "forward"):
        leave_out(monkeypatch, CaptionEncoder, name)
    leave_out(monkeypatch, gradcache, "_create_minibatch")
    watch = WatchIds(1, 3)
    config = replace(SHORT, max_steps=4, logging_steps=4, mini_batch_size=mini_batch_size)
    finetune_llm(tiny_model(), RECORDS, tmp_path / "run", config, callbacks=[watch])
    assert len(watch.weights) == 4 and watch.reads.names == []


@pytest.mark.slow
@pytest.mark.usefixtures("ahead")
def test_a_non_finite_step_changes_no_weight_and_is_reported_at_the_next_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = CaptionEncoder.forward
    calls = []

    def run(self: CaptionEncoder, features: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(self.llm2clip.training)
        features = forward(self, features)
        if calls.count(True) == 5:  # two columns per step
            features["sentence_embedding"] = features["sentence_embedding"] * torch.nan
        return features

    monkeypatch.setattr(CaptionEncoder, "forward", run)
    watch = StepWatch()
    with pytest.raises(FloatingPointError, match=r"The loss is nan at step 2\. Lower the learning"):
        finetune_llm(
            tiny_model(), RECORDS, tmp_path / "run",
            replace(SHORT, logging_steps=5, save_steps=100), callbacks=[watch],
        )  # fmt: skip
    before, *after = watch.weights[1:]
    assert len(after) == 3 and all(torch.equal(weights, before) for weights in after)
    assert not torch.equal(watch.weights[0], before)


def test_ids_stay_on_the_cpu_next_to_a_marker_of_the_device() -> None:
    trainer = FinetuneTrainer.__new__(FinetuneTrainer)
    trainer.args = SimpleNamespace(device=torch.device("meta"))
    inputs = {"a_input_ids": torch.ones(4, 7), "a_attention_mask": torch.ones(4, 7)}
    found = trainer._prepare_inputs(inputs)
    assert all(found[name] is value for name, value in inputs.items())
    features = {name.removeprefix("a_"): value for name, value in found.items()}
    cut = gradcache._create_minibatch(features, 1, 3)
    assert cut["input_ids"].device.type == "cpu" and cut["device"].shape == (2, 0)
    assert {value.device.type for value in cut.values()} == {"cpu", "meta"}


@pytest.mark.slow
def test_a_lora_trained_on_a_bfloat16_base_is_merged_into_the_folders_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes = []

    def make(*args: Any) -> CaptionEncoder:
        encoder = make_encoder(*args)
        for parameter in encoder.llm2clip.text_model.parameters():
            dtypes.append((parameter.requires_grad, parameter.dtype))
        return encoder

    make_encoder = stage._make_encoder
    monkeypatch.setattr(stage, "_make_encoder", make)
    source = save_model(*tiny_model(), tmp_path / "base")
    config = replace(SHORT, max_steps=2, precision="bfloat16", merge=True)
    folder = finetune_llm(source, RECORDS, tmp_path / "run", config)
    assert set(dtypes) == {(False, torch.bfloat16), (True, torch.float32)}
    record = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert record["inputs"]["base_dtype"] == "bfloat16"
    before, after = (load_file(path / "model.safetensors") for path in (source, folder))
    lora = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    changed = 0
    for name, weight in before.items():
        key = f"base_model.model.{name.removeprefix('text_model.').removesuffix('.weight')}"
        wanted = weight
        if f"{key}.lora_A.weight" in lora:
            change = lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]
            wanted = weight + 2 * change
            changed += 1
        # One float32 product; weights rounded to bfloat16 would have a relative error of 4e-3.
        torch.testing.assert_close(after[name], wanted, atol=1e-6, rtol=1e-6)
    assert changed and after.keys() == before.keys()
