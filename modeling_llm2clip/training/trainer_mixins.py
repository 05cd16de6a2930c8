"""Trainer extensions for both training stages: arguments, processes, mixins and callbacks.

List a mixin before the Trainer among the base classes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from .._suggestions import MAX_LISTED, counted, list_first
from ..attention_llm2clip import find_varlen_kernel
from ..configs.config_fields import TrainingConfig
from ..data.sources.json_files import read_json
from ..encoding.devices import multiplies_bfloat16, require_compiler
from ..scheduling.graceful_stop import StopRequest
from ..vision_llm2clip import list_towers
from .finite_steps import FiniteSteps, spread_nonfinite
from .run_folder import CHECKPOINTS, list_trained, mark_complete, require_finite_weights

Arguments = TypeVar("Arguments", bound=TrainingArguments)
Result = TypeVar("Result")

_SAVE_STEPS = 500
_WEIGHTS = "trained.safetensors"
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")  # of cuBLAS
_SECONDS_BETWEEN_UPDATES = 10.0  # in a log file, where every update stays visible
# Logged metrics to show in the progress bar, with their names and formats there.
_SHOWN = {
    "loss": ("loss", ".4g"),
    "learning_rate": ("lr", ".4g"),
    "eval_cra": ("held-out CRA", ".1%"),
    "held_out_loss": ("held-out loss", ".4g"),
    "held_out_t2i_r1": ("t2i R@1", ".1%"),
    "held_out_i2t_r1": ("i2t R@1", ".1%"),
    "zero_shot": ("zero-shot", ".1%"),
}
_OF_WHOLE_RUN = re.compile("train_loss|train_.*_per_second")


def run_once_per_machine(function: Callable[[], Result]) -> Result:
    """Call a function on one process per machine; all processes return its result or error."""
    state = PartialState()
    if state.num_processes == 1:
        return function()
    result: tuple[Any, Exception | None] = (None, None)
    if state.is_local_main_process:
        try:
            result = (function(), None)
        except Exception as error:
            result = (None, error)
    results: list[Any] = [None] * state.num_processes
    dist.all_gather_object(results, result)
    for _, raised in results:
        if raised is not None:
            raise raised
    return results[state.process_index - state.local_process_index][0]  # type: ignore[no-any-return]


def keep_to_one_gpu(arguments: TrainingArguments) -> None:
    """Make a Trainer use one GPU per process, never torch's DataParallel.

    DataParallel would multiply the batch size by the number of GPUs and compute in float32,
    regardless of the run's precision.
    """
    arguments._n_gpu = min(1, arguments.n_gpu)


@contextmanager
def deterministic_kernels(config: TrainingConfig, device: torch.device) -> Iterator[None]:
    """Use only deterministic kernels within the block if the config says so.

    Otherwise, FlashAttention's backward pass on CUDA adds gradients in varying order, so their last
    bits differ from run to run. torch's setting is global; the previous one is restored.
    """
    if not config.deterministic:
        yield
        return
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if device.type == "cuda" and workspace not in _DETERMINISTIC_WORKSPACES:
        raise ValueError(
            "deterministic=True on a GPU needs the environment variable CUBLAS_WORKSPACE_CONFIG "
            f"to be {' or '.join(_DETERMINISTIC_WORKSPACES)}, not {workspace}. Set it before the "
            "program starts: CUBLAS_WORKSPACE_CONFIG=:4096:8 llm2clip …"
        )
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)


def is_sharded() -> bool:
    """Return True if `accelerate launch` was configured for FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")  # type: ignore[no-any-return]


def refuse_fsdp_for_lora() -> None:
    """Refuse to train a LoRA under FSDP, where no process has the full matrices to merge it."""
    if is_sharded():
        raise ValueError(
            "Training a LoRA under FSDP is not supported. Use the configuration for DDP."
        )


def require_compilable(config: TrainingConfig, device: torch.device) -> None:
    """Refuse compile=True without a compiler, or under FSDP.

    FSDP changes the class of a layer, and transformers then no longer recomputes its activations.
    """
    if config.compile:
        require_compiler(device)
        if is_sharded():
            raise ValueError("compile=True is not supported under FSDP. Use the DDP configuration.")


