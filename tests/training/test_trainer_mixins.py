"""Trainer extensions for both training stages: precision, non-finite steps, gradients, signals."""

from __future__ import annotations

import re
import signal
import time
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from aligning import EndAfter, Prepared
from peft.tuners.lora import LoraLayer
from running_ahead import run_ahead
from sentence_transformers import SentenceTransformerTrainingArguments
from tiny import tiny_model
from transformers import AutoConfig, AutoModel, TrainerCallback, TrainingArguments
from tuning import SHORT, tune

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.config_fields import TrainingConfig
from modeling_llm2clip.configs.finetune_config import FinetuneConfig
from modeling_llm2clip.scheduling.graceful_stop import StopRequest
from modeling_llm2clip.training import trainer_mixins
from modeling_llm2clip.training.alignment import align
from modeling_llm2clip.training.alignment.alignment_model import (
    AlignmentModel,
    choose_trained_parts,
)
from modeling_llm2clip.training.finetuning import finetune_llm
from modeling_llm2clip.training.finetuning.finetune_trainer import CaptionEncoder, make_lora_config
from modeling_llm2clip.training.finite_steps import FiniteSteps
from modeling_llm2clip.training.trainer_mixins import (
    StageTrainerMixin,
    StopCallback,
    computes_in_bfloat16,
    deterministic_kernels,
    find_without_gradient,
    recompute_activations,
    training_arguments_on,
    warn_of_padding,
)


@pytest.mark.parametrize(
    ("precision", "has_instructions", "in_bfloat16"),
    [
        ("bfloat16", False, True),
        ("float32", True, False),
        ("auto", False, False),
        ("auto", True, True),
    ],
)
def test_a_run_computes_in_bfloat16_on_request_or_on_a_device_that_multiplies_it(
    monkeypatch: Any, precision: str, has_instructions: bool, in_bfloat16: bool
) -> None:
    monkeypatch.setattr(trainer_mixins, "multiplies_bfloat16", lambda _: has_instructions)
    assert computes_in_bfloat16(precision, torch.device("cpu")) is in_bfloat16


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


