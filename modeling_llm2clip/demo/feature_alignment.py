"""Aligns adapter and projections on stored embeddings, with both towers frozen.

The smallest form of the paper's cross-modal stage: neither tower is run, so a step costs
milliseconds. Memory holds all embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..modeling_llm2clip import LLM2CLIPModel
from ..training.alignment.alignment_trainer import warm_up_then_cosine
from ..training.alignment.trained_parts import split_by_decay
from ..training.losses.contrastive import ContrastiveLoss
from ..training.losses.loss import LossInputs

_Caption = TypeVar("_Caption")


@dataclass(frozen=True)
class AlignmentPairs:
    """Which stored embeddings belong together.

    Attributes:
        caption_embeds: (T, D) float32, from `encode_texts`.
        vision_embeds: (V, D') float32, from `encode_images`.
        captions_of_image: for each image, the rows of its captions; one is drawn per step.
        group_ids: for each image, what it shows.
    """

    caption_embeds: Tensor
    vision_embeds: Tensor
    captions_of_image: Sequence[Sequence[int]]
    group_ids: Sequence[str]

    def __post_init__(self) -> None:
        counts = {len(self.vision_embeds), len(self.captions_of_image), len(self.group_ids)}
        if len(counts) != 1 or not len(self.group_ids):
            raise ValueError(
                f"vision_embeds ({len(self.vision_embeds)}), captions_of_image "
                f"({len(self.captions_of_image)}) and group ids ({len(self.group_ids)}) must be "
                "equally many, and at least one."
            )
        bad = [i for i, rows in enumerate(self.captions_of_image) if not rows]
        if bad:
            raise ValueError(f"{len(bad)} images have no caption; the first is number {bad[0]}.")

    def pair_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return every caption beside its image: (N, D), (N, D') float32, and groups, (N,)."""
        images = [i for i, rows in enumerate(self.captions_of_image) for _ in rows]
        captions = [row for rows in self.captions_of_image for row in rows]
        return (
            self.caption_embeds[captions],
            self.vision_embeds[images],
            self.number_groups()[images],
        )

    def number_groups(self) -> Tensor:
        """(V,) int64, equal for images of one group."""
        numbers = {
            group_id: number for number, group_id in enumerate(dict.fromkeys(self.group_ids))
        }
        return torch.tensor([numbers[group_id] for group_id in self.group_ids])


@dataclass(frozen=True)
class AlignmentArguments:
    """Settings of the alignment.

    Attributes:
        steps, batch_size: how many draws of how many images; where there are fewer, each draw is
            all of them.
        lr: peak learning rate, after a tenth of the steps; falls as a cosine.
        feature_dropout: share of the caption embedding's elements left out at each step.
        feature_noise: standard deviation of the noise on unit-length image embeddings, times
            one over the square root of their width.
    """

    steps: int = 300
    batch_size: int = 512
    lr: float = 1e-3
    weight_decay: float = 0.1
    feature_dropout: float = 0.0
    feature_noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        errors = [
            f"{name}={getattr(self, name)}, wanted at least {least}"
            for name, least in (("steps", 1), ("batch_size", 2))
            if getattr(self, name) < least
        ]
        errors += [
            f"{name}={getattr(self, name)}, wanted a finite number"
            for name in ("lr", "weight_decay", "feature_dropout", "feature_noise")
            if not math.isfinite(getattr(self, name))
        ]
        if self.lr <= 0:
            errors.append(f"lr={self.lr}, wanted more than 0")
        errors += [
            f"{name}={getattr(self, name)}, wanted 0 or more"
            for name in ("weight_decay", "feature_dropout", "feature_noise")
            if getattr(self, name) < 0
        ]
        if self.feature_dropout >= 1:
            errors.append(f"feature_dropout={self.feature_dropout}, wanted less than 1")
        if errors:
            raise ValueError("; ".join(errors) + ".")


def align_features(
    model: LLM2CLIPModel,
    pairs: AlignmentPairs,
    arguments: AlignmentArguments,
    *,
    show_progress: bool = False,
) -> list[float]:
    """Train adapter, both projections and the temperature in place; the towers stay as they are.

    Returns: the loss of every step.
    Raises: FloatingPointError where a loss, a gradient or a weight is not finite; see `descend`.
    """
    head = [model.text_adapter, model.text_projection, model.visual_projection, model.logit_scale]
    parameters = [p for module in head for p in module.parameters()]
    group_ids = pairs.number_groups()
    generator = torch.Generator().manual_seed(arguments.seed)
    draws = sample_batches(
        pairs.captions_of_image,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        generator=generator,
    )
    losses = (
        _compute_loss(model, pairs, images, torch.tensor(captions), group_ids, arguments, generator)
        for images, captions in draws
    )
    return descend(
        losses,
        parameters,
        steps=arguments.steps,
        lr=arguments.lr,
        weight_decay=arguments.weight_decay,
        show_progress=show_progress,
    )


def _compute_loss(
    model: LLM2CLIPModel,
    pairs: AlignmentPairs,
    images: Tensor,
    captions: Tensor,
    group_ids: Tensor,
    arguments: AlignmentArguments,
    generator: torch.Generator,
) -> Tensor:
    device = model.text_projection.weight.device
    vision_embeds = pairs.vision_embeds[images]
    if arguments.feature_noise:
        noise = torch.randn(vision_embeds.shape, generator=generator)
        scale = vision_embeds.norm(dim=-1, keepdim=True) * vision_embeds.shape[1] ** -0.5
        vision_embeds = vision_embeds + arguments.feature_noise * scale * noise
    caption_embeds = pairs.caption_embeds[captions]
    if arguments.feature_dropout:
        kept = torch.rand(caption_embeds.shape, generator=generator) >= arguments.feature_dropout
        caption_embeds = caption_embeds * kept / (1 - arguments.feature_dropout)
    image_embeds = F.normalize(model.project_vision_embeds(vision_embeds.to(device)), dim=-1)
    text_embeds = F.normalize(model.project_caption_embeds(caption_embeds.to(device)), dim=-1)
    inputs = LossInputs(
        image_embeds, text_embeds, model.logit_scale(), group_ids[images].to(device)
    )
    return ContrastiveLoss()(inputs)


def sample_batches(
    captions_of_image: Sequence[Sequence[_Caption]],
    *,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, list[_Caption]]]:
    """Yield rows of images, (B,), each image once an epoch, and one of its captions each."""
    order = torch.empty(0, dtype=torch.long)
    size = min(batch_size, len(captions_of_image))
    for _ in range(steps):
        if len(order) < size:
            new = torch.randperm(len(captions_of_image), generator=generator)
            order = torch.cat([order, new])
        images, order = order[:size], order[size:]
        draws = torch.rand(size, generator=generator)
        theirs = [captions_of_image[image] for image in images.tolist()]
        yield (
            images,
            [
                captions[int(draw * len(captions))]
                for captions, draw in zip(theirs, draws, strict=True)
            ],
        )