def training_arguments_on(
    device: torch.device,
    arguments_class: type[Arguments],
    output: Path,
    config: TrainingConfig,
    **options: Any,
) -> Arguments:
    """Make a Trainer's arguments for the given device; by default, a Trainer uses the first GPU."""
    in_bfloat16 = computes_in_bfloat16(config.precision, device)
    # A launcher sets this variable, and accelerate obeys it unless the Trainer decides.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if in_bfloat16 else "no"
    arguments = arguments_class(
        use_cpu=device.type == "cpu",
        output_dir=str(output / CHECKPOINTS),
        bf16=in_bfloat16,
        save_strategy="steps",
        save_steps=config.save_steps or _SAVE_STEPS,
        ddp_find_unused_parameters=False,  # parameters without gradients are frozen or refused
        report_to=choose_reports(config.report_to),
        seed=config.seed,
        logging_nan_inf_filter=False,  # would read every loss; a non-finite loss stops the run
        **options,
    )
    state = PartialState()
    if state.num_processes == 1:
        state.device = device
        arguments.__dict__["_setup_devices"] = device  # override the cached property
        arguments._n_gpu = int(device.type != "cpu")
    keep_to_one_gpu(arguments)
    return arguments


class StageTrainerMixin:
    """Marks complete checkpoints, and stops the run at a non-finite gradient.

    With a fused optimizer on an asynchronous device, a non-finite step and all later steps change
    no weights, and the run stops before the next log, checkpoint or evaluation. Otherwise, the run
    stops immediately.

    The mean loss and speed of the whole run are not logged, because a resumed run cannot compute
    them. Checkpoints save the losses since the last log, so a resumed run includes these losses in
    its next log.
    """

    state: Any
    args: Any
    _finite_steps: FiniteSteps | None = None
    _facts: Mapping[str, Tensor] = {}
    _window: Tensor  # sum of the losses since the last log
    _restored: Mapping[str, Any] | None = None
    _globalstep_last_logged: int

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log metrics, except for whole-run averages."""
        self.require_finite_steps()
        kept = {name: value for name, value in logs.items() if not _OF_WHOLE_RUN.fullmatch(name)}
        super().log(kept, *args, **kwargs)  # type: ignore[misc]

    def watch_loss(self, loss: Tensor, **facts: Tensor) -> Tensor:
        """Make a non-finite loss stop the run, and keep tensors for its error message.

        Args:
            loss: Loss of a step, ().
            facts: Tensors that `describe_step` needs; their shapes must not change.

        Returns:
            Loss to backpropagate.
        """
        self._facts = {"loss": loss.detach(), **facts}
        return spread_nonfinite(loss)

    def require_finite_steps(self) -> None:
        """Synchronize the device; raise FloatingPointError if any step so far was not finite."""
        broken = None if self._finite_steps is None else self._finite_steps.read()
        if broken is not None:
            raise FloatingPointError(self.describe_step(*broken))

    def describe_step(self, step: int, facts: Mapping[str, Tensor]) -> str:
        """Describe a non-finite step and how to avoid it."""
        loss, remedy = facts.get("loss"), f"the learning rate ({self.args.learning_rate})"
        if loss is not None and not loss.isfinite():
            return f"The loss is {loss.item()} at step {step}. Lower {remedy}, or train in float32."
        of_process = " of this process" if self.args.world_size > 1 else ""
        return (
            f"The gradient norm is {facts['norm'].item()} at step {step}, although the loss"
            f"{of_process} is finite. Lower {remedy}, or train in float32."
        )

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self.require_finite_steps()
        return super()._evaluate(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.require_finite_steps()
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        PartialState().wait_for_everyone()  # each process writes its own random state
        if self.args.should_save:
            mark_complete(Path(self.args.output_dir).parent, self.state.global_step)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._window = tr_loss
        if self._restored is not None:
            tr_loss += self._restored["loss"]
            self._globalstep_last_logged -= self._restored["steps"]
            self._restored = None
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        steps = self.state.global_step - self._globalstep_last_logged
        text = json.dumps({"loss": float(self._window), "steps": steps})
        (Path(output_dir) / self._name_window()).write_text(text, encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self._restored = read_json(Path(checkpoint) / self._name_window())

    def _name_window(self) -> str:
        return f"window-{self.args.process_index}.json"

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[misc]
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
        if self._finite_steps is None:
            self._finite_steps = FiniteSteps(whole.device, first_step=self.state.global_step)
        self._finite_steps.observe(whole, **self._facts)
        # accelerate wraps the optimizer.
        wrapped: Any = self.optimizer  # type: ignore[attr-defined]
        optimizer = getattr(wrapped, "optimizer", wrapped)
        if is_sharded() or not self._finite_steps.attach(optimizer):
            self.require_finite_steps()
        return norm


class TrainedCheckpointMixin(StageTrainerMixin):
    """Makes a Trainer save and load only trained weights; the model folder has all other weights.

    Nothing is saved if any weight is not finite.
    """

    model: Any
    is_fsdp_enabled: bool

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # If the parameters are sharded, the Trainer passes the full state dict.
        state = dict(self.model.named_parameters()) if state_dict is None else state_dict
        kept = {name: state[name].detach().cpu().contiguous() for name in list_trained(self.model)}
        require_finite_weights(kept, step=self.state.global_step)
        save_file(kept, folder / _WEIGHTS)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        saved = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
        names = list_trained(self.model)
        if names != saved.keys():
            raise ValueError(
                f"{resume_from_checkpoint} does not match the weights trained in this run: "
                f"missing {sorted(names - saved.keys())[:MAX_LISTED]}, unexpected "
                f"{sorted(saved.keys() - names)[:MAX_LISTED]}."
            )
        self.model.load_state_dict(saved, strict=False)


class JsonLinesCallback(TrainerCallback):
    """Appends every log of a Trainer, with its step, to a file as a line of JSON.

    The last step is always logged.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, **reported: Any) -> None:  # noqa: ARG002
        if state.is_world_process_zero and reported.get("logs"):
            line = json.dumps({"step": state.global_step, **reported["logs"]})
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")


