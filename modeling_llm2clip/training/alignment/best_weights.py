"""Keep the weights with the best held-out scores, at any step or interpolated to the start.

Interpolating between initial and trained weights often beats both (WiSE-FT, arXiv:2109.01903), so
each evaluation tries several interpolations. The lowest loss wins: the loss is the training
objective, and it needs fewer images than R@1 to tell models apart. Optionally, the accuracy on
labeled images decides instead.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from ...data.atomic_files import write_atomically
from ...data.sealed_manifest import read_sealed, write_sealed
from ..run_folder import add_results, read_results
from .alignment_trainer import AlignmentTrainer
from .held_out import HeldOutImages, HeldOutScores, ZeroShotImages, fit_temperature
from .run_data import RecordData
from .sampling import draw_samples

BEST_FILE = "best.safetensors"
# Shares of the way from the start to the trained weights that are tried in addition to 1.
_SHARES = (0.25, 0.5, 0.75)
_METADATA = "held_out"
# Step, beyond any run, that seeds the captions, noise and kept texts of a measured batch.
_STEP = 2**63


def copy_trained(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def set_between(
    model: nn.Module, start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float
) -> None:
    """Interpolate the trained weights of a model between `start` and `end`, in place."""
    for name, value in end.items():
        first = start[name].to(value.device)
        model.get_parameter(name).copy_(value if share == 1 else torch.lerp(first, value, share))


def _hash_weights(weights: dict[str, Tensor]) -> str:
    return hashlib.sha256(save(weights)).hexdigest()  # `save` is deterministic


@dataclass(eq=False)
class BestWeightsCallback(TrainerCallback):
    """Evaluates on held-out images, and keeps the weights with the lowest held-out loss.

    The callback evaluates before the run, every few steps and at the end. The best weights are
    written to `best.safetensors` in the run's folder. The initial weights are also compared, so a
    run never ends with worse weights than it started from. `best_step` is 0 for the initial
    weights, and `best_share` is the share of the way from the initial weights to the weights of
    `best_step`.

    Args:
        images: The held-out images.
        output: Folder of the run.
        eval_steps: Number of steps between evaluations.
        patience: Stop after this many evaluations in a row without improvement; 0 never stops.
        patience_begin: Step before which the run never stops early.
        start: Initial weights by name, to try interpolations; None to try no interpolations.
        zero_shot: Labeled images to classify at each evaluation.
        choose_by: Keep the weights with the lowest loss, with the highest accuracy on the labeled
            images, or of the last step; see `AlignConfig`.
    """

    images: HeldOutImages
    output: Path
    _: KW_ONLY
    eval_steps: int
    patience: int
    patience_begin: int
    start: Mapping[str, Tensor] | None = None
    zero_shot: ZeroShotImages | None = None
    choose_by: str = "loss"
    trainer: AlignmentTrainer = field(init=False)

    def __post_init__(self) -> None:
        self.file = self.output / BEST_FILE
        self.before: HeldOutScores | None = None
        self.best: HeldOutScores | None = None
        self.best_step = 0
        self.best_share = 1.0
        self.has_stopped_early = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self.before is None:
            self.before = self._measure()
            self._compare(self.before, step=state.global_step, share=1.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        step = state.global_step
        if step % self.eval_steps and step < state.max_steps:
            return
        should_log = control.should_log
        self._evaluate(step=step)
        control.should_log = should_log  # logging resets it, which would lose this step's loss
        if step < state.max_steps and self._is_out_of_patience(step):
            self.has_stopped_early = True
            control.should_training_stop = control.should_log = control.should_save = True

    def read_earlier(self, state: TrainerState) -> None:
        """Read the best weights so far of a resumed run, and whether it stopped early.

        These weights are the best up to the checkpoint with this state, or better weights from a
        later step.
        """
        try:
            with safe_open(self.file, framework="pt") as file:
                entry = read_sealed(file.metadata()[_METADATA])
            if _hash_weights(load_file(self.file)) != entry["weights"]:
                raise ValueError("the SHA-256 of its weights does not match")
        except Exception as error:  # damage to the header can be any error
            raise ValueError(
                f"{self.file}, which holds the best weights so far, is missing or damaged "
                f"({error}). Restore it, or start over in another folder."
            ) from error
        self.before = HeldOutScores(**entry["before"])
        self.best = HeldOutScores(**entry["best"])
        self.best_step, self.best_share = entry["best_step"], entry["best_share"]
        step, known = state.global_step, state.best_metric
        if self.best_step <= step and known not in (None, self.best.loss):
            raise ValueError(
                f"{self.file} belongs to another run or to an earlier step of this one: its "
                f"held-out loss is {self.best.loss}, but the best up to the checkpoint of step "
                f"{step} was {known}. Restore the latest file of this run, or start over in "
                "another folder."
            )
        self.has_stopped_early = step % self.eval_steps == 0 and self._is_out_of_patience(step)

    def as_record(self) -> dict[str, Any]:
        assert self.before is not None and self.best is not None
        return {
            "before": asdict(self.before),
            "best": asdict(self.best),
            "best_step": self.best_step,
            "best_share": self.best_share,
            "chosen_by": self.choose_by,
        }

    def _is_out_of_patience(self, step: int) -> bool:
        waited = (step - max(self.best_step, self.patience_begin)) // self.eval_steps
        return 0 < self.patience <= waited and self.choose_by != "last_step"

    def _evaluate(self, *, step: int) -> None:
        """Evaluate the current weights and interpolations to the start; keep the best."""
        scores = self._measure()
        logged = {
            "held_out_loss": scores.loss,
            "held_out_t2i_r1": scores.t2i_r1,
            "held_out_i2t_r1": scores.i2t_r1,
        }
        accuracy = {} if scores.zero_shot is None else {"zero_shot": scores.zero_shot}
        self.trainer.log(logged | accuracy)
        self._compare(scores, step=step, share=1.0)
        if self.start is None:
            return
        model = self.trainer.alignment_model
        trained = copy_trained(model)
        for share in _SHARES:
            set_between(model, self.start, trained, share)
            self._compare(self._measure(), step=step, share=share)
        set_between(model, self.start, trained, 1.0)

    def _compare(self, scores: HeldOutScores, *, step: int, share: float) -> None:
        """Keep the model's current weights if they are the best so far."""
        # Writing weights that the last step replaces would only cost time.
        if self.choose_by == "last_step" and 0 < step < self.trainer.state.max_steps:
            return
        if self.best is None or self._rank(scores, step) < self._rank(self.best, self.best_step):
            self.best, self.best_step, self.best_share = scores, step, share
            state = self.trainer.collect_trained()
            if self.trainer.args.should_save:
                weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
                # A single entry, because safetensors does not write several entries in a fixed
                # order.
                entry = write_sealed({**self.as_record(), "weights": _hash_weights(weights)})
                write_atomically(self.file, save(weights, metadata={_METADATA: entry}))
        self.trainer.state.best_metric = self.best.loss  # in each checkpoint, for `read_earlier`

    def _rank(self, scores: HeldOutScores, step: int) -> tuple[float, ...]:
        """Return the sort key; the best weights minimize it."""
        if self.choose_by == "last_step":
            return (-step,)
        if self.choose_by == "loss":
            return (scores.loss,)
        assert scores.zero_shot is not None
        return (-scores.zero_shot, scores.loss)

    def _measure(self) -> HeldOutScores:
        trainer = self.trainer
        inputs = trainer.embed(self.images.iterate_batches())
        scored = self.images.score(trainer.alignment_model.loss, inputs)
        if self.zero_shot is not None:
            scored = replace(scored, zero_shot=self.zero_shot.measure(trainer.alignment_model))
        shared: list[Any] = [scored]
        # Processes on different hardware may round differently, but must all decide the same.
        broadcast_object_list(shared)
        scores: HeldOutScores = shared[0]
        if not math.isfinite(scores.loss):
            raise FloatingPointError(
                f"The held-out loss is {scores.loss} at step {trainer.state.global_step}. Lower "
                f"the learning rate ({trainer.args.learning_rate}), or check for broken embeddings."
            )
        return scores


class TrainingObjective(TrainerCallback):
    """Measures the loss of a training batch, including noise, at the temperature of lowest loss.

    The loss before and after training is written to `run.json` in the output as `objective`.

    Args:
        data: The training records.
        size: Number of items in the batch.
        output: Folder of the run.
    """

    trainer: AlignmentTrainer

    def __init__(self, data: RecordData, *, size: int, output: Path) -> None:
        seed = data.config.seed
        chosen = np.random.default_rng(seed).choice(data.items, size, replace=False)
        self._dataset, self._samples = data.dataset, draw_samples(chosen, _STEP, seed=seed)
        self._output = output

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if not state.global_step:
            self.record("before")

    def record(self, name: str) -> None:
        """Measure the loss at the current weights; all processes must call this."""
        batch = self.trainer._prepare_inputs(self._dataset.__getitems__(self._samples))
        inputs = self.trainer.embed([{**batch, **self.trainer.sample_kept(_STEP)}])
        measured = [fit_temperature(self.trainer.alignment_model.loss, inputs)[1]]
        broadcast_object_list(measured)
        if self.trainer.args.should_save:
            earlier = read_results(self._output).get("objective", {})
            add_results(self._output, objective={**earlier, name: measured[0]})
