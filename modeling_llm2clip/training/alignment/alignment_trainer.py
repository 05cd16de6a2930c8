"""Extend transformers' Trainer with our loss, parameter groups, batches and checkpoints."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..._suggestions import list_first
from ...configs.align_config import AlignConfig
from ...encoding.devices import runs_ahead
from ...encoding.precision import float32_as_tf32
from ...modeling_llm2clip import LLM2CLIPModel
from ...scheduling.processes import choose_device, require_all_processes
from ..losses.loss import LossInputs
from ..run_folder import list_trained
from ..trainer_mixins import (
    TrainedCheckpointMixin,
    count_warmup_steps,
    training_arguments_on,
)
from .alignment_model import AlignmentModel, find_learning_rates
from .held_out import embed_batches
from .kept_texts import KeptTexts
from .run_data import RunData, StreamData

_SECONDS_BEFORE_FIRST_LINE = 10.0
_FACTOR_TO_NEXT_LINE = 2.0
_SECONDS_BETWEEN_CHECKPOINTS = 300.0
OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Makes an optimizer from parameter groups, each with its `lr` and `weight_decay`."""
_ADAPTER = "text_adapter."
# Prefixes that wrappers add to parameter names.
_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|module\.|_orig_mod\.")
_MAX_DEFAULT_BATCH = 512
_DEFAULT_EPOCHS = 10
_MIN_DEFAULT_STEPS = 300
# Adam's first steps move every weight by the full learning rate, regardless of its gradient.
_MIN_WARMUP_STEPS = 20


def make_training_arguments(output: Path, config: AlignConfig) -> TrainingArguments:
    """Join the process group; make the Trainer's arguments, except for the `RunLength`."""
    arguments = training_arguments_on(
        choose_device(config.device),
        TrainingArguments,
        output,
        config,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        remove_unused_columns=False,
        label_names=[],
    )
    require_all_processes(arguments.world_size)
    return arguments