class StopCallback(TrainerCallback):
    """After a signal, finishes the step, saves a checkpoint, and stops the Trainer.

    A signal to one process stops all processes at the same step. Synchronizing stalls every rank,
    so it happens about once a second.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self._shared_at = (0, 0.0)  # step and time
        self._next = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._shared_at = (state.global_step, time.monotonic())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        number = int(self.stop.signal or 0)
        if args.world_size > 1:
            number = self._share(number, state.global_step, args.device)
        if number:
            self.stop.signal = signal.Signals(number)
            control.should_save = control.should_training_stop = True

    def _share(self, number: int, step: int, device: torch.device) -> int:
        """Return a signal that any process received; 0 if there is none or no sync is due yet."""
        if step < self._next:
            return 0
        now, (last_step, last_time) = time.monotonic(), self._shared_at
        steps_per_second = int((step - last_step) / max(now - last_time, 1e-3))
        shared = torch.tensor([number, steps_per_second], device=device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        number, num_steps = shared.tolist()
        self._shared_at, self._next = (step, now), step + max(1, num_steps)
        return number


class ProgressCallback(TrainerCallback):
    """Shows a run on one line of stderr: steps, rate, time left, and the latest metrics."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: tqdm[Any] = tqdm(disable=True)
        self._numbers: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._bar = tqdm(
            desc=self._name,
            total=state.max_steps,
            initial=state.global_step,
            unit=" steps",
            disable=not state.is_world_process_zero,
            mininterval=0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_UPDATES,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, **reported: Any) -> None:  # noqa: ARG002
        self._numbers |= describe_numbers(reported.get("logs") or {})
        self._bar.set_postfix(self._numbers, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._bar.close()


def raise_if_stopped(trainer: Trainer, output: Path, stop: StopRequest, *, of: str = "") -> None:
    """Raise StageInterrupt if a signal ended a run before its last step."""
    state = trainer.state
    if state.global_step < state.max_steps:
        stop.raise_interrupt(
            f"Stopped after step {state.global_step} of {state.max_steps}{of}; a checkpoint was "
            f"saved in {output}.",
            resume=True,
            is_main_process=trainer.args.should_save,
        )


def describe_numbers(logs: Mapping[str, Any]) -> dict[str, str]:
    """Format the metrics to show in a progress bar, with four digits or as percentages."""
    return {
        name: format(logs[key], format_of_number)
        for key, (name, format_of_number) in _SHOWN.items()
        if key in logs
    }


def show_progress(trainer: Trainer, name: str) -> None:
    """Replace a Trainer's own progress bar and printed logs with `ProgressCallback`."""
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback(name))


def choose_reports(report_to: Sequence[str] | None) -> list[str]:
    """Choose where a Trainer reports metrics; the default is tensorboard if it is installed."""
    available = get_available_reporting_integrations()
    if report_to is None:
        return [name for name in ("tensorboard",) if name in available]
    if list(report_to) in (["all"], ["none"]):
        return list(report_to)
    if unknown := [name for name in report_to if name not in available]:
        raise ValueError(
            f"report_to={' '.join(report_to)}: {', '.join(unknown)} cannot be used. Choose from "
            f"{', '.join(available)} (installed here), all and none, or install the package."
        )
    return list(report_to)


