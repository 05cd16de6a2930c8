"""Trainer extensions for both training stages: precision, non-finite steps, gradients, signals."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from running_ahead import run_ahead
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import AutoConfig, AutoModel, TrainingArguments

from modeling_llm2clip.configs.config_fields import TrainingConfig
from modeling_llm2clip.scheduling.graceful_stop import StopRequest
from modeling_llm2clip.training import trainer_mixins
from modeling_llm2clip.training.finite_steps import FiniteSteps
from modeling_llm2clip.training.trainer_mixins import (
    StageTrainerMixin,
    StopCallback,
    computes_in_bfloat16,
    find_without_gradient,
    training_arguments_on,
)


@pytest.mark.parametrize(
    ("precision", "on_gpu", "has_instructions", "in_bfloat16"),
    [
        ("bfloat16", False, False, True),
        ("float32", True, True, False),
        ("auto", False, True, False),
        ("auto", True, False, False),  # a GPU that only emulates it
        ("auto", True, True, True),
    ],
)
def test_a_run_computes_in_bfloat16_on_request_or_on_a_gpu_that_supports_it(
    monkeypatch: Any, precision: str, on_gpu: bool, has_instructions: bool, in_bfloat16: bool
) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return including_emulation or has_instructions

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert computes_in_bfloat16(precision, on_gpu=on_gpu) is in_bfloat16


@pytest.mark.parametrize("kind", [TrainingArguments, SentenceTransformerTrainingArguments])
@pytest.mark.parametrize(
    ("launched", "precision", "computed"),
    [
        ("fp16", "float32", "no"), ("bf16", "float32", "no"), ("bf16", "auto", "no"),
        ("no", "bfloat16", "bf16"), ("fp16", "bfloat16", "bf16"),
    ],
)  # fmt: skip
def test_the_launcher_does_not_decide_the_precision(
    monkeypatch: Any, tmp_path: Path, kind: Any, launched: str, precision: Any, computed: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    config = TrainingConfig(precision=precision, device="cpu")
    arguments = training_arguments_on(torch.device("cpu"), kind, tmp_path, config)
    AcceleratorState._reset_state(reset_partial_state=False)
    try:
        chosen = Accelerator(mixed_precision=getattr(arguments, "mixed_precision", None), cpu=True)
        assert chosen.mixed_precision == computed
    finally:
        AcceleratorState._reset_state(reset_partial_state=False)


@pytest.mark.parametrize("family", ["opt", "biogpt", "xglm"])
def test_a_layer_with_layerdrop_counts_as_trained(family: str) -> None:
    """Without evaluation mode, nearly every pass would skip it here and give it no gradient."""
    sizes = {
        "vocab_size": 20, "hidden_size": 16, "d_model": 16, "num_hidden_layers": 2,
        "num_layers": 2, "num_attention_heads": 2, "attention_heads": 2, "intermediate_size": 32,
        "ffn_dim": 32, "word_embed_proj_dim": 16, "layerdrop": 0.999,
    }  # fmt: skip
    model = AutoModel.from_config(AutoConfig.for_model(family, **sizes))
    frozen = model.get_input_embeddings().requires_grad_(False)
    ids = torch.tensor([[3, 4, 5]])
    missing = find_without_gradient(model, lambda: model(input_ids=ids).last_hidden_state.sum())
    assert missing == []
    assert {m.layerdrop for m in model.modules() if hasattr(m, "layerdrop")} == {0.999}
    assert frozen.weight.grad is None


class _Trainer:
    """The Trainer methods that the mixin extends."""

    def __init__(self) -> None:
        self.args = SimpleNamespace(learning_rate=0.1, world_size=1)
        self.state = SimpleNamespace(global_step=7)
        self.optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)])
        self.called: list[str] = []

    def _get_grad_norm(self) -> torch.Tensor:
        return torch.tensor(torch.inf)

    def log(self, _: Any) -> None:
        self.called.append("log")

    def _evaluate(self) -> None:
        self.called.append("_evaluate")


class _Stage(StageTrainerMixin, _Trainer):
    pass


def test_a_non_finite_step_is_reported_before_anything_is_logged_or_evaluated() -> None:
    stage = _Stage()
    stage._finite_steps = FiniteSteps(torch.device("cpu"), first_step=4)
    stage._finite_steps.observe(torch.tensor(1.0))
    stage.log({})
    stage._evaluate()
    assert stage.called == ["log", "_evaluate"]
    stage._finite_steps.observe(torch.tensor(torch.nan))
    for call in (lambda: stage.log({}), stage._evaluate):
        with pytest.raises(FloatingPointError, match="norm is nan at step 5, although the loss"):
            call()
    assert stage.called == ["log", "_evaluate"]


def test_a_sharded_step_is_read_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its optimizer updates shards, which do not see `found_inf`."""
    run_ahead(monkeypatch)
    stage = _Stage()
    stage.optimizer = torch.optim.AdamW([torch.ones(1, requires_grad=True)], fused=True)
    assert stage._get_grad_norm().isinf()  # and named at the next log
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(FloatingPointError, match="norm is inf at step 7"):
        stage._get_grad_norm()


def test_the_first_step_of_a_resumed_run_is_reported_by_its_number() -> None:
    with pytest.raises(FloatingPointError, match="norm is inf at step 7"):
        _Stage()._get_grad_norm()


@pytest.mark.parametrize(("own", "other"), [(signal.SIGINT, 0), (None, signal.SIGINT)])
def test_processes_synchronize_a_signal_about_once_a_second_and_stop_at_the_same_step(
    own: signal.Signals | None, other: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [0.0]
    others = iter([[0, 7], [other, 1]])  # signal and steps a second; a third one would raise

    def reduce(numbers: torch.Tensor, op: Any) -> None:
        assert op == trainer_mixins.dist.ReduceOp.MAX
        numbers.copy_(torch.maximum(numbers, torch.tensor(next(others))))

    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(trainer_mixins.dist, "all_reduce", reduce)
    callback = StopCallback(StopRequest())
    args = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    callback.on_train_begin(args, SimpleNamespace(global_step=0), control)
    for step in range(1, 9):
        assert not control.should_training_stop
        seconds[0] += 0.5  # two steps a second here, and seven there
        callback.stop.signal = own if step > 2 else None
        callback.on_step_end(args, SimpleNamespace(global_step=step), control)
    assert control.should_training_stop and control.should_save
    assert callback.stop.signal == signal.SIGINT
