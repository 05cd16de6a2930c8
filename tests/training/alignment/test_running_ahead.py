"""A device that computes while Python goes on: the branches of a GPU, taken on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import Prepared, read_losses
from host_reads import HostReads
from torch import Tensor
from transformers import TrainerCallback

from modeling_llm2clip.training import finite_steps
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite_steps, "_RUN_AHEAD", {"cpu"})


class Watch(TrainerCallback):
    """Keeps the weights after each step, and what was read in some of them."""

    def __init__(self, first: int = 0, last: int = 0) -> None:
        self.reads, self.first, self.last = HostReads(), first, last
        self.weights: list[Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.global_step == self.first:
            self.reads.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:  # noqa: ARG002
        if state.global_step == self.last:
            self.reads.__exit__(None, None, None)
        trained = [p.detach().flatten() for p in parts["model"].parameters() if p.requires_grad]
        self.weights.append(torch.cat(trained))


def test_no_step_between_two_logs_waits_for_the_device(prepared: Prepared, tmp_path: Path) -> None:
    watch = Watch(
        first=1, last=7
    )  # the steps after the log of the first and before that of the last
    prepared.align_stored(
        tmp_path / "run", callbacks=[watch], max_steps=8, logging_steps=8, global_batch_size=8,
        held_out_ratio=0, projection_init="model",
    )  # fmt: skip
    assert len(watch.weights) == 8 and watch.reads.names == []


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_bad_step_changes_no_weight_and_is_named_at_the_next_log(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging_steps: int
) -> None:
    calls = []

    def embed(self: AlignmentModel, caption_embeds: Tensor) -> Tensor:
        embeds = to_text_embeds(self, caption_embeds)
        calls.append(self.training)
        return embeds * torch.inf if calls.count(True) == 4 else embeds

    to_text_embeds = AlignmentModel.to_text_embeds
    monkeypatch.setattr(AlignmentModel, "to_text_embeds", embed)
    watch = Watch()
    with pytest.raises(FloatingPointError, match=r"The loss is nan at step 3, and 8 of the 8"):
        prepared.align(
            tmp_path / "run", callbacks=[watch], logging_steps=logging_steps, save_steps=100
        )
    after = watch.weights[2:]
    assert not torch.equal(watch.weights[1], watch.weights[2])
    assert all(torch.equal(weights, after[0]) for weights in after)
    assert len(watch.weights) - 3 <= logging_steps
    assert max(read_losses(tmp_path / "run")) <= 3


def test_a_bad_step_is_in_no_checkpoint(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: AlignmentModel, **inputs: Any) -> Any:
        loss, outputs = plain(self, **inputs)
        calls.append(self.training)
        return (loss * torch.inf if calls.count(True) == 3 else loss), outputs

    calls: list[bool] = []
    plain = AlignmentModel.forward
    monkeypatch.setattr(AlignmentModel, "forward", forward)
    with pytest.raises(FloatingPointError, match=r"The loss is inf at step"):
        prepared.align(tmp_path / "run", logging_steps=100, save_steps=2)
    folders = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    assert [folder.name for folder in folders] == ["checkpoint-2"]
