"""Build the loss of a run: a named loss, optionally over several embedding sizes, plus terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...configs.align_config import AlignConfig
from .loss import Loss, LossInputs, load_loss
from .terms import KeptTextsLoss, SelfDistillationLoss, StructureLoss


class WeightedSum(nn.Module):
    """Sum of a loss and weighted terms.

    Args:
        loss: Loss with weight 1.
        terms: Weight and module of each term, by name.
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
    """Build the configured loss; if passed, `loss` replaces the loss that `config` names."""
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
    """Mean of a loss over full embeddings and several truncated sizes (arXiv:2205.13147).

    As in the paper, all sizes have equal weight; taking the mean preserves the scale of the loss.

    Args:
        loss: Loss to compute at each size.
        dims: Truncated sizes, each smaller than the full embedding size.
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
    """Refuse truncated sizes that are not below the embedding dimension."""
    if too_wide := [size for size in dims if size >= width]:
        raise ValueError(
            f"matryoshka_dims {too_wide} must be below the model's projection_dim, {width}."
        )


def _cut(inputs: LossInputs, size: int) -> LossInputs:
    """Truncate the embeddings to their first dimensions, at unit length."""
    return inputs._replace(
        image_embeds=F.normalize(inputs.image_embeds[:, :size], dim=-1),
        text_embeds=F.normalize(inputs.text_embeds[:, :size], dim=-1),
    )
