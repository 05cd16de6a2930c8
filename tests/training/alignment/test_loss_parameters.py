"""Stage 3, a loss with a parameter: it is trained with the model, chooses, and is resumed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import Prepared, prepare, read_losses
from gloo_workers import find_free_port
from safetensors.torch import load_file
from sigmoid_loss import BIAS, train
from transformers import TrainerCallback

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.heads_llm2clip import LogitRule
from modeling_llm2clip.scheduling.graceful_stop import StageInterrupt
from modeling_llm2clip.training.alignment.held_out import fit_start, fit_temperature
from modeling_llm2clip.training.losses.choose_loss import build_loss
from modeling_llm2clip.training.losses.loss import LossInputs, list_fitted
from modeling_llm2clip.training.losses.pairs import SigmoidLoss
from modeling_llm2clip.training.run_folder import read_results, read_run_record

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def colored(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("colored"), num_colored=100, trained=False)


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
    ((bias,),) = read_results(output)["start"]["loss_parameters"].values()
    return float(bias)


def read_held_out_losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["held_out_loss"] for line in lines if "held_out_loss" in line]


@pytest.mark.slow
def test_a_loss_with_a_parameter_trains_chooses_and_resumes(
    prepared: Prepared, tmp_path: Path
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    train(prepared.data.parent, run, refit=True, save_steps=1)
    trained = {step: float(read_checkpoint(run, step)[BIAS]) for step in (7, 8)}
    start = read_start(run)
    assert start != trained[7] != trained[8]
    assert read_run_record(run)["parameters"]["loss"]["trainable"] == 1
    # What chooses is the loss that is trained, with the parameter as it is then.
    results = read_results(run)["held_out"]
    losses = [results["before"]["loss"], *read_held_out_losses(run)]
    best = load_file(run / "best.safetensors")
    assert results["best"]["loss"] <= min(losses)
    assert (BIAS in best) and (results["best_step"] > 1)
    assert float(best[BIAS]) != start
    # Each fit begins with the parameter that suits held-out images.
    (first, *_) = sorted((run / "refit/checkpoints").iterdir())
    bias = float(load_file(first / "trained.safetensors")[BIAS])
    # A step of Adam moves it by at most the learning rate.
    assert 0 < abs(bias - start) < 1.1e-3 * int(first.name.split("-")[1])
    # The parameter is in no model folder, and is resumed from a checkpoint.
    assert not [n for n in load_file(run / "model/model.safetensors") if "logit_bias" in n]
    options = {"refit": True, "save_steps": 1}
    with pytest.raises(StageInterrupt):
        train(prepared.data.parent, again, callbacks=[SignalAfter(3)], **options)
    train(prepared.data.parent, again, resume=True, **options)
    once, twice = (read_checkpoint(output, 8) for output in (run, again))
    assert set(once) == set(twice)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def train_on_two_processes(prepared: Prepared, output: Path, **options: Any) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
            "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no",
            "--main_process_port", str(find_free_port()), "tests/helpers/sigmoid_loss.py",
            str(prepared.data.parent), str(output), json.dumps(options),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
        env={
            **os.environ, "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'helpers'}",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"by_cosine": True}, {"max_steps": 0, "projection_init": "auto"}]
)
def test_two_processes_train_as_one_does(
    prepared: Prepared, tmp_path: Path, options: dict[str, Any]
) -> None:
    """A parameter of the loss, without a temperature, and a closed form."""
    train(prepared.data.parent, tmp_path / "one", refit=False, **options)
    train_on_two_processes(prepared, tmp_path / "two", refit=False, **options)
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        # Eight steps carry the rounding of sums in another order on.
        torch.testing.assert_close(two[name], value, atol=1e-3, rtol=1e-3)
    if not options:
        biases = [read_checkpoint(tmp_path / name, 8)[BIAS] for name in ("one", "two")]
        assert abs(float(biases[0]) - read_start(tmp_path / "one")) > 5e-4
        torch.testing.assert_close(*biases, atol=1e-5, rtol=0)
        losses = [read_losses(tmp_path / name) for name in ("one", "two")]
        assert losses[1] == pytest.approx(losses[0], abs=2e-3)


@pytest.mark.parametrize(
    ("noise", "dims", "scale"),
    [(0.3, (), 1.0), (1.0, (), 100.0), (3.0, (2, 4), 1.0), (0.3, (2, 4), 100.0)],
)
def test_temperature_and_bias_start_where_the_loss_that_is_trained_is_lowest(
    noise: float, dims: tuple[int, ...], scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(48, 8, generator=generator)
    texts = images + noise * torch.randn(48, 8, generator=generator)
    sides = (torch.nn.functional.normalize(side, dim=-1) for side in (images, texts))
    inputs = LossInputs(*sides, LogitRule(torch.tensor([scale])), torch.arange(48), is_whole=True)
    loss = build_loss(AlignConfig(loss="sigmoid", matryoshka_dims=dims))
    (bias,) = loss.parameters()  # type: ignore[attr-defined]
    before = float(bias.detach())
    fit = fit_start(loss, inputs)
    assert float(bias.detach()) == before and [*fit.parameters] == [*list_fitted(loss)]
    with torch.no_grad():
        bias.copy_(torch.tensor(next(iter(fit.parameters.values()))))
        assert float(loss(inputs.at_scale(math.exp(fit.log_scale or 0)))) == fit.loss
        # A grid of both finds nothing lower.
        for log_scale in torch.arange(0, math.log(100), 0.2).tolist():
            for ratio in torch.arange(0.2, 1.5, 0.1).tolist():
                bias.fill_(-4 - ratio * math.exp(log_scale))
                assert fit.loss < float(loss(inputs.at_scale(math.exp(log_scale)))) + 1e-3


@pytest.mark.slow
def test_a_model_that_is_as_good_as_the_closed_form_is_kept(
    colored: Prepared, tmp_path: Path
) -> None:
    options = {"loss": "sigmoid", "max_steps": 0, "refit": False}
    first = colored.align_stored(tmp_path / "first", **options)
    again = replace(colored, model=first.model).align_stored(tmp_path / "again", **options)
    starts = [run.results["start"] for run in (first, again)]
    assert [start["method"] for start in starts] == ["cca", "model"]
    # The fit ends where float32 sees no slope.
    assert again.before.loss == pytest.approx(first.before.loss, rel=1e-4)
    assert starts[1]["log_scale"] == pytest.approx(starts[0]["log_scale"], rel=1e-2)


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