def count_warmup_steps(warmup_steps: float, num_steps: int) -> int:
    """Return the number of warmup steps until the learning rate reaches its peak.

    If `warmup_steps` is below 1, it is a share of the run's steps, rounded down.
    """
    num_warmup_steps = int(warmup_steps * num_steps if warmup_steps < 1 else warmup_steps)
    if num_warmup_steps >= num_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps:g} is too many for a run of {num_steps} steps: the "
            f"learning rate would never reach its peak. Use fewer than {num_steps} steps or a "
            "share of the run, such as 0.1, or train longer (max_steps, num_train_epochs)."
        )
    return num_warmup_steps


def recompute_activations(tower: Any) -> None:
    """Make a tower recompute activations in the backward pass, which is slower but saves memory."""
    # Newer versions of transformers use this name and warn about the old one.
    for each in list_towers(tower):
        enable = getattr(each, "activation_checkpointing_enable", None)
        (enable or each.gradient_checkpointing_enable)({"use_reentrant": False})


def add_lora(tower: nn.Module, config: Any) -> Any:
    """Add a LoRA to a tower in place; return peft's wrapper.

    peft casts the input of every LoRA layer to float32, and autocast casts it back. Under autocast,
    the layers skip the first cast, which saves a copy per layer and keeps results bit-identical.
    """
    from peft import get_peft_model  # only needed for LoRA

    adapted = get_peft_model(tower, config)
    for layer in adapted.modules():
        if hasattr(layer, "cast_input_dtype_enabled"):
            layer.register_forward_pre_hook(_cast_outside_autocast)
    return adapted


def _cast_outside_autocast(layer: Any, inputs: tuple[Tensor, ...]) -> None:
    # Set at every call, because the backward pass recomputes layers under the forward's autocast.
    layer.cast_input_dtype_enabled = not torch.is_autocast_enabled(inputs[0].device.type)


def computes_in_bfloat16(precision: str, device: torch.device) -> bool:
    """Return True if a run computes in bfloat16; trained weights stay float32.

    `auto` uses bfloat16 where the device multiplies it in hardware: elsewhere, it is several times
    slower than float32. Frozen weights stored in half precision still compute in half precision,
    unless `precision` is float32.
    """
    return multiplies_bfloat16(device) if precision == "auto" else precision == "bfloat16"


def warn_of_padding(device: torch.device, precision: str) -> None:
    """Warn if a GPU trains on padded texts, which takes much longer if their lengths vary."""
    if device.type != "cuda" or (
        find_varlen_kernel(device) is not None and computes_in_bfloat16(precision, device)
    ):
        return
    warnings.warn(
        "Texts are padded to the longest of their batch, which can take several times as long if "
        "their lengths vary. To pack them instead, install torch 2.13 or later (installed: "
        f"{torch.__version__}), and train in bfloat16 on an NVIDIA GPU of compute capability 8.0 "
        "or later.",
        stacklevel=2,
    )


def find_pooler(text_model: nn.Module) -> str | None:
    """Return a pattern for an encoder's pooler (as in BERT), where a LoRA would get no gradient."""
    has_pooler = any("pooler" in name.split(".") for name, _ in text_model.named_modules())
    return r"(.*\.)?pooler\..*" if has_pooler else None


def find_without_gradient(module: nn.Module, compute: Callable[[], Tensor]) -> list[str]:
    """List the parameters that require a gradient but get none in a backward pass.

    Some networks read the weight of a linear layer directly (`F.linear(x, self.qkv.weight)`) and
    bypass the LoRA that replaces this layer. The LoRA would be counted, saved and merged, but never
    trained.

    A zero gradient is fine: the first matrix of a new LoRA always has a zero gradient. The check
    runs in evaluation mode, because `layerdrop` skips random layers in training mode. The check
    restores the training mode and the random generators, and clears the gradients.
    """
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    was_training = module.training
    module.eval()
    with torch.random.fork_rng(devices=[*devices]), torch.enable_grad():
        compute().backward()
    module.train(was_training)
    missing = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    module.zero_grad(set_to_none=True)
    return missing


def require_gradients(without: Iterable[str], *, cause: str, remedy: str) -> None:
    """Refuse a run that would never train some of its parameters."""
    layers = list(dict.fromkeys(name.partition(".lora_")[0] for name in without))
    if layers:
        raise ValueError(
            f"{cause}: {counted(len(layers), 'layer')} would never be trained, because the network "
            f"bypasses the LoRA or ignores its output: {list_first(layers)}. {remedy}"
        )