class _SeesKernels(TrainerCallback):
    """Notes at each step whether only deterministic kernels may run."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(torch.are_deterministic_algorithms_enabled())


@pytest.mark.parametrize("deterministic", [False, True])
def test_both_stages_use_deterministic_kernels_if_asked_and_restore_the_programs_setting(
    deterministic: bool, prepared: Prepared, tmp_path: Path
) -> None:
    sees = _SeesKernels()
    options = {"max_steps": 1, "warmup_steps": 0, "deterministic": deterministic}
    tune(tmp_path / "tuned", replace(SHORT, **options), callbacks=[sees])
    prepared.align(tmp_path / "aligned", vision_training="full", callbacks=[sees], **options)
    with pytest.raises(KeyboardInterrupt):
        prepared.align(tmp_path / "killed", callbacks=[sees, EndAfter(1)], **options)
    assert sees.seen == 3 * [deterministic]
    assert not torch.are_deterministic_algorithms_enabled()
    config = TrainingConfig(deterministic=deterministic)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_kernels(config, torch.device("cpu")):
            assert torch.is_deterministic_algorithms_warn_only_enabled() is not deterministic
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("workspace", [None, ":0:0", ":16:8"])
def test_deterministic_kernels_on_a_gpu_need_a_workspace_of_cublas_that_is(
    monkeypatch: pytest.MonkeyPatch, workspace: str | None
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if workspace is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    with ExitStack() as stack:
        if workspace != ":16:8":
            message = f"to be :4096:8 or :16:8, not {workspace}. Set it before the program starts"
            stack.enter_context(pytest.raises(ValueError, match=re.escape(message)))
        context = deterministic_kernels(TrainingConfig(deterministic=True), torch.device("cuda"))
        with context:
            assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("device", "packs", "precision", "warns"),
    [
        ("cuda", False, "bfloat16", True),  # an older torch or GPU
        ("cuda", True, "float32", True),
        ("cuda", True, "bfloat16", False),
        ("cpu", False, "float32", False),  # packs in its own way
    ],
)
def test_a_gpu_that_pads_texts_says_what_packing_needs(
    monkeypatch: pytest.MonkeyPatch, device: str, packs: bool, precision: str, warns: bool
) -> None:
    monkeypatch.setattr(trainer_mixins, "find_varlen_kernel", lambda _: packs or None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_padding(torch.device(device), precision)
    assert len(caught) == warns
    for warning in caught:
        assert "install torch 2.13 or later" in str(warning.message)


def test_each_stage_that_runs_the_llm_warns_of_padding_at_its_start(
    monkeypatch: pytest.MonkeyPatch, prepared: Prepared, tmp_path: Path
) -> None:
    called: list[Any] = []
    for stage in (finetune_llm, align):
        monkeypatch.setattr(stage, "warn_of_padding", lambda *given: called.append(given))
    tune(tmp_path / "tuned", replace(SHORT, max_steps=1, warmup_steps=0))
    prepared.align(tmp_path / "stored", max_steps=1)
    prepared.align(tmp_path / "online", max_steps=1, text_training="frozen-online")
    assert called == [(torch.device("cpu"), precision) for precision in ("float32", "auto")]


def _attach_lora(stage: str, dtype: torch.dtype, *, recomputes: bool) -> Any:
    """Add a stage's LoRA to a tower with random weights, both matrices included."""
    model, processor = tiny_model()
    if stage == "finetune-llm":
        model.text_model.to(dtype)
        CaptionEncoder(model, processor, make_lora_config(FinetuneConfig(lora_rank=4)))
        tower = model.text_model
    else:
        aligned = AlignmentModel(model.config, with_llm=True)
        part = stage.removeprefix("align ")
        tower = getattr(aligned, f"{part}_model").to(dtype)
        choose_trained_parts(aligned, AlignConfig(**{f"{part}_training": "lora"}))
    torch.manual_seed(0)
    for name, parameter in tower.named_parameters():
        if "lora_B" in name:  # starts at zero, which would leave lora_A without a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    if recomputes:
        recompute_activations(tower)
    return tower.train()


def _train_once(tower: Any, given: torch.Tensor, *, autocast: bool) -> tuple[list[Any], int]:
    """Return a tower's output and all gradients, and the bytes that its forward pass keeps."""
    tower.zero_grad(set_to_none=True)
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    given = given.clone().requires_grad_()
    name = "inputs_embeds" if given.ndim == 3 else "pixel_values"
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = tower(**{name: given}).last_hidden_state
    output.float().square().sum().backward()
    gradients = [p.grad for n, p in tower.named_parameters() if "lora_" in n]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    own = {p.untyped_storage().data_ptr() for p in tower.parameters()}
    num_bytes = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    return [output, given.grad, *gradients], num_bytes


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", ["finetune-llm", "align text", "align vision"])
def test_a_lora_under_autocast_keeps_no_copies_of_its_inputs_and_computes_the_same_bits(
    stage: str, dtype: torch.dtype, recomputes: bool
) -> None:
    tower = _attach_lora(stage, dtype, recomputes=recomputes)
    shape = (2, 3, 32, 32) if stage == "align vision" else (2, 7, 32)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, kept = _train_once(tower, given, autocast=True)
    outside, _ = _train_once(tower, given, autocast=False)
    for layer in tower.modules():
        if isinstance(layer, LoraLayer):
            layer._forward_pre_hooks.clear()
            layer.cast_input_dtype_enabled = True  # as peft leaves it
    for autocast, ours in ((True, found), (False, outside)):
        theirs, kept_by_peft = _train_once(tower, given, autocast=autocast)
        assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in theirs]
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        if autocast and not recomputes:  # else only the layers' inputs are kept
            assert kept < kept_by_peft


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
