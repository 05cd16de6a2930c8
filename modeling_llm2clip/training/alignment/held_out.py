"""Hold out images from training to select the weights of a run and to stop the run early.

Labeled images show the cost of an alignment, which retrieval does not show: a vision tower aligned
with captions gets better at captions, but forgets classes that it knew (ProCLIP, arXiv:2510.18795,
table 2).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..._suggestions import counted
from ...configuration_llm2clip import LOGIT_SCALE_INIT
from ...data.key_arrays import count_distinct
from ...data.records.record_table import Array, RecordTable
from ...encoding.devices import has_float64
from ...encoding.encode import (
    TorchEncoder,
    average_prompts,
    project_stored,
)
from ...evaluation.datasets.classification_dataset import ClassificationDataset
from ...evaluation.datasets.dataset_registry import load_dataset
from ...evaluation.metrics.correspondence import Correspondence
from ...evaluation.metrics.ranking import rank_retrieval
from ...evaluation.metrics.scores import hits_at
from ...evaluation.results import hash_dataset
from ...evaluation.tasks.classification import list_prompts, rank_classes
from ...heads_llm2clip import MAX_LOG_SCALE
from ...processing_llm2clip import LLM2CLIPProcessor
from ..losses.loss import Loss, LossInputs, list_fitted
from .alignment_data import AlignmentDataset, list_pairs
from .alignment_model import AlignmentModel, skip_identity_blocks
from .sampling import rank_keys

_MAX_HELD_OUT = 1_000
# A tenth of a small dataset is too few to compare models; losing over a fifth would hurt training.
_MIN_HELD_OUT = 20
_MAX_SHARE_OF_SMALL_DATA = 0.2
_ROWS_PER_BATCH = 512
# With the widest towers, five captions each of a thousand images take a fifth of this limit.
_MOST_BYTES_KEPT = 2**29
# Enough pairs to fit a single number.
_MAX_ROWS_OF_TEMPERATURE = 1_000
_TEMPERATURE_STEPS = 12  # finds the temperature to within one percent
# The loss is convex in the inverse temperature and bias, so a few steps reach float32 precision.
_FIT_STEPS = 100
_FIT_TOLERANCE = 1e-6
# A score is near chance unless it exceeds this multiple of chance with 95 % confidence.
_TIMES_CHANCE = 3
_NORMAL_QUANTILE = 1.96


@dataclass(frozen=True)
class HeldOutScores:
    """Retrieval scores of held-out captions and images.

    Attributes:
        loss: The training loss over all held-out pairs, at the temperature of lowest loss. The
            trained temperature fits the training images; at that temperature, the loss would mostly
            measure overconfidence rather than the quality of the embeddings.
        t2i_r1: Share of texts whose top image is correct.
        i2t_r1: Share of images whose top text is correct.
        chance_t2i_r1: Expected `t2i_r1` of a random ranking.
        chance_i2t_r1: Expected `i2t_r1` of a random ranking.
        num_images: Number of images compared; an image with captions in several languages counts
            once.
        num_texts: Number of texts compared.
        num_groups: Number of groups of compared images; images of one group share their texts.
        zero_shot: Zero-shot accuracy on labeled images; None without labeled images.
    """

    loss: float
    t2i_r1: float
    i2t_r1: float
    chance_t2i_r1: float
    chance_i2t_r1: float
    num_images: int
    num_texts: int
    num_groups: int
    zero_shot: float | None = None

    @property
    def is_near_chance(self) -> bool:
        """True unless the R@1 of both directions exceeds three times chance at 95 % confidence."""
        directions = ((self.t2i_r1, self.chance_t2i_r1), (self.i2t_r1, self.chance_i2t_r1))
        return any(
            self.find_interval(score)[0] <= _TIMES_CHANCE * chance for score, chance in directions
        )

    def find_interval(self, score: float) -> tuple[float, float]:
        """Compute the 95 % confidence interval of a score.

        The images and texts of a group succeed or fail together, so the sample size is the number
        of groups.
        """
        return find_interval(score, self.num_groups)


class LossFit(NamedTuple):
    """The lowest loss of some pairs, with the temperature and loss parameters that achieve it."""

    log_scale: float | None  # logarithm of the inverse temperature; None if it was not fitted
    loss: float
    parameters: dict[str, list[float]]


def find_interval(score: float, count: int) -> tuple[float, float]:
    """Compute the 95 % Wilson interval of a proportion (doi:10.1080/01621459.1927.10502953)."""
    square = _NORMAL_QUANTILE**2
    center = score + square / (2 * count)
    spread = _NORMAL_QUANTILE * (score * (1 - score) / count + square / (4 * count**2)) ** 0.5
    return (center - spread) / (1 + square / count), (center + spread) / (1 + square / count)


def choose_held_out(records: RecordTable, ratio: float, *, seed: int) -> tuple[Array, Array]:
    """Split records by image groups; return the items to train on and the held-out items."""
    if not ratio:
        return np.arange(len(records), dtype=np.int32), np.empty(0, np.int32)
    num_groups = count_distinct(partial(records.iterate_numbers, "group_key"), len(records))
    count = count_held_out(num_groups, ratio)
    if count < 2:
        raise ValueError(
            f"The images form {counted(num_groups, 'group')}, too few to hold out two. Use at "
            "least ten groups, or set held_out_ratio=0 to train without knowing whether training "
            "helped."
        )
    require_negatives(num_groups - count, count)
    chosen = _choose_groups(records, count, seed=seed)
    is_held_out = np.concatenate(
        [np.isin(keys, chosen) for keys in records.iterate_numbers("group_key")]
    )
    to_train = np.flatnonzero(~is_held_out).astype(np.int32)
    return to_train, np.flatnonzero(is_held_out).astype(np.int32)


def require_negatives(num_trained: int, num_held_out: int) -> None:
    """Raise ValueError if fewer than two groups remain, because no image would have a negative."""
    if num_trained < 2:
        raise ValueError(
            f"{num_held_out} groups of images are held out, which leaves {max(num_trained, 0)} to "
            "train on, so no image would have a negative. Set a smaller held_out_ratio, or add "
            "images."
        )


def _choose_groups(records: RecordTable, count: int, *, seed: int) -> Array:
    """Choose the groups with the smallest random ranks, which do not depend on other groups."""
    chosen = np.empty(0, np.int64)
    for keys in records.iterate_numbers("group_key"):
        groups = np.unique(np.concatenate([chosen, keys]))
        chosen = groups[np.argsort(rank_keys(groups, seed))[:count]]
    return chosen


def count_held_out(num_groups: int, ratio: float) -> int:
    if not ratio:
        return 0
    minimum = min(_MIN_HELD_OUT, int(num_groups * _MAX_SHARE_OF_SMALL_DATA))
    return min(_MAX_HELD_OUT, max(round(ratio * num_groups), minimum))


class HeldOutImages:
    """The held-out images of a run, used to evaluate a model.

    If image embeddings are stored, all captions of an image are queries; otherwise, only the first
    caption is a query, because each pair costs a forward pass of the vision tower.
    """

    def __init__(self, dataset: AlignmentDataset, items: Sequence[int] | Array) -> None:
        self.dataset = dataset
        self.items = np.asarray(items)
        short, long = dataset.records.count_texts(self.items)
        counts = np.ones_like(short) if dataset.reads_images else short + long
        self._items, self._numbers = list_pairs(counts, self.items)
        self.group_ids = dataset.read_group_ids(self._items)
        self._text_keys = dataset.read_text_keys(self._items, self._numbers)
        # Each image is represented by one row: a first caption, in any of its languages.
        first = np.flatnonzero(self._numbers == 0)
        names = dataset.records.read_numbers("name_key", self._items[first])
        self.image_rows = np.sort(first[np.unique(names, return_index=True)[1]]).tolist()
        self._read: dict[int, dict[str, Tensor]] = {}
        self._bytes_left = _MOST_BYTES_KEPT

    @property
    def groups(self) -> str:
        """Short digest of the held-out group ids."""
        ids = np.unique(self.group_ids.numpy()).astype("<i8")
        return hashlib.sha256(ids.tobytes()).hexdigest()[:16]

    def iterate_batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield all pairs in batches of a few hundred, for `embed_batches`.

        Stored embeddings are read once and cached, up to a limit.
        """
        for start in range(0, len(self._items), _ROWS_PER_BATCH):
            rows = slice(start, start + _ROWS_PER_BATCH)
            pairs = self._read.get(start)
            if pairs is None:
                pairs = self.dataset.read_pairs(self._items[rows], self._numbers[rows])
                size = sum(part.nbytes for part in pairs.values())
                if self.dataset.is_stored and size <= self._bytes_left:
                    self._read[start], self._bytes_left = pairs, self._bytes_left - size
            group_ids, text_keys = self.group_ids[rows], self._text_keys[rows]
            yield {**pairs, "group_ids": group_ids, "text_keys": text_keys}

    def score(self, loss: Loss, inputs: LossInputs) -> HeldOutScores:
        of_image = self.group_ids[self.image_rows].tolist()
        of_text = self.group_ids.tolist()
        ranking = rank_retrieval(
            inputs.image_embeds[self.image_rows],
            inputs.text_embeds,
            Correspondence.from_group_ids(of_image, of_text),
        )
        to_image, to_text = ranking.t2i, ranking.i2t
        return HeldOutScores(
            loss=fit_temperature(loss, inputs)[1],
            t2i_r1=float(hits_at(to_image, k=1).mean()),
            i2t_r1=float(hits_at(to_text, k=1).mean()),
            chance_t2i_r1=float((to_image.num_positives / to_image.num_candidates).mean()),
            chance_i2t_r1=float((to_text.num_positives / to_text.num_candidates).mean()),
            num_images=len(of_image),
            num_texts=len(of_text),
            num_groups=len(set(of_text)),
        )


