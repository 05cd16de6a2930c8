"""Images that training never sees: they choose the weights of a run, and stop it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...data.key_arrays import count_distinct, is_among
from ...data.records.record_table import RecordTable
from ...evaluation.metrics.correspondence import Correspondence
from ...evaluation.metrics.ranking import rank_retrieval
from ...evaluation.metrics.scores import hits_at
from ..losses.loss import Loss, LossInputs, compare_within_process
from .alignment_data import AlignmentDataset, list_pairs
from .cca_init import fit_temperature
from .sampling import Array, mix

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
        return any(
            self.find_interval(score)[0] <= _TIMES_CHANCE * chance for score, chance in directions
        )

    def find_interval(self, score: float) -> tuple[float, float]:
        """Find the 95 % confidence interval of a score.

        It is Wilson's (doi:10.1080/01621459.1927.10502953). The texts of an image succeed and fail
        together, so that images alone are counted.
        """
        square, count = _NORMAL_QUANTILE**2, self.num_images
        center = score + square / (2 * count)
        spread = _NORMAL_QUANTILE * (score * (1 - score) / count + square / (4 * count**2)) ** 0.5
        return (center - spread) / (1 + square / count), (center + spread) / (1 + square / count)

    def as_record(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)


def choose_held_out(dataset: AlignmentDataset, ratio: float, *, seed: int) -> tuple[Array, Array]:
    """Split a dataset by the groups of its images."""
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
    """Refuse to train on one group, in which no image has a negative: the loss would be 0."""
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
    """Count the captions to train on that are also captions of held-out records."""

    def iterate_keys(table: RecordTable) -> Iterator[Array]:
        for batch in table.iterate_columns(("text_keys",)):
            yield np.asarray(batch.column(0).flatten())

    own = [np.empty(0, np.int64), *iterate_keys(records.select(held_out))]
    keys = np.concatenate(own)
    distinct = np.unique(keys)
    return sum(int(is_among(found, distinct).sum()) for found in iterate_keys(records)) - len(keys)


def count_held_out(num_groups: int, ratio: float) -> int:
    """Count the groups of images that a run holds out."""
    if not ratio:
        return 0
    minimum = min(_MIN_HELD_OUT, int(num_groups * _MAX_SHARE_OF_SMALL_DATA))
    return min(_MAX_HELD_OUT, max(round(ratio * num_groups), minimum))


def prepare_loss(loss: Loss) -> Loss:
    """Return a loss that compares pairs which every process has."""
    return compare_within_process(loss, chunk_size=_ROWS_PER_BATCH)


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
        self._loss = prepare_loss(loss)
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

    def embed(
        self,
        model: nn.Module,
        device: torch.device,
        make_context: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[Tensor, Tensor]:
        """Encode every pair, in evaluation mode."""
        parts = (
            slice(start, start + _ROWS_PER_BATCH)
            for start in range(0, len(self._items), _ROWS_PER_BATCH)
        )
        batches = (self.dataset.read_pairs(self._items[p], self._numbers[p]) for p in parts)
        return embed_batches(model, batches, device, make_context)

    def score(self, image_embeds: Tensor, text_embeds: Tensor) -> HeldOutScores:
        """Compare the embeddings of all pairs."""
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

    def fit_temperature(self, image_embeds: Tensor, text_embeds: Tensor) -> tuple[float, float]:
        """Find the temperature that suits the pairs best."""
        return fit_temperature_of_pairs(
            self._loss, image_embeds, text_embeds, self.group_ids, self._text_keys
        )


@torch.no_grad()
def embed_batches(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    make_context: Callable[[], AbstractContextManager[Any]],
) -> tuple[Tensor, Tensor]:
    """Encode the pairs of some batches, in evaluation mode."""
    was_training = model.training
    model.eval()
    images, texts = [], []
    for batch in batches:
        with make_context():
            outputs = model(**{name: value.to(device) for name, value in batch.items()})
        images.append(outputs[0].float().cpu())
        texts.append(outputs[1].float().cpu())
    model.train(was_training)
    return torch.cat(images), torch.cat(texts)


@torch.no_grad()
def fit_temperature_of_pairs(
    loss: Loss, image_embeds: Tensor, text_embeds: Tensor, group_ids: Tensor, text_keys: Tensor
) -> tuple[float, float]:
    """Find the temperature that suits some pairs best."""

    def measure_at(log_scale: float, rows: slice = slice(_MAX_ROWS_OF_TEMPERATURE)) -> float:
        inputs = (
            image_embeds[rows], text_embeds[rows], torch.tensor([math.exp(log_scale)]),
            group_ids[rows], text_keys[rows],
        )  # fmt: skip
        return float(loss(LossInputs(*(part.to(device) for part in inputs))))

    # A loss with buffers has a device.
    module = loss if isinstance(loss, nn.Module) else nn.Module()
    device = next((buffer.device for buffer in module.buffers()), image_embeds.device)
    log_scale, lowest = fit_temperature(measure_at)
    if len(image_embeds) > _MAX_ROWS_OF_TEMPERATURE:
        lowest = measure_at(log_scale, slice(None))
    return log_scale, lowest
