"""Stage 3, the losses: the same from stores and towers, from one process and several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from aligning import (
    SHORT_RUN,
    Prepared,
    Run,
    command_of,
    names_that_differ,
    prepare,
    read_losses,
    read_tensorboard_losses,
)
from gloo_workers import find_free_port

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.training.losses.loss import LossInputs

ROOT = Path(__file__).parents[3]


def test_tensorboard_shows_the_losses_of_the_metrics(finished: Run) -> None:
    pytest.importorskip("tensorboard")
    # An event holds a float32, of 24 bits.
    expected = pytest.approx(read_losses(finished.output), rel=1e-7)
    assert read_tensorboard_losses(finished.output) == expected


@pytest.mark.slow
def test_the_last_step_is_logged_whatever_the_steps_between_two_logs(
    prepared: Prepared, tmp_path: Path
) -> None:
    prepared.align(tmp_path / "each", max_steps=3)
    losses = read_losses(tmp_path / "each")
    run = prepared.align(tmp_path / "run", max_steps=3, logging_steps=10)
    # Losses are added up in float32.
    wanted = {1: losses[1], 3: pytest.approx((losses[2] + losses[3]) / 2, rel=1e-6)}
    assert read_losses(tmp_path / "run") == wanted
    assert run.results["final_loss"] == read_losses(tmp_path / "run")[3]


def test_a_loss_computes_in_float32_whatever_the_precision_of_the_towers(
    prepared: Prepared, tmp_path: Path
) -> None:
    seen: set[torch.dtype] = set()

    def compare(inputs: LossInputs) -> torch.Tensor:
        cosines = inputs.image_embeds @ inputs.text_embeds.T
        assert inputs.vision_embeds is not None and inputs.caption_embeds is not None
        embeds = (inputs.vision_embeds, inputs.caption_embeds)
        seen.update(part.dtype for part in (cosines, inputs.logit_scale, *embeds))
        logits = inputs.logit_scale * cosines
        return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))

    prepared.align(
        tmp_path / "run", precision="bfloat16", max_steps=1, text_training="frozen-online",
        loss=compare,
    )  # fmt: skip
    assert seen == {torch.float32}


@pytest.mark.slow
def test_towers_and_stores_give_the_same_losses(
    prepared: Prepared, finished: Run, tmp_path: Path
) -> None:
    online = prepared.align(tmp_path / "online", text_training="frozen-online")
    changed = [names_that_differ(prepared.model, run.model) for run in (finished, online)]
    assert changed[0] == changed[1]
    stored = prepared.align_stored(tmp_path / "stored", **SHORT_RUN)
    for run in (online, stored):
        # The towers see other batches, and six steps carry the rounding on.
        assert read_losses(run.output) == pytest.approx(read_losses(finished.output), abs=1e-3)


def read_first_scale(output: Path) -> float:
    first = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]
    return float(json.loads(first)["inverse_temperature"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "text_training", "precision"),
    [("siglip", "frozen-online", "float32"), ("clip", "stored", "bfloat16")],
)
def test_sharded_processes_train_as_one_does_with_the_whole_batch(
    vision: str, text_training: str, precision: str, tmp_path: Path
) -> None:
    prepared = prepare(tmp_path / "prepared", vision=vision)
    changed = {
        "max_steps": 4, "save_steps": 4, "text_training": text_training, "precision": precision,
    }  # fmt: skip
    assert main(command_of(prepared, tmp_path / "one", **changed)) == 0
    launch = ["accelerate.commands.launch", "--config_file", "examples/accelerate/fsdp.yaml",
              "--main_process_port", str(find_free_port()),
              "tests/helpers/fsdp_on_cpu.py"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *launch, *command_of(prepared, tmp_path / "two", **changed)],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Wrote") == 1
    # Four steps carry the rounding of sums in another order on, or that of bfloat16's 8 bits.
    one, two = read_losses(tmp_path / "one"), read_losses(tmp_path / "two")
    assert two == pytest.approx(one, abs=1e-3 if precision == "float32" else 3e-2)
    # The temperature is float32 in both: bfloat16 would move it by 0.2 %.
    scales = [read_first_scale(tmp_path / name) for name in ("one", "two")]
    assert scales[1] == pytest.approx(scales[0], rel=1e-6)
    assert check_model(tmp_path / "two" / "model").healthy
