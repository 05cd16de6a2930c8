"""Stage 3, what is not finite stops the run with its place, and is in no checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aligning import SHORT_RUN, Prepared, read_losses
from transformers import Trainer

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.alignment.alignment_trainer import (
    AlignmentTrainer,
    ClampTemperatureCallback,
)
from modeling_llm2clip.training.run_folder import find_last_checkpoint


def test_stored_embeddings_that_are_not_finite_stop_the_run_with_their_names(
    prepared: Prepared, tmp_path: Path
) -> None:
    class Broken(EmbeddingStore):
        def read(self, rows: Any) -> torch.Tensor:
            embeddings = super().read(rows)
            broken = np.concatenate([self.rows_of(5), self.rows_of(5, long=True)])
            embeddings[np.isin(rows, broken)] = torch.inf
            return embeddings

    store = prepared.caption_store
    store.__class__ = Broken
    message = (
        r"1 of 8 embeddings that were read are not finite, or all zeros: those of 05\.jpg \(en\)"
    )
    with pytest.raises(ValueError, match=message):
        align(
            prepared.model, prepared.records, tmp_path / "run", AlignConfig(**SHORT_RUN),
            caption_store=store,
        )  # fmt: skip


def test_a_loss_that_is_not_finite_stops_with_its_step_and_the_number_of_pairs(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed(self: AlignmentModel, caption_embeds: torch.Tensor) -> torch.Tensor:
        embeds = to_text_embeds(self, caption_embeds)
        return torch.cat([embeds[:5], embeds[5:] * torch.inf])

    to_text_embeds = AlignmentModel.to_text_embeds
    monkeypatch.setattr(AlignmentModel, "to_text_embeds", embed)
    message = r"loss is nan at step 0, and 3 of the 8 pairs of this process have embeddings that"
    with pytest.raises(FloatingPointError, match=message):
        prepared.align(tmp_path / "run")


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_stops_before_the_step_and_is_in_no_checkpoint(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_fourth_gradient(self: AlignmentTrainer, *args: Any) -> torch.Tensor:
        loss = Trainer.training_step(self, *args)
        if self.state.global_step == 3:
            self.alignment_model.text_projection.weight.grad[0, 0] = torch.nan
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentTrainer, "training_step", break_fourth_gradient)
        with pytest.raises(FloatingPointError, match="gradient's norm is nan at step 3"):
            prepared.align(tmp_path / "run", save_steps=1)
    folders = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    assert sorted(folder.name for folder in folders) == ["checkpoint-2", "checkpoint-3"]
    prepared.align(tmp_path / "run", save_steps=1, resume=True)
    prepared.align(tmp_path / "whole")
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")


def test_weights_that_are_not_finite_are_in_no_checkpoint(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step_too_far(*_: Any, model: AlignmentModel, **__: Any) -> None:
        with torch.no_grad():
            model.text_projection.bias[0] = torch.inf

    monkeypatch.setattr(ClampTemperatureCallback, "on_optimizer_step", step_too_far)
    message = r"1 of \d+ trained weights are not finite after step 1: \['text_projection.bias'\]"
    with pytest.raises(FloatingPointError, match=message):
        prepared.align(tmp_path / "run", max_steps=1)
    assert find_last_checkpoint(tmp_path / "run") is None