@torch.no_grad()
def embed_batches(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    make_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> LossInputs:
    """Encode the pairs of all batches in evaluation mode, with a possibly wrapped `AlignmentModel`.

    The returned tensors are on the device if it supports float64, otherwise on the CPU. Every
    process gets all pairs.
    """
    was_training = model.training
    model.eval()
    parts: list[LossInputs] = []
    float64_device = device if has_float64(device) else torch.device("cpu")
    with skip_identity_blocks(model):
        for batch in batches:
            with make_context():
                _, inputs = model({name: value.to(device) for name, value in batch.items()})
            parts.append(inputs.to(float64_device))
    model.train(was_training)
    joined: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name, value in parts[0]._asdict().items()
        if isinstance(value, Tensor)
    }
    return parts[0]._replace(**joined, is_whole=True)


@torch.no_grad()
def fit_temperature(loss: Loss, inputs: LossInputs) -> tuple[float, float]:
    """Find the temperature that minimizes the loss of pairs from `embed_batches`.

    Uses golden-section search, because the losses are convex in the inverse temperature. Return the
    logarithm of the inverse temperature, and the loss of all pairs at that temperature.
    """
    inputs = _move_to_loss(loss, inputs)
    few = inputs.take(slice(_MAX_ROWS_OF_TEMPERATURE))

    def measure_at(log_scale: float) -> float:
        return float(loss(few.at_scale(math.exp(log_scale))))

    ratio, low, high = (math.sqrt(5) - 1) / 2, 0.0, MAX_LOG_SCALE
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    losses = [measure_at(left), measure_at(right)]
    for _ in range(_TEMPERATURE_STEPS):
        if losses[0] < losses[1]:
            high, right, left = right, left, right - ratio * (right - low)
            losses = [measure_at(left), losses[0]]
        else:
            low, left, right = left, right, left + ratio * (high - left)
            losses = [losses[1], measure_at(right)]
    log_scale = left if losses[0] < losses[1] else right
    return log_scale, float(loss(inputs.at_scale(math.exp(log_scale))))


