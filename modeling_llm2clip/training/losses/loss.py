"""What a loss of the alignment is, and which there are."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass, replace
from importlib import import_module
from typing import Protocol

from torch import Tensor, nn

# Name in `AlignConfig.loss` → file of this folder and class, imported when it is used. Every class
# takes `chunk_size`: rows of the logits computed at a time, or None for all.
LOSSES = {
    "contrastive": ("contrastive", "ContrastiveLoss"),
}


@dataclass(frozen=True)
class LossInputs:
    """A batch of one process, as a loss sees it; a loss that needs more adds a field here.

    Attributes:
        image_embeds: (B, P) float32, unit length.
        text_embeds: (B, P) float32, unit length; row i belongs to row i of the images.
        logit_scale: (1,) float32, the inverse temperature.
        group_ids: (B,) int64, what each row shows; the same numbers on every process.
        text_keys: (B,) int64, hashes of the captions: rows of equal ones have the same text. None
            where all captions differ.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    logit_scale: Tensor
    group_ids: Tensor
    text_keys: Tensor | None = None


class Loss(Protocol):
    """Anything that makes a number of a batch.

    Held-out images are compared by it too, at several temperatures; every process has all of them.
    So a loss that gathers rows of other processes is a dataclass with a field `over_processes`,
    which is False then; and one with a field `chunk_size` takes chunks of them.
    """

    def __call__(self, inputs: LossInputs) -> Tensor:
        """Compute the loss of a batch."""
        ...


def load_loss(name: str, *, chunk_size: int | None = None) -> Loss:
    """Make a loss of its name."""
    if name not in LOSSES:
        raise ValueError(f"loss={name!r} must be one of {', '.join(LOSSES)}.")
    file, class_name = LOSSES[name]
    module = import_module(f".{file}", __package__)
    loss: Loss = getattr(module, class_name)(chunk_size=chunk_size)
    return loss


def identify_loss(loss: Loss) -> str:
    """Name the class of a loss, and the fields of a dataclass, for the record of a run."""
    return repr(loss) if is_dataclass(loss) else type(loss).__qualname__


def compare_within_process(loss: Loss, *, chunk_size: int) -> Loss:
    """Return a loss for many rows that every process has."""
    if not is_dataclass(loss) or isinstance(loss, type):
        return loss
    size = getattr(loss, "chunk_size", None) or chunk_size
    changes = {"over_processes": False, "chunk_size": size}
    return replace(loss, **{name: changes[name] for name in changes if hasattr(loss, name)})


def require_no_parameters(loss: Loss) -> None:
    """Refuse a loss with weights of its own, which the alignment would neither train nor save."""
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        raise ValueError(
            f"{type(loss).__name__} has parameters, which align does not train. Freeze them "
            "(requires_grad_(False)), or train with a loop of your own."
        )
