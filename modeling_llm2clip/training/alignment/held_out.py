"""Images that training never sees: they choose the best weights of a run, and stop it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...data.atomic_files import write_atomically
from ...data.key_arrays import count_distinct, is_among
from ...data.records.record_table import RecordTable
from ...evaluation.metrics.correspondence import Correspondence
from ...evaluation.metrics.ranking import rank_retrieval
from ...evaluation.metrics.scores import hits_at
from ..losses.loss import Loss, LossInputs, compare_within_process
from .alignment_data import AlignmentDataset, list_pairs
from .alignment_model import AlignmentModel
from .cca_init import fit_temperature
from .sampling import Array, mix

BEST_FILE = "best.safetensors"
_METADATA = "held_out"
_MAX_HELD_OUT = 1_000
# In small data a tenth is too few to compare two models, and more than a fifth is missed.
_MIN_HELD_OUT = 20
_MAX_SHARE_OF_SMALL_DATA = 0.2
_ROWS_PER_BATCH = 512
# These many pairs determine a single number.
_MAX_ROWS_OF_TEMPERATURE = 2_000
# A score is near chance unless it is above this multiple of chance with 95 % confidence.
_TIMES_CHANCE = 3
_NORMAL_QUANTILE = 1.96


@dataclass(frozen=True)
class HeldOutScores:
    """How well held-out captions and images find each other.

    Attributes:
        loss: The loss that is trained, of every pair against all others, at the temperature where
            it is lowest. The trained temperature suits the training images; at that one, the loss
            mostly measures overconfidence, and not which embeddings are better.
        t2i_r1: Share of texts whose first image is right.
        i2t_r1: Share of images whose first text is right.
        chance_t2i_r1: Expected `t2i_r1` of a random order.
        chance_i2t_r1: Expected `i2t_r1` of a random order.
        num_images: Images that were compared, each once, whatever its languages.
        num_texts: Texts that were compared.
    """

    loss: float
    t2i_r1: float
    i2t_r1: float
    chance_t2i_r1: float
    chance_i2t_r1: float
    num_images: int
    num_texts: int

    @property
    def is_near_chance(self) -> bool:
        """Whether a direction is not above three times chance with 95 % confidence (Wilson)."""
        directions = (
            (self.t2i_r1, self.chance_t2i_r1),
            (self.i2t_r1, self.chance_i2t_r1),
        )
        # The texts of an image succeed and fail together, so that images alone are counted.
        return any(
            _lower_bound(score, self.num_images) <= _TIMES_CHANCE * chance
            for score, chance in directions
        )

    def as_record(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)


def choose_held_out(dataset: AlignmentDataset, ratio: float, *, seed: int) -> tuple[Array, Array]:
    """Split a dataset by the groups of its images.

    Args:
        dataset: The dataset.
        ratio: Share of the groups that is held out; 0 for none.
        seed: Of the choice.

    Returns:
        Items to train on, and held-out items, both in the order of the dataset.

    Raises:
        ValueError: There are too few groups to hold out two, or to train on two.
    """
    if not ratio:
        return np.arange(len(dataset), dtype=np.int32), np.empty(0, np.int32)
    records = dataset.records
    num_groups = count_distinct(partial(records.iterate_numbers, "group_key"), len(records))
    count = count_held_out(num_groups, ratio)
    if count < 2:
        raise ValueError(
            f"The images have {num_groups} groups, too few to hold out two of them. Give images "
            "of at least ten, or held_out_ratio=0 to hold out none: then nothing shows whether the "
            "training helped."
        )
    require_negatives(num_groups - count, count)
    chosen = _choose_groups(records, count, seed=seed)
    parts = [np.isin(keys, chosen) for keys in records.iterate_numbers("group_key")]
    is_held_out = np.concatenate(parts)
    to_train = np.flatnonzero(~is_held_out).astype(np.int32)
    return to_train, np.flatnonzero(is_held_out).astype(np.int32)


def require_negatives(num_trained: int, num_held_out: int) -> None:
    """Refuse to train on one group, in which no image has a negative: the loss would be 0.

    Args:
        num_trained: Groups to train on.
        num_held_out: Groups that are held out.

    Raises:
        ValueError: There are fewer than two groups to train on.
    """
    if num_trained < 2:
        raise ValueError(
            f"{num_held_out} groups of images are held out, which leaves {max(num_trained, 0)} to "
            "train on, where no image would have a negative. Set a smaller held_out_ratio, or give "
            "more images."
        )


def _choose_groups(records: RecordTable, count: int, *, seed: int) -> Array:
    """Choose groups whose hashes are smallest, so that a group's luck depends on no other group."""
    chosen = np.empty(0, np.int64)
    for keys in records.iterate_numbers("group_key"):
        groups = np.unique(np.concatenate([chosen, keys]))
        chosen = groups[np.argsort(mix(seed, groups), kind="stable")[:count]]
    return chosen


