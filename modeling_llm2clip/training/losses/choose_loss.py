"""Builds a run's loss: the named loss, over several sizes of embeddings, and added terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...configs.align_config import AlignConfig
from .loss import Loss, LossInputs, load_loss
from .terms import KeptTextsLoss, SelfDistillationLoss, StructureLoss


class WeightedSum(nn.Module):
    """The sum of a loss and of weighted terms.

    Args:
        loss: The loss with the weight 1.
        terms: Weight and loss of each term, by its name.
    """

    def __init__(self, loss: Loss, terms: Mapping[str, tuple[float, nn.Module]]) -> None:
        super().__init__()
        self.loss = loss
        self.weights = {name: weight for name, (weight, _) in terms.items()}
        self.terms = nn.ModuleDict({name: term for name, (_, term) in terms.items()})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={weight}" for name, weight in self.weights.items())

    def forward(self, inputs: LossInputs) -> Tensor:
        """Compute the sum, () float32."""
        total: Tensor = self.loss(inputs)
        for name, term in self.terms.items():
            total = total + self.weights[name] * term(inputs)
        return total


def build_loss(config: AlignConfig, loss: Loss | None = None) -> Loss:
    """Build the loss that the options describe, around a given loss if there is one."""
    if loss is None:
        loss = load_loss(config.loss, chunk_size=config.loss_chunk_size)
    if config.matryoshka_dims:
        loss = MatryoshkaLoss(loss, config.matryoshka_dims)
    terms: dict[str, tuple[float, nn.Module]] = {}
    if config.distillation_weight:
        terms["self_distillation"] = (config.distillation_weight, SelfDistillationLoss())
    if config.structure_weight:
        terms["structure"] = (config.structure_weight, StructureLoss())
    if config.keep_texts is not None and config.keep_weight:
        terms["kept_texts"] = (config.keep_weight, KeptTextsLoss())
    return WeightedSum(loss, terms) if terms else loss


class MatryoshkaLoss(nn.Module):
    """Mean of a loss over all dimensions, and over the first ones alone (arXiv:2205.13147).

    The paper weights all sizes alike, too; a mean keeps the scale of the loss.

    Args:
        loss: A loss of embeddings.
        dims: Numbers of first dimensions, each below that of the embeddings.
    """

    def __init__(self, loss: Loss, dims: Sequence[int]) -> None:
        super().__init__()
        self.loss = loss
        self.dims = tuple(dims)

    def extra_repr(self) -> str:
        return f"dims={self.dims}"

    def forward(self, inputs: LossInputs) -> Tensor:
        """Compute the mean, () float32."""
        require_dims(self.dims, width=inputs.image_embeds.shape[1])
        losses = [self.loss(inputs), *(self.loss(_cut(inputs, size)) for size in self.dims)]
        return torch.stack(losses).mean()


def require_dims(dims: Sequence[int], *, width: float) -> None:
    """Refuse sizes that embeddings of a width cannot be cut to."""
    if too_wide := [size for size in dims if size >= width]:
        raise ValueError(
            f"matryoshka_dims {too_wide} must be below the model's projection_dim, {width}."
        )


def _cut(inputs: LossInputs, size: int) -> LossInputs:
    """Keep the first dimensions of the embeddings, at unit length."""
    return inputs._replace(
        image_embeds=F.normalize(inputs.image_embeds[:, :size], dim=-1),
        text_embeds=F.normalize(inputs.text_embeds[:, :size], dim=-1),
    )