def fit_start(loss: Loss, inputs: LossInputs, *, keep_scale: bool = False) -> LossFit:
    """Fit the temperature and a copy of the loss parameters to pairs from `embed_batches`.

    Every fit starts from the same temperature, so the losses of different models are comparable.
    """
    loss = deepcopy(loss)
    fitted = list_fitted(loss)
    if fitted:
        few = _move_to_loss(loss, inputs.take(slice(_MAX_ROWS_OF_TEMPERATURE)))
        # The log scale as a share of its range; a sigmoid keeps it in bounds.
        share = torch.full_like(few.logit_scale, LOGIT_SCALE_INIT / MAX_LOG_SCALE)
        free = share.logit().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [*fitted.values(), *([] if keep_scale else [free])],
            max_iter=_FIT_STEPS,
            tolerance_grad=_FIT_TOLERANCE,
            tolerance_change=_FIT_TOLERANCE,
            line_search_fn="strong_wolfe",
        )

        def measure() -> Tensor:
            optimizer.zero_grad()
            scale = few.logit_scale if keep_scale else (MAX_LOG_SCALE * free.sigmoid()).exp()
            value = loss(few.at_scale(scale))
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(measure)
    log_scale, lowest = fit_temperature(loss, inputs)
    parameters = {name: parameter.tolist() for name, parameter in fitted.items()}
    return LossFit(None if keep_scale else log_scale, lowest, parameters)


