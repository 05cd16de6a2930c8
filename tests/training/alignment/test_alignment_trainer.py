"""The Trainer of stage 3: float32 under FSDP, lengths of runs, and the share of time for input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from aligning import Prepared, prepare
from gloo_workers import GROUP_IDS, load_trained, make_batch
from torch import Tensor
from transformers import TrainerControl, TrainerState

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.training.alignment import alignment_trainer
from modeling_llm2clip.training.alignment.alignment_trainer import (
    InputTimesCallback,
    choose_batch_size,
    count_steps,
    keep_scores_in_float32,
)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stand_in(**changed: Any) -> SimpleNamespace:
    """What FSDP2 asks of an Accelerator, with the plugin that accelerate itself makes."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **changed
    )
    plugin.set_mixed_precision("bf16")
    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16", is_main_process=True,
        device=torch.device("cpu"),
    )  # fmt: skip


def compute(prepared: Prepared, *, sharded: bool, autocast: bool) -> dict[str, Tensor]:
    """Loss, temperature and gradients of one batch through the real module."""
    model = load_trained(prepared.model)
    if sharded:
        accelerator = stand_in()
        keep_scores_in_float32(accelerator, model)
        fsdp2_prepare_model(accelerator, model)
    batch = make_batch(prepared.model, prepared.records)
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        loss, outputs = model({**batch, "group_ids": GROUP_IDS})
        loss.backward()
    embeds = (outputs.image_embeds, outputs.text_embeds)
    found = {
        "loss": loss.detach(),
        "scale": outputs.logits.scale.detach(),
        "dtypes": {part.dtype for part in (*embeds, loss, outputs.logits.scale)},
    }
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name] = gradient.full_tensor() if sharded else gradient
    return found


def join_gradients(found: dict[str, Any]) -> Tensor:
    names = sorted(found.keys() - {"loss", "scale", "dtypes"})
    return torch.cat([found[name].flatten() for name in names])


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
def test_scores_and_gradients_are_those_of_autocast(vision: str, tmp_path: Path) -> None:
    prepared = prepare(tmp_path, vision=vision, has_stores=False)
    exact = compute(prepared, sharded=False, autocast=False)
    usual = compute(prepared, sharded=False, autocast=True)
    sharded = compute(prepared, sharded=True, autocast=False)
    assert sharded["dtypes"] == {torch.float32}
    assert sharded["loss"].dtype == torch.float32
    # A step of bfloat16 at a temperature of 14.3 is 0.4 %; this is float32's own rounding.
    torch.testing.assert_close(sharded["scale"], exact["scale"], rtol=1e-6, atol=0)
    # Rounding of bfloat16 inside the towers, of 0.4 % a number, which autocast has as well.
    assert sharded["loss"] == pytest.approx(float(exact["loss"]), rel=5e-3)
    wanted = join_gradients(exact)
    errors = [(join_gradients(found) - wanted).norm() / wanted.norm() for found in (usual, sharded)]
    assert errors[1] < 2 * errors[0] < 0.05  # the residual stream is rounded too


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_first_version_is_refused_in_any_precision(mixed_precision: str) -> None:
    """It names trained layers otherwise than their folder, and so would lose them."""
    accelerator = stand_in()
    accelerator.mixed_precision = mixed_precision
    accelerator.state.fsdp_plugin.fsdp_version = 1
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        keep_scores_in_float32(accelerator, torch.nn.Module())  # type: ignore[arg-type]


def test_a_run_without_a_length_is_long_enough() -> None:
    config = AlignConfig()
    assert choose_batch_size(config, 720, 1) == 512
    assert choose_batch_size(config, 90, 1) == 90
    assert choose_batch_size(config, 91, 2) == 90
    assert count_steps(config, 720, 512) == 300
    assert count_steps(config, 512_000, 512) == 10_000
    assert count_steps(AlignConfig(num_train_epochs=1), 720, 128) == 5


def test_lines_come_at_doubling_times_and_have_the_share_of_waiting_since_the_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(alignment_trainer, "time", clock)
    callback = InputTimesCallback(epoch_at=float, shown=True)
    for step in range(1, 601):  # one second and one epoch each
        with callback.measure():
            clock.now += 0.25
        clock.now += 0.75
        state: Any = TrainerState(max_steps=600, global_step=step)
        callback.on_step_end(None, state, TrainerControl())
    line = "25% of the time waiting for input, 75% training"
    steps = (10, 20, 40, 80, 160, 320, 600)
    shown = [text for text in capsys.readouterr().err.splitlines() if text.startswith("step")]
    assert shown == [f"step {step}: {line}" for step in steps]


@pytest.mark.slow
def test_a_run_says_once_an_epoch_what_bounds_it(
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(alignment_trainer, "_SECONDS_BEFORE_FIRST_LINE", 0.0)
    monkeypatch.setattr(alignment_trainer, "_FACTOR_TO_NEXT_LINE", 0.0)
    prepared.align_stored(tmp_path / "run", max_steps=7, global_batch_size=4, refit=False)
    shown = capsys.readouterr()
    lines = [line for line in (shown.out + shown.err).splitlines() if "input" in line]
    per_epoch = len(prepared.records) // 4
    assert len(lines) == -(-7 // per_epoch)
    assert all(line.endswith(" training") for line in lines)
