"""Stage 3, a loss with a parameter: it is trained with the model, chooses, and is resumed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import Prepared, read_losses
from gloo_workers import find_free_port
from safetensors.torch import load_file
from sigmoid_loss import BIAS, train
from transformers import TrainerCallback

from modeling_llm2clip.heads_llm2clip import LogitRule
from modeling_llm2clip.scheduling.graceful_stop import StageInterrupt
from modeling_llm2clip.training.alignment.held_out import fit_temperature
from modeling_llm2clip.training.losses.loss import LossInputs
from modeling_llm2clip.training.losses.sigmoid import SigmoidLoss
from modeling_llm2clip.training.run_folder import read_results, read_run_record

ROOT = Path(__file__).parents[3]


class SignalAfter(TrainerCallback):
    """Ends a run after a step, as a scheduler does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == self._step:
            signal.raise_signal(signal.SIGTERM)


def read_checkpoint(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoints" / f"checkpoint-{step}" / "trained.safetensors")


def read_start(output: Path) -> float:
    """The bias at the start, which is fitted to held-out images."""
    (bias,) = read_results(output)["start"]["loss_parameters"][BIAS]
    return float(bias)


def read_held_out_losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["held_out_loss"] for line in lines if "held_out_loss" in line]


@pytest.mark.slow
def test_a_loss_with_a_parameter_trains_chooses_and_resumes(
    prepared: Prepared, tmp_path: Path
) -> None:
    train(prepared.data.parent, tmp_path / "run", refit=False)
    trained = {step: read_checkpoint(tmp_path / "run", step)[BIAS] for step in (4, 8)}
    start = read_start(tmp_path / "run")
    assert start != float(trained[4]) != float(trained[8])
    assert read_run_record(tmp_path / "run")["parameters"]["loss"]["trainable"] == 1
    # What chooses is the loss that is trained, with the parameter as it is then.
    results = read_results(tmp_path / "run")["held_out"]
    losses = [results["before"]["loss"], *read_held_out_losses(tmp_path / "run")]
    best = load_file(tmp_path / "run" / "best.safetensors")
    assert results["best"]["loss"] <= min(losses)
    assert (BIAS in best) and (results["best_step"] > 0)
    assert float(best[BIAS]) != start
    # The parameter is in no model folder, and is resumed from a checkpoint.
    assert not [n for n in load_file(tmp_path / "run/model/model.safetensors") if "logit_bias" in n]
    with pytest.raises(StageInterrupt):
        train(prepared.data.parent, tmp_path / "again", refit=False, callbacks=[SignalAfter(3)])
    train(prepared.data.parent, tmp_path / "again", refit=False, resume=True)
    once, twice = (read_checkpoint(tmp_path / name, 8) for name in ("run", "again"))
    assert set(once) == set(twice)
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.slow
def test_each_fit_begins_with_the_parameter_that_suits_held_out_images(
    prepared: Prepared, tmp_path: Path
) -> None:
    train(prepared.data.parent, tmp_path / "run", refit=True, save_steps=1)
    assert read_results(tmp_path / "run")["held_out"]["best_step"] > 1
    (first, *_) = sorted((tmp_path / "run/refit/checkpoints").iterdir())
    step = int(first.name.split("-")[1])
    bias = float(load_file(first / "trained.safetensors")[BIAS])
    # A step of Adam moves it by at most the learning rate.
    assert 0 < abs(bias - read_start(tmp_path / "run")) < 1.1e-3 * step


@pytest.mark.slow
def test_two_processes_train_the_parameter_as_one_does(prepared: Prepared, tmp_path: Path) -> None:
    folder = prepared.data.parent
    train(folder, tmp_path / "one", refit=False)
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
            "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no",
            "--main_process_port", str(find_free_port()), "tests/helpers/sigmoid_loss.py",
            str(folder), str(tmp_path / "two"),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
        env={
            **os.environ, "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'helpers'}",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_checkpoint(tmp_path / name, 8)[BIAS] for name in ("one", "two"))
    assert abs(float(one) - read_start(tmp_path / "one")) > 5e-4
    # Eight steps carry the rounding of sums in another order on.
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    losses = [read_losses(tmp_path / name) for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


def test_the_temperature_is_fitted_at_the_bias_of_the_loss() -> None:
    images = torch.nn.functional.normalize(
        torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    inputs = LossInputs(images, images, LogitRule(torch.ones(1)), torch.arange(16), is_whole=True)
    for bias in (-2.0, -20.0):
        loss = SigmoidLoss(logit_bias=bias)
        log_scale, lowest = fit_temperature(loss, inputs)
        losses = [
            float(loss(inputs.at_scale(math.exp(log_scale + step))).detach())
            for step in (-0.05, 0.0, 0.05)
        ]
        assert lowest == losses[1] == min(losses)
