"""A device that computes while Python goes on: the branches of a GPU, taken on the CPU."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from aligning import EndAfter, Prepared, names_that_differ, read_losses
from host_reads import StepWatch
from running_ahead import run_ahead
from stores import NUM_ROWS, make_embeddings, write_store
from torch import Tensor
from transformers import Trainer, TrainerCallback

from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.training import finite_steps, trainer_mixins
from modeling_llm2clip.training.alignment import alignment_data, alignment_trainer
from modeling_llm2clip.training.alignment.alignment_data import StoredRows
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.alignment.alignment_trainer import AlignmentTrainer


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    run_ahead(monkeypatch)


@pytest.mark.slow
def test_no_step_between_two_logs_waits_for_the_device(prepared: Prepared, tmp_path: Path) -> None:
    watch = StepWatch(1, 7)  # after the log of the first step and before that of the last
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
    watch = StepWatch()
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 3, and 8 of the 8 .*groups"):
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
    def forward(self: AlignmentModel, batch: Any) -> Any:
        loss, outputs = plain(self, batch)
        calls.append(self.training)
        return (loss * torch.inf if calls.count(True) == 3 else loss), outputs

    calls: list[bool] = []
    plain = AlignmentModel.forward
    monkeypatch.setattr(AlignmentModel, "forward", forward)
    with pytest.raises(FloatingPointError, match=r"The loss is inf at step"):
        prepared.align(tmp_path / "run", logging_steps=100, save_steps=2)
    folders = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    assert [folder.name for folder in folders] == ["checkpoint-2"]


def name_rows(places: Any) -> list[tuple[str, ...]]:
    return [(f"place {place}", "en") for place in places.tolist()]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_resident_rows_are_those_of_the_store(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeds = make_embeddings().to(getattr(torch, dtype))
    embeds[20] = 0
    store = EmbeddingStore.open(write_store(tmp_path / "store", embeds, dtype=dtype))
    rows, device = np.array([3, 22, 3, 0, 17]), torch.device("cpu")
    size, free = embeds.nbytes, [0]
    monkeypatch.setattr(alignment_data, "count_free_bytes", lambda _: free[0])
    monkeypatch.setattr(alignment_data, "_BYTES_AT_ONCE", 7 * size // NUM_ROWS)  # in four parts
    stored = StoredRows(store)
    for free[0], num_reads in ((2 * size - 1, NUM_ROWS), (2 * size, NUM_ROWS - 1)):
        stored.copy_to(device, num_reads=num_reads)
        assert stored.resident is None
    stored.copy_to(device, num_reads=NUM_ROWS)
    assert stored.resident is not None and torch.equal(stored.resident, embeds)
    assert stored.resident.dtype == embeds.dtype  # which `equal` does not compare
    chosen = stored.resident.index_select(0, stored.require_checked(rows, name_rows))
    assert torch.equal(chosen.float(), store.read(rows))
    with pytest.raises(ValueError, match=r"1 of 1 embeddings .* place 1 \(en\)"):
        stored.require_checked(np.array([4, 20]), name_rows)


def test_a_row_is_checked_when_it_is_first_read(tmp_path: Path) -> None:
    embeds = make_embeddings()
    embeds[9] = 0
    stored = StoredRows(EmbeddingStore.open(write_store(tmp_path / "store", embeds)))
    for rows in ([1, 2, 3], [3, 1], [2, 4, 1, 5], [4, 4]):
        assert torch.equal(stored.read(np.array(rows), name_rows), embeds[rows])
    for _ in range(2):  # an error does not make it known
        with pytest.raises(ValueError, match=r"1 of 2 embeddings .* place 3 \(en\)"):
            stored.read(np.array([1, 6, 2, 9]), name_rows)


@pytest.mark.slow
def test_resident_stores_and_threads_change_no_bit_of_a_run(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(output: Path) -> Path:
        prepared.align_stored(
            output, max_steps=10, global_batch_size=8, logging_steps=1, held_out_ratio=0,
            projection_init="model",
        )  # fmt: skip
        return output

    with monkeypatch.context() as patch:  # each batch when it is asked for, from the files
        patch.setattr(AlignmentTrainer, "get_batch_samples", Trainer.get_batch_samples)
        in_turn = train(tmp_path / "in-turn")
    monkeypatch.setattr(alignment_data, "count_free_bytes", lambda _: 2**20)
    placed: list[StoredRows] = []
    copy = StoredRows.copy_to

    def note(rows: StoredRows, device: torch.device, *, num_reads: int) -> None:
        copy(rows, device, num_reads=num_reads)
        placed.append(rows)

    monkeypatch.setattr(StoredRows, "copy_to", note)
    ahead = train(tmp_path / "ahead")
    # Ten steps read more rows than a store has; with fewer it would stay in its files.
    assert len(placed) == 2 and all(rows.resident is not None for rows in placed)
    assert read_losses(in_turn) == read_losses(ahead)
    assert not names_that_differ(in_turn / "model", ahead / "model")


def list_checkpoints(run: Path) -> list[int]:
    return sorted(int(f.name.split("-")[1]) for f in (run / "checkpoints").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_resumed_run_is_the_one_that_was_never_stopped(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill loses the batch that a thread has prepared; checkpoints come by the clock."""
    monkeypatch.setattr(alignment_data, "count_free_bytes", lambda _: 2**20)
    monkeypatch.setattr(trainer_mixins, "_SAVE_STEPS", 2)
    monkeypatch.setattr(alignment_trainer, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    options: dict[str, Any] = {  # an epoch has three steps
        "max_steps": 5, "global_batch_size": 8, "logging_steps": 1, "held_out_ratio": 0,
        "projection_init": "model",
    }  # fmt: skip
    whole = prepared.align_stored(tmp_path / "whole", **options)
    assert list_checkpoints(whole.output) == [4, 5]  # the last two are kept
    with pytest.raises(KeyboardInterrupt):
        prepared.align_stored(tmp_path / "run", callbacks=[EndAfter(3)], **options)
    resumed = prepared.align_stored(tmp_path / "run", resume=True, **options)
    assert read_losses(resumed.output) == read_losses(whole.output)
    assert not names_that_differ(resumed.model, whole.model)


def test_a_bad_step_is_named_before_embeddings_are_scored() -> None:
    trainer = AlignmentTrainer.__new__(AlignmentTrainer)
    trainer.args = SimpleNamespace(learning_rate=0.1, world_size=1)
    trainer._finite_steps = finite_steps.FiniteSteps(torch.device("cpu"))
    facts = {"loss": torch.tensor(1.0), "broken": torch.zeros(2, dtype=torch.bool)}
    trainer._finite_steps.observe(torch.tensor(torch.inf), **facts)
    with pytest.raises(FloatingPointError, match="norm is inf at step 0"):
        trainer.embed([])


def test_token_ids_stay_on_the_cpu_where_the_model_checks_them() -> None:
    trainer = AlignmentTrainer.__new__(AlignmentTrainer)
    trainer.args = SimpleNamespace(device=torch.device("meta"))
    trainer.data = SimpleNamespace(dataset=SimpleNamespace(make_inputs=dict))
    names = ("input_ids", "attention_mask", "vision_embeds")
    found = trainer._prepare_inputs({name: torch.ones(2, 3) for name in names})
    assert [found[name].device.type for name in names] == ["cpu", "cpu", "meta"]


class Save(TrainerCallback):
    """Asks for a checkpoint after the fourth step, and keeps the steps of those that are there."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        control.should_save |= state.global_step == 4

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        assert (Path(args.output_dir) / f"checkpoint-{state.global_step}").is_dir()
        self.steps.append(state.global_step)


@pytest.mark.slow
def test_within_minutes_only_the_end_and_a_callback_that_asks_get_a_checkpoint(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_mixins, "_SAVE_STEPS", 3)
    monkeypatch.setattr(alignment_trainer, "_SECONDS_BETWEEN_CHECKPOINTS", 1e9)
    save = Save()
    prepared.align_stored(
        tmp_path / "run", max_steps=7, global_batch_size=8, held_out_ratio=0, image_noise=0,
        caption_noise=0, projection_init="model", logging_steps=100, callbacks=[save],
    )  # fmt: skip
    assert save.steps == [4, 7]


@pytest.mark.parametrize("is_end", [False, True])
def test_a_checkpoint_restarts_the_clock_of_the_next(
    is_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    now = [0]
    monkeypatch.setattr(time, "monotonic", lambda: float(now[0]))
    callback = alignment_trainer.CheckpointTimesCallback()
    callback.on_train_begin(None, None, None)
    for now[0] in (200, 301, 400, 602):
        control: Any = SimpleNamespace(should_save=True, should_training_stop=is_end)
        callback.on_step_end(None, None, control)
        if control.should_save:
            callback.on_save(None, None, control)
            saved.append(now[0])
    assert saved == ([200, 301, 400, 602] if is_end else [301, 602])