def _move_to_loss(loss: Loss, inputs: LossInputs) -> LossInputs:
    """Move pairs to the device of the loss if it has parameters or buffers."""
    if not isinstance(loss, nn.Module):
        return inputs
    tensors = itertools.chain(loss.parameters(), loss.buffers())
    return inputs.to(next((t.device for t in tensors), inputs.image_embeds.device))


def load_labeled_images(source: str, *, option: str = "zero_shot") -> ClassificationDataset:
    """Load labeled images and their dataset's prompts."""
    dataset = load_dataset(source)
    if not isinstance(dataset, ClassificationDataset):
        raise ValueError(
            f"{option}={source}: these images have captions but no classes. Use labeled images, "
            "such as image-folder=FOLDER with a folder per class, or imagenet=FOLDER."
        )
    return dataset


class ZeroShotImages:
    """Classifies labeled images zero-shot with a model's current weights.

    If training does not change a tower, its inputs are encoded only once, with the source model.

    Args:
        dataset: The labeled images.
        source: Folder of the model that the run starts from.
        processor: Processor of the source model.
    """

    def __init__(
        self, dataset: ClassificationDataset, source: Path, processor: LLM2CLIPProcessor
    ) -> None:
        self._dataset, self._source, self._processor = dataset, source, processor
        self._labels = torch.tensor(dataset.labels)
        self._known: dict[str, Tensor] = {}

    def identify(self) -> dict[str, Any]:
        """Describe the images for the record of a run."""
        dataset = self._dataset
        return {
            "dataset": dataset.name,
            "num_images": len(dataset.labels),
            "num_classes": len(dataset.class_names),
            "digest": hash_dataset(dataset),
        }

    def measure(self, model: AlignmentModel) -> float:
        """Return the share of images whose nearest class is correct, as in `evaluate`."""
        was_training = model.training
        model.train(False)
        try:
            texts, images = (
                project_stored(model, self._find_embeds(model, modality), modality)
                for modality in ("text", "image")
            )
        finally:
            model.train(was_training)
        classes = average_prompts(
            texts, [len(self._dataset.templates)] * len(self._dataset.class_names)
        )
        device = model.device if has_float64(model.device) else None
        ranks, _ = rank_classes(images, classes, self._labels, device=device)
        return float((ranks == 1).double().mean())

    def _find_embeds(self, model: AlignmentModel, modality: str) -> Tensor:
        """Embed the prompts or images with their tower, before the projection."""
        if modality in self._known:
            return self._known[modality]
        is_trained = model.trains_text if modality == "text" else model.trains_vision
        encoder = TorchEncoder(
            model if is_trained else self._source, self._processor, device=model.device
        )
        if modality == "text":
            embeds = encoder.encode_texts(list_prompts(self._dataset), project=False)
        else:
            embeds = encoder.encode_images(list(self._dataset.images), project=False)
        if not is_trained:
            self._known[modality] = embeds
        return embeds