def descend(
    losses: Iterable[Tensor],
    parameters: Sequence[nn.Parameter],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    show_progress: bool = False,
) -> list[float]:
    """Take a step of AdamW down each loss, in memory and without checkpoints.

    Args:
        losses: () each, as many as `steps`; the next is asked for when the step before is done.
        lr: peak learning rate; see `warm_up_then_cosine`.
    Returns: the loss of every step.
    Raises: FloatingPointError at the first loss or gradient that is not finite, before its step,
        and when a weight is not finite at the end; naming the step.
    """
    optimizer = torch.optim.AdamW(
        split_by_decay(parameters, weight_decay), lr=lr, betas=(0.9, 0.98)
    )
    factor = warm_up_then_cosine(steps, warmup_steps=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    done: list[float] = []
    progress = tqdm(total=steps, unit=" steps", disable=not show_progress)
    for loss in losses:
        if not loss.isfinite():
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {len(done)}. Lower the learning rate ({lr}), "
                "or look for broken embeddings."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not norm.isfinite():
            raise FloatingPointError(
                f"The gradient's norm is {norm.item()} at step {len(done)}, although the loss is "
                f"finite. Lower the learning rate ({lr})."
            )
        optimizer.step()
        schedule.step()
        done.append(loss.item())
        progress.update()
        progress.set_postfix(loss=f"{done[-1]:.4g}", refresh=False)
    progress.close()
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise FloatingPointError(
            f"A weight is not finite after step {len(done)}. Lower the learning rate ({lr})."
        )
    return done