def count_shared_captions(records: RecordTable, held_out: Array) -> int:
    """Count the captions to train on that are also captions of held-out records.

    Args:
        records: All records.
        held_out: (H,) numbers of those that are held out.
    """

    def iterate_keys(table: RecordTable) -> Iterator[Array]:
        for batch in table.iterate_columns(("text_keys",)):
            yield np.asarray(batch.column(0).flatten())

    own = [np.empty(0, np.int64), *iterate_keys(records.select(held_out))]
    keys = np.concatenate(own)
    distinct = np.unique(keys)
    return sum(int(is_among(found, distinct).sum()) for found in iterate_keys(records)) - len(keys)


def count_held_out(num_groups: int, ratio: float) -> int:
    """Count the groups of images that a run holds out.

    Args:
        num_groups: Groups of all images.
        ratio: Share that is held out; 0 for none.
    """
    if not ratio:
        return 0
    minimum = min(_MIN_HELD_OUT, int(num_groups * _MAX_SHARE_OF_SMALL_DATA))
    return min(_MAX_HELD_OUT, max(round(ratio * num_groups), minimum))


class HeldOutImages:
    """The held-out images of a run, on which a model is measured.

    All captions of an image are queries where image embeddings are stored; otherwise its first
    one, because each pair costs a pass of the vision tower.

    Args:
        dataset: Holds them and the training images.
        items: Its items that are held out.
        loss: What is trained on.
    """

    def __init__(self, dataset: AlignmentDataset, items: Sequence[int] | Array, loss: Loss) -> None:
        self.dataset = dataset
        self._loss = compare_within_process(loss, chunk_size=_ROWS_PER_BATCH)
        chosen = np.asarray(items)
        short, long = dataset.records.count_texts(chosen)
        counts = short + long if dataset.image_store else np.ones_like(short)
        self._items, self._numbers = list_pairs(counts, chosen)
        self.group_ids = dataset.read_group_ids(self._items)
        self._text_keys = dataset.read_text_keys(self._items, self._numbers)
        # An image is represented by the row of its first caption, in whichever language.
        first = np.flatnonzero(self._numbers == 0)
        names = dataset.records.read_numbers("name_key", self._items[first])
        self.image_rows = np.sort(first[np.unique(names, return_index=True)[1]]).tolist()

    @property
    def groups(self) -> str:
        """Digest of the group ids: other held-out groups have another one."""
        ids = np.unique(self.group_ids.numpy()).astype("<i8")
        return hashlib.sha256(ids.tobytes()).hexdigest()[:16]

    @torch.no_grad()
    def embed(
        self,
        model: nn.Module,
        device: torch.device,
        make_context: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[Tensor, Tensor]:
        """Encode every pair, in evaluation mode.

        Args:
            model: An `AlignmentModel`, wrapped or not.
            device: Where it is.
            make_context: Makes the context of a forward pass.

        Returns:
            image_embeds and text_embeds, (rows, P) float32 of unit length on the CPU.
        """
        was_training = model.training
        model.eval()
        images, texts = [], []
        for start in range(0, len(self._items), _ROWS_PER_BATCH):
            part = slice(start, start + _ROWS_PER_BATCH)
            batch = self.dataset.read_pairs(self._items[part], self._numbers[part])
            with make_context():
                outputs = model(**{name: value.to(device) for name, value in batch.items()})
            images.append(outputs[0].float().cpu())
            texts.append(outputs[1].float().cpu())
        model.train(was_training)
        return torch.cat(images), torch.cat(texts)

    def score(self, image_embeds: Tensor, text_embeds: Tensor) -> HeldOutScores:
        """Compare the embeddings of all pairs.

        Args:
            image_embeds: As `embed` returns them.
            text_embeds: As `embed` returns them.
        """
        of_image = self.group_ids[self.image_rows].tolist()
        of_text = self.group_ids.tolist()
        ranking = rank_retrieval(
            image_embeds[self.image_rows],
            text_embeds,
            Correspondence.from_group_ids(of_image, of_text),
        )
        to_image, to_text = ranking.t2i, ranking.i2t
        return HeldOutScores(
            loss=self.fit_temperature(image_embeds, text_embeds)[1],
            t2i_r1=float(hits_at(to_image, k=1).mean()),
            i2t_r1=float(hits_at(to_text, k=1).mean()),
            chance_t2i_r1=float((to_image.num_positives / to_image.num_candidates).mean()),
            chance_i2t_r1=float((to_text.num_positives / to_text.num_candidates).mean()),
            num_images=len(of_image),
            num_texts=len(of_text),
        )

    @torch.no_grad()
    def fit_temperature(self, image_embeds: Tensor, text_embeds: Tensor) -> tuple[float, float]:
        """Find the temperature that suits the pairs best.

        Args:
            image_embeds: As `embed` returns them.
            text_embeds: As `embed` returns them.

        Returns:
            The logarithm of the inverse temperature, and the loss of all pairs at it.
        """

        def measure_at(log_scale: float, rows: slice = slice(_MAX_ROWS_OF_TEMPERATURE)) -> float:
            inputs = (
                image_embeds[rows], text_embeds[rows], torch.tensor([math.exp(log_scale)]),
                self.group_ids[rows], self._text_keys[rows],
            )  # fmt: skip
            return float(self._loss(LossInputs(*(part.to(device) for part in inputs))))

        # A loss with buffers has a device.
        module = self._loss if isinstance(self._loss, nn.Module) else nn.Module()
        device = next((buffer.device for buffer in module.buffers()), image_embeds.device)
        log_scale, loss = fit_temperature(measure_at)
        if len(image_embeds) > _MAX_ROWS_OF_TEMPERATURE:
            loss = measure_at(log_scale, slice(None))
        return log_scale, loss


def _lower_bound(ratio: float, count: int) -> float:
    """Wilson's lower bound of a ratio, at 95 % confidence (doi:10.1080/01621459.1927.10502953)."""
    square = _NORMAL_QUANTILE**2
    center = ratio + square / (2 * count)
    spread = _NORMAL_QUANTILE * (ratio * (1 - ratio) / count + square / (4 * count**2)) ** 0.5
    return float((center - spread) / (1 + square / count))


class _EvaluatedTrainer(Protocol):
    """What `BestWeightsCallback` needs of the `AlignmentTrainer`, which imports it."""

    alignment_model: AlignmentModel
    model_wrapped: nn.Module
    is_fsdp_enabled: bool
    args: TrainingArguments
    state: TrainerState

    def log(self, logs: dict[str, float]) -> None: ...

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]: ...

    def collect_trained(self) -> dict[str, Tensor]: ...


