"""Images that training never sees: which ones, and how well the model finds their captions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...evaluation.metrics.correspondence import Correspondence
from ...evaluation.metrics.ranking import rank_retrieval
from ...evaluation.metrics.scores import hits_at
from ..losses.contrastive import grouped_contrastive_loss
from .alignment_data import AlignmentDataset

_MOST_HELD_OUT = 1_000
# In small data a tenth is too few to tell two models apart, and more than a fifth is missed.
_LEAST_HELD_OUT = 20
_LARGEST_SHARE_OF_SMALL_DATA = 0.2
_ROWS_AT_A_TIME = 512
# A score is near chance unless it is above so many times chance with 95 % confidence.
_TIMES_CHANCE = 3
_NORMAL_QUANTILE = 1.96


@dataclass(frozen=True)
class HeldOutScores:
    """How well captions and images find each other among the held-out ones.

    Attributes:
        loss: contrastive loss, every pair against all others.
        text_to_image_r1, image_to_text_r1: share of queries whose first hit is right.
        chance_text_to_image_r1, chance_image_to_text_r1: what a random order would reach.
        num_images, num_texts: what was compared.
    """

    loss: float
    text_to_image_r1: float
    image_to_text_r1: float
    chance_text_to_image_r1: float
    chance_image_to_text_r1: float
    num_images: int
    num_texts: int

    @property
    def is_near_chance(self) -> bool:
        """Whether a direction is not above three times chance with 95 % confidence (Wilson)."""
        directions = (
            (self.text_to_image_r1, self.chance_text_to_image_r1),
            (self.image_to_text_r1, self.chance_image_to_text_r1),
        )
        # The texts of an image succeed and fail together, so that images alone are counted.
        return any(
            _lower_bound(score, self.num_images) <= _TIMES_CHANCE * chance
            for score, chance in directions
        )

    def as_record(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self)


def choose_held_out(
    dataset: AlignmentDataset, share: float, *, seed: int
) -> tuple[list[int], list[int]]:
    """Split a dataset by what its images show (`group_id`).

    Returns: the items to train on, and the held-out items; both in the order of the dataset.
    Raises: ValueError where so few things are shown that none can be held out.
    """
    everything = list(range(len(dataset)))
    if not share:
        return everything, []
    num_groups = len(dataset.group_names)
    least = min(_LEAST_HELD_OUT, int(num_groups * _LARGEST_SHARE_OF_SMALL_DATA))
    count = min(_MOST_HELD_OUT, max(round(share * num_groups), least))
    if count < 2:
        raise ValueError(
            f"{num_groups} different things are shown, too few to hold out two of them. Give at "
            "least ten, or hold out none with held_out_share=0 (--held-out-ratio 0): then nothing "
            "tells whether the training helped."
        )
    order = list(range(num_groups))
    random.Random(seed).shuffle(order)
    chosen = set(order[:count])
    group_ids = dataset.group_ids.tolist()
    return (
        [item for item in everything if group_ids[item] not in chosen],
        [item for item in everything if group_ids[item] in chosen],
    )


class HeldOutImages:
    """The held-out images of a run, and what measures a model on them.

    Args:
        dataset: holds them and the training images.
        items: which of its items are held out.

    All captions of an image ask where image embeddings are stored; else its first one, because
    each costs a pass of the vision tower.
    """

    def __init__(self, dataset: AlignmentDataset, items: Sequence[int]) -> None:
        self.dataset = dataset
        self.rows = [
            (item, caption)
            for item in items
            for caption in dataset.list_captions(item)[: None if dataset.image_store else 1]
        ]
        rows = [item for item, _ in self.rows]
        self.group_ids = dataset.group_ids[rows]
        # The row of each image's first caption stands for the image.
        self.image_rows = [row for row, item in enumerate(rows) if not row or rows[row - 1] != item]

    @torch.no_grad()
    def embed(
        self,
        model: nn.Module,
        device: torch.device,
        make_context: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode every pair, in evaluation mode.

        Returns: image_embeds and text_embeds, (rows, P) float32 of unit length on the CPU, and the
            inverse temperature, (1,).
        """
        was_training = model.training
        model.eval()
        images, texts, scale = [], [], torch.ones(1)
        for start in range(0, len(self.rows), _ROWS_AT_A_TIME):
            batch = self.dataset.read_pairs(self.rows[start : start + _ROWS_AT_A_TIME])
            with make_context():
                outputs = model(**{name: value.to(device) for name, value in batch.items()})
            images.append(outputs[0].float().cpu())
            texts.append(outputs[1].float().cpu())
            scale = outputs[2].float().cpu()
        model.train(was_training)
        return torch.cat(images), torch.cat(texts), scale

    def score(self, image_embeds: Tensor, text_embeds: Tensor, scale: Tensor) -> HeldOutScores:
        """Compare the embeddings of all pairs; arguments as `embed` returns them."""
        loss = grouped_contrastive_loss(
            image_embeds, text_embeds, scale, self.group_ids, chunk_size=_ROWS_AT_A_TIME
        )
        of_image = self.group_ids[self.image_rows].tolist()
        of_text = self.group_ids.tolist()
        ranking = rank_retrieval(
            image_embeds[self.image_rows],
            text_embeds,
            Correspondence.from_group_ids(of_image, of_text),
        )
        to_image, to_text = ranking.t2i, ranking.i2t
        return HeldOutScores(
            loss=float(loss),
            text_to_image_r1=float(hits_at(to_image, k=1).mean()),
            image_to_text_r1=float(hits_at(to_text, k=1).mean()),
            chance_text_to_image_r1=float(
                (to_image.num_positives / to_image.num_candidates).mean()
            ),
            chance_image_to_text_r1=float((to_text.num_positives / to_text.num_candidates).mean()),
            num_images=len(of_image),
            num_texts=len(of_text),
        )


def _lower_bound(share: float, count: int) -> float:
    """Wilson's lower bound of a share, at 95 % confidence (doi:10.1080/01621459.1927.10502953)."""
    square = _NORMAL_QUANTILE**2
    center = share + square / (2 * count)
    spread = _NORMAL_QUANTILE * (share * (1 - share) / count + square / (4 * count**2)) ** 0.5
    return float((center - spread) / (1 + square / count))
