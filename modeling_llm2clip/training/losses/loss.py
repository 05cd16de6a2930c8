"""The losses of the alignment, and the batch that they get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...heads_llm2clip import LogitRule

# Name in `AlignConfig.loss` → file of this folder and class, imported when it is used. Every class
# is an `nn.Module` that takes `chunk_size`: rows of the logits computed at a time, or None for all.
LOSSES = {"contrastive": ("contrastive", "ContrastiveLoss"), "sigmoid": ("sigmoid", "SigmoidLoss")}


class LossInputs(NamedTuple):
    """A batch of one process, as a loss sees it; a loss that needs more adds a field here.

    It is a tuple, so that FSDP finds the tensors in it where the model returns it.

    Attributes:
        image_embeds: (B, P) float32, unit length.
        text_embeds: (B, P) float32, unit length; row i belongs to row i of the images.
        logits: Turns embeddings of images and texts into logits, by the model's weights.
        group_ids: (B,) int64, what each row shows; the same numbers on every process.
        text_keys: (B,) int64, hashes of the captions: rows of equal ones have the same text. None
            where all captions differ.
        vision_embeds: (B, D') float32 output of the vision tower, before projection.
        caption_embeds: (B, D) float32 output of the LLM, before adapter and projection.
        teacher_embeds: (B, D') float32 output of the vision tower as it was before the training,
            where it is trained and stays near that.
        is_whole: Whether every process has these same rows, so that none has to be gathered: the
            images that a model is measured on.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    logits: LogitRule
    group_ids: Tensor
    text_keys: Tensor | None = None
    vision_embeds: Tensor | None = None
    caption_embeds: Tensor | None = None
    teacher_embeds: Tensor | None = None
    is_whole: bool = False

    @property
    def logit_scale(self) -> Tensor:
        """The inverse temperature."""
        return self.logits.scale

    def take(self, rows: slice) -> LossInputs:
        """Take some rows.

        Args:
            rows: Which rows; their groups and embeddings stay together.
        """
        return self._change(lambda part: part[rows])

    def to(self, device: torch.device) -> LossInputs:
        """Move all tensors to a device.

        Args:
            device: Where all tensors go.
        """
        return self._change(lambda part: part.to(device))._replace(logits=self.logits.to(device))

    def at_scale(self, scale: float | Tensor) -> LossInputs:
        """Return the same batch at another inverse temperature.

        Args:
            scale: Inverse temperature, in place of that of the head; (1,) if it is a tensor.
        """
        device = self.image_embeds.device
        other = scale if isinstance(scale, Tensor) else torch.tensor([scale], device=device)
        return self._replace(logits=self.logits._replace(scale=other))

    def _change(self, function: Callable[[Tensor], Tensor]) -> LossInputs:
        return LossInputs._make(
            function(part) if isinstance(part, Tensor) else part for part in self
        )


# An `nn.Module`, whose parameters are trained with the model, or any function. It returns ()
# float32, and is called by all processes at the same time; the mean over them is trained on.
Loss = Callable[[LossInputs], Tensor]


def load_loss(name: str, *, chunk_size: int | None = None) -> nn.Module:
    """Make a loss of `LOSSES`."""
    if name not in LOSSES:
        raise ValueError(f"loss={name!r} must be one of {', '.join(LOSSES)}.")
    file, class_name = LOSSES[name]
    module = import_module(f".{file}", __package__)
    loss: nn.Module = getattr(module, class_name)(chunk_size=chunk_size)
    return loss


def list_fitted(loss: Loss) -> dict[str, nn.Parameter]:
    """List the parameters of a loss that are fitted with the temperature, by their names in it.

    A module names its own in an attribute `fitted_with_temperature`.
    """
    modules = loss.modules() if isinstance(loss, nn.Module) else ()
    fitted = {
        id(getattr(module, name))
        for module in modules
        for name in getattr(module, "fitted_with_temperature", ())
    }
    named = loss.named_parameters() if isinstance(loss, nn.Module) else ()
    return {name: parameter for name, parameter in named if id(parameter) in fitted}


def identify_loss(loss: Any) -> str:
    """Name a loss for the record of a run: its class or function, its settings and its parts."""
    if is_dataclass(loss):
        return repr(loss)
    if isinstance(loss, partial):
        return f"partial({identify_loss(loss.func)}, {loss.args}, {sorted(loss.keywords.items())})"
    name = getattr(loss, "__qualname__", type(loss).__qualname__)
    settings = loss.extra_repr() if isinstance(loss, nn.Module) else ""
    part = getattr(loss, "loss", None)
    shown = [settings, f"loss={identify_loss(part)}" if callable(part) else ""]
    return f"{name}({', '.join(filter(None, shown))})" if any(shown) else name