class BestWeightsCallback(TrainerCallback):
    """Evaluates on held-out images, and keeps the weights with the lowest held-out loss.

    It evaluates before the run, every few steps and at the end. The best weights are written to
    `best.safetensors` in the run's folder; those of the start count, so that a run never ends with
    worse weights than it started from.

    Args:
        images: The held-out images.
        output: Folder of the run.
        eval_steps: Steps between two evaluations.
        patience: Evaluations in a row without a lower loss after which the run stops; 0 for never.
        patience_begin: Steps before which the run never stops.

    Attributes:
        before: Scores at the start.
        best: Scores of the best weights.
        best_step: Step of the best weights.
        has_stopped_early: Whether patience ran out.
        trainer: The trainer that calls back; set by it.
    """

    def __init__(
        self,
        images: HeldOutImages,
        output: Path,
        *,
        eval_steps: int,
        patience: int,
        patience_begin: int,
    ) -> None:
        self.images = images
        self.output = output
        self.eval_steps = eval_steps
        self.patience = patience
        self.patience_begin = patience_begin
        self.before: HeldOutScores | None = None
        self.best: HeldOutScores | None = None
        self.best_step = 0
        self.has_stopped_early = False
        self.trainer: _EvaluatedTrainer | None = None

    @property
    def file(self) -> Path:
        """File of the best weights."""
        return self.output / BEST_FILE

    def on_train_begin(  # noqa: D102
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        if self.before is None:
            self._evaluate(step=state.global_step)

    def on_step_end(  # noqa: D102
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        step = state.global_step
        if step % self.eval_steps and step < state.max_steps:
            return
        should_log = control.should_log
        self._evaluate(step=step)
        control.should_log = should_log  # which logging resets; this step's loss would be lost
        if step < state.max_steps and self._is_out_of_patience(step):
            self.has_stopped_early = True
            control.should_training_stop = control.should_log = control.should_save = True

    def read_earlier(self, step: int) -> None:
        """Read what an earlier part of this run kept, and whether the run stopped early.

        Args:
            step: Of the checkpoint that the run continues from.
        """
        if not self.file.is_file():
            return
        with safe_open(self.file, framework="pt") as file:
            entry = json.loads(file.metadata()[_METADATA])
        self.before = HeldOutScores(**entry["before"])
        self.best, self.best_step = HeldOutScores(**entry["best"]), entry["best_step"]
        self.has_stopped_early = step % self.eval_steps == 0 and self._is_out_of_patience(step)

    def as_record(self) -> dict[str, Any]:
        """Return the scores of the start and of the best weights, and the step of the latter."""
        assert self.before is not None and self.best is not None
        return {
            "before": self.before.as_record(),
            "best": self.best.as_record(),
            "best_step": self.best_step,
        }

    def load_best(self) -> dict[str, Tensor]:
        """Return the best weights by their names while training, on the CPU."""
        return load_file(self.file)

    def _is_out_of_patience(self, step: int) -> bool:
        waited = (step - max(self.best_step, self.patience_begin)) // self.eval_steps
        return 0 < self.patience <= waited

    def _evaluate(self, *, step: int) -> None:
        """Measure, and keep the weights if none were better."""
        assert self.trainer is not None
        scores = self._measure(self.trainer)
        if self.before is None:
            self.before = scores
        else:
            self.trainer.log(
                {
                    "held_out_loss": scores.loss,
                    "held_out_t2i_r1": scores.t2i_r1,
                    "held_out_i2t_r1": scores.i2t_r1,
                }
            )
        if self.best is None or scores.loss < self.best.loss:
            self.best, self.best_step = scores, step
            self._keep(self.trainer)

    def _measure(self, trainer: _EvaluatedTrainer) -> HeldOutScores:
        model = trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.alignment_model
        is_stored = self.images.dataset.is_stored
        embeds = self.images.embed(
            model, trainer.args.device, nullcontext if is_stored else self._autocast
        )
        found: list[Any] = [self.images.score(*embeds)]
        # Other hardware may round differently; all processes must keep and stop alike.
        broadcast_object_list(found)
        scores: HeldOutScores = found[0]
        if not math.isfinite(scores.loss):
            raise FloatingPointError(
                f"The held-out loss is {scores.loss} at step {trainer.state.global_step}. Lower "
                f"the learning rate ({trainer.args.learning_rate}), or look for broken embeddings."
            )
        return scores

    def _autocast(self) -> AbstractContextManager[Any]:
        assert self.trainer is not None
        return self.trainer.compute_loss_context_manager()

    def _keep(self, trainer: _EvaluatedTrainer) -> None:
        state = trainer.collect_trained()
        if not trainer.args.should_save:
            return
        weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        metadata = {_METADATA: json.dumps(self.as_record())}
        write_atomically(self.file, save(weights, metadata=metadata))