def choose_batch_size(config: AlignConfig, num_items: int | None, num_processes: int) -> int:
    """Return the global batch size; by default, the largest that the data allows, up to a limit."""
    if config.global_batch_size is not None:
        return config.global_batch_size
    largest = _MAX_DEFAULT_BATCH if num_items is None else min(_MAX_DEFAULT_BATCH, num_items)
    return max(largest // num_processes, 1) * num_processes


def count_steps(config: AlignConfig, num_items: int | None, batch_size: int) -> int:
    """Count the steps of a run; an epoch drops the last, incomplete batch."""
    if config.max_steps is not None:
        return config.max_steps
    assert num_items is not None  # a stream needs max_steps
    steps_per_epoch = num_items // batch_size
    if config.num_train_epochs is not None:
        return max(1, round(config.num_train_epochs * steps_per_epoch))
    return max(_MIN_DEFAULT_STEPS, _DEFAULT_EPOCHS * steps_per_epoch)


@dataclass(frozen=True)
class RunLength:
    """Length, batch size and learning rate of a run, which depend on its data and initial weights.

    Attributes:
        num_steps: Number of steps of the learning rate schedule.
        batch_size: Global batch size.
        learning_rate: Peak learning rate of adapter, projections and LoRAs.
        adapter_begin: Number of steps before training of the text adapter begins.
        last_step: Step after which the run ends; None for `num_steps`.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    adapter_begin: int = 0
    last_step: int | None = None

    @property
    def num_trained(self) -> int:
        return self.num_steps if self.last_step is None else self.last_step


def warm_up_then_cosine(
    num_steps: int, *, warmup_steps: float, begin: int = 0
) -> Callable[[int], float]:
    """Return a learning rate schedule: linear warmup, then cosine decay."""
    left = num_steps - begin
    # Parameters that begin late warm up within the rest of the run.
    least = _MIN_WARMUP_STEPS if 0 < warmup_steps < 1 else 1
    warmup = max(least, count_warmup_steps(min(warmup_steps, max(left - 1, 0)), left))

    def factor(step: int) -> float:
        if step < begin:
            return 0.0
        if step - begin < warmup:
            return (step - begin + 1) / warmup
        done = (step - begin - warmup) / max(1, left - warmup)
        return 0.5 * (1 + math.cos(math.pi * done))

    return factor


class AlignmentTrainer(TrainedCheckpointMixin, Trainer):
    """Trains an `AlignmentModel` after `choose_trained_parts`.

    The Trainer sees the whole run as one epoch.
    """

    _ahead: ThreadPoolExecutor
    _next_samples: Future[Any] | None

    def __init__(
        self,
        model: AlignmentModel,
        data: RunData,
        *,
        length: RunLength,
        training_arguments: TrainingArguments,
        callbacks: Sequence[TrainerCallback] = (),
        kept: KeptTexts | None = None,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        self.alignment_model = model
        self._make_optimizer = optimizer or partial(
            torch.optim.AdamW,
            betas=(0.9, data.config.beta2),
            fused=True,
        )
        self._kept = kept
        self.length = length
        training_arguments.max_steps = length.num_trained
        training_arguments.learning_rate = length.learning_rate
        training_arguments.ignore_data_skip = data.num_items is None  # a stream restores itself
        training_arguments.per_device_train_batch_size = max(
            1, length.batch_size // training_arguments.world_size
        )
        self.data = data
        self._loader = data.make_loader(
            training_arguments, batch_size=length.batch_size, num_steps=length.num_trained
        )
        self._input_times = InputTimesCallback(
            epoch_at=data.epoch_at, shown=training_arguments.should_log
        )
        self._rates = find_learning_rates(model, data.config, learning_rate=length.learning_rate)
        self._inverse_temperature = model.logit_head().detach()
        super().__init__(
            model=model,
            args=training_arguments,
            train_dataset=data.dataset,
            callbacks=[
                *([CheckpointTimesCallback()] if data.config.save_steps is None else []),
                ClampTemperatureCallback(),
                self._input_times,
                *callbacks,
            ],
        )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if isinstance(self.data, StreamData):  # other batches depend only on the step
            self.data.save(Path(output_dir))

    def create_accelerator_and_postprocess(self) -> None:
        """Create the Accelerator, and have FSDP keep scores and temperature in float32."""
        super().create_accelerator_and_postprocess()
        keep_scores_in_float32(self.accelerator, self.alignment_model)

    def get_train_dataloader(self) -> Any:
        return self._loader

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, with a thread that prepares the next batch while the device computes."""
        begin = None
        if self.args.device.type == "cuda":  # by default, the thread would use the first GPU
            begin = partial(torch.cuda.set_device, torch.cuda.current_device())
        with ThreadPoolExecutor(1, initializer=begin) as self._ahead:
            self._next_samples = None
            return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self._input_times.measure():
            get = partial(super().get_batch_samples, *args, **kwargs)
            # Workers prefetch on their own, and prefetching would move a stream's saved position.
            # An image transform would draw from the generator that this thread's layers use.
            is_idle = isinstance(self._loader, DataLoader) and not self._loader.num_workers
            transforms = self.data.dataset.image_transform is not None
            if transforms or not is_idle or not runs_ahead(self.args.device):
                return get()
            samples = get() if self._next_samples is None else self._next_samples.result()
            self._next_samples = self._ahead.submit(get)
            return samples

    def _prepare_input(self, data: Any) -> Any:
        if not isinstance(data, Tensor):
            return super()._prepare_input(data)
        # Batches are in pinned memory, so copies to the device are asynchronous.
        return data.to(self.args.device, non_blocking=runs_ahead(self.args.device))

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # The model checks token ids on the CPU, then copies them itself.
        ids = {n: value for n, value in inputs.items() if n in ("input_ids", "attention_mask")}
        others = {name: value for name, value in inputs.items() if name not in ids}
        return self.data.dataset.make_inputs({**super()._prepare_inputs(others), **ids})

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Group parameters by first step, rate, decay; only matrices decay (arXiv:2103.00020)."""
        if self.optimizer is None:
            grouped: dict[tuple[int, float, bool], list[nn.Parameter]] = {}
            for name, parameter in (model or self.alignment_model).named_parameters():
                if parameter.requires_grad:
                    name = _WRAPPERS.sub("", name)
                    begin = self.length.adapter_begin if name.startswith(_ADAPTER) else 0
                    key = (begin, -self._rates[name], parameter.ndim <= 1)
                    grouped.setdefault(key, []).append(parameter)
            groups = [
                {
                    "params": grouped[key],
                    "weight_decay": 0.0 if key[2] else self.data.config.weight_decay,
                    "lr": -key[1],
                    "begin": key[0],
                }
                for key in sorted(grouped)
            ]
            self.optimizer = self._make_optimizer(groups)
        return self.optimizer

    def create_scheduler(
        self,
        num_training_steps: int,  # noqa: ARG002
        optimizer: torch.optim.Optimizer | None = None,
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Warm up, then decay as a cosine over the planned steps, even if the run ends earlier."""
        if self.lr_scheduler is None:
            chosen = self.optimizer if optimizer is None else optimizer
            assert chosen is not None
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                chosen,
                [
                    warm_up_then_cosine(
                        self.length.num_steps,
                        warmup_steps=self.data.config.warmup_steps,
                        begin=group["begin"],
                    )
                    for group in chosen.param_groups
                ],
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def embed(self, batches: Iterable[dict[str, Tensor]]) -> LossInputs:
        """Encode batches with the current weights; see `embed_batches`."""
        self.require_finite_steps()
        model = self.model_wrapped if self.is_fsdp_enabled else self.alignment_model
        context = nullcontext if self.data.dataset.is_stored else self.compute_loss_context_manager
        return embed_batches(model, batches, self.args.device, context)

    def collect_trained(self) -> dict[str, Tensor]:
        """Collect all trained weights, unsharded, by their names during training.

        Under FSDP, all processes must call this together.
        """
        names = list_trained(self.alignment_model)
        if self.is_fsdp_enabled and self.length.num_trained:
            from torch.distributed.checkpoint.state_dict import (
                StateDictOptions,
                get_model_state_dict,
            )

            # accelerate's own options would also gather frozen towers.
            options = StateDictOptions(
                full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
            )
            state: dict[str, Any] = get_model_state_dict(self.model_wrapped, options=options)
        else:
            state = dict(self.alignment_model.named_parameters())
        return {name: value for name, value in state.items() if name in names}

    def sample_kept(self, step: int) -> dict[str, Tensor]:
        """Sample the kept texts of a step as model inputs; empty if no texts are kept."""
        return {} if self._kept is None else self._kept.sample(step)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        context = float32_as_tf32 if self.data.config.loss_precision == "tf32" else nullcontext
        with context():  # the backward pass as well, with two thirds of the products
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,  # noqa: ARG002
    ) -> Tensor | tuple[Tensor, LossInputs]:
        loss, outputs = model({**inputs, **self.sample_kept(self.state.global_step)})
        self._inverse_temperature = outputs.logits.scale.detach()
        # The sum of a unit-length row is finite.
        sums = [side.detach().sum(dim=1) for side in (outputs.image_embeds, outputs.text_embeds)]
        loss = self.watch_loss(loss, broken=~torch.stack(sums).isfinite().all(dim=0))
        return (loss, outputs) if return_outputs else loss

    def describe_step(self, step: int, facts: Mapping[str, Tensor]) -> str:
        """Describe a non-finite step, with the number of its non-finite embeddings."""
        loss, broken = facts["loss"], facts["broken"]
        if loss.isfinite():
            return super().describe_step(step, facts)
        groups = self.data.list_groups(step, broken.nonzero().flatten().numpy())
        return (
            f"The loss is {loss.item()} at step {step}, and {int(broken.sum())} of the "
            f"{len(broken)} pairs of this process have embeddings that are not finite"
            f"{f' (groups: {list_first(groups)})' if groups else ''}. Check the model "
            f"(llm2clip doctor), or lower the learning rate ({self.length.learning_rate})."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the epoch as passes over the data, because the Trainer's epoch is the whole run."""
        self.state.epoch = self.data.epoch_at(self.state.global_step)
        logs["inverse_temperature"] = float(self._inverse_temperature)
        super().log(logs, start_time)


class CheckpointTimesCallback(TrainerCallback):
    """Skips checkpoints that come too soon after the last one or after the start of the run.

    The final checkpoint and checkpoints requested by other callbacks are always saved.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if control.should_save and not control.should_training_stop:
            saves = [time.monotonic() - self._saved_at >= _SECONDS_BETWEEN_CHECKPOINTS]
            broadcast_object_list(saves)  # clocks differ, but all processes must save together
            control.should_save = saves[0]

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._saved_at = time.monotonic()


class ClampTemperatureCallback(TrainerCallback):
    """Clamps the logarithm of the inverse temperature to [0, ln 100] after each step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:  # noqa: ARG002
        parts["model"].logit_head.clamp()


class InputTimesCallback(TrainerCallback):
    """Prints the share of time spent waiting for batches, at epoch ends, at growing intervals."""

    def __init__(self, *, epoch_at: Callable[[int], float], shown: bool) -> None:
        self._epoch_at = epoch_at
        self._shown = shown
        self._epoch = 0
        self._begin = self._last = time.perf_counter()
        self._due = _SECONDS_BEFORE_FIRST_LINE
        self._waited = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Count the time spent in the block as waiting for input."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        now = time.perf_counter()
        is_last = state.global_step >= state.max_steps
        epoch = int(self._epoch_at(state.global_step))
        if not is_last and (epoch == self._epoch or now - self._begin < self._due):
            return
        share = self._waited / (now - self._last)
        if self._shown:
            tqdm.write(
                f"step {state.global_step}: {share:.0%} of the time waiting for input, "
                f"{1 - share:.0%} training",
                file=sys.stderr,
            )
        self._epoch, self._last, self._waited = epoch, now, 0.0
        self._due = _FACTOR_TO_NEXT_LINE * (now - self._begin)


def keep_scores_in_float32(accelerator: Any, model: LLM2CLIPModel) -> None:
    """Set FSDP's mixed-precision policy to compute the model in bfloat16 and scores in float32.

    By default, accelerate configures FSDP to gather the temperature in bfloat16, where values near
    50 are 0.25 apart, to cast the model's outputs to bfloat16, and to sum gradients in bfloat16.
    Autocast under DDP has none of these effects. Nothing changes without FSDP or in float32. FSDP
    version 1 is refused in any precision. Call this before anything is prepared.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version: {plugin.fsdp_version} would lose trained layers, because it wraps and "
            "renames them, and round the temperature to bfloat16. Set fsdp_version: 2 in the "
            "configuration, as in examples/accelerate/fsdp.yaml."
        )
    if plugin is None or accelerator.mixed_precision != "bf16":
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # As a separate FSDP unit, the temperature keeps its dtype.
    fully_shard(model.logit_head, mp_policy=MixedPrecisionPolicy())
