"""Losses for the alignment, their input batch, and gathering of rows from all processes.

Gathered rows pass gradients back to each process. Distributed training averages loss and gradients
over the processes, which gives exactly the result of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...heads_llm2clip import LogitRule

# Name in `AlignConfig.loss` → file in this folder and class, imported on use. Each class is an
# `nn.Module` with a `chunk_size` argument: logit rows to compute at a time, or None for all.
LOSSES = {"contrastive": ("pairs", "ContrastiveLoss"), "sigmoid": ("pairs", "SigmoidLoss")}


class LossInputs(NamedTuple):
    """One process's batch, as passed to a loss; add a field if a new loss needs more inputs.

    This class is a tuple, so FSDP can find the tensors in the model's output.

    Attributes:
        image_embeds: (B, P) float32, unit length.
        text_embeds: (B, P) float32, unit length; row i belongs to row i of the images.
        logits: Computes logits from image and text embeddings with the model's weights.
        group_ids: (B,) int64, each row's group number; a group has the same number on every
            process.
        text_keys: (B,) int64, hash of each row's caption, equal for equal captions. None if all
            captions differ.
        vision_embeds: (B, D') float32 output of the vision tower, before projection.
        caption_embeds: (B, D) float32 output of the LLM, before adapter and projection.
        teacher_embeds: (B, D') float32 output of the original vision tower, for self-distillation.
        kept_embeds: (K, P) float32, unit length: kept texts; every process has the same texts.
        kept_targets: (K, P) float32, the teacher's embeddings of the kept texts.
        is_whole: True if every process has the same rows, as in evaluation, so there is nothing to
            gather.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    logits: LogitRule
    group_ids: Tensor
    text_keys: Tensor | None = None
    vision_embeds: Tensor | None = None
    caption_embeds: Tensor | None = None
    teacher_embeds: Tensor | None = None
    kept_embeds: Tensor | None = None
    kept_targets: Tensor | None = None
    is_whole: bool = False

    @property
    def logit_scale(self) -> Tensor:
        """Inverse temperature."""
        return self.logits.scale

    def take(self, rows: slice) -> LossInputs:
        """Select rows of all tensors.

        Args:
            rows: Rows to select.
        """
        return self._change(lambda part: part[rows])

    def to(self, device: torch.device) -> LossInputs:
        """Move all tensors to a device.

        Args:
            device: Target device.
        """
        return self._change(lambda part: part.to(device))._replace(logits=self.logits.to(device))

    def at_scale(self, scale: float | Tensor) -> LossInputs:
        """Return the same batch with another inverse temperature.

        Args:
            scale: Inverse temperature; (1,) if it is a tensor.
        """
        device = self.image_embeds.device
        other = scale if isinstance(scale, Tensor) else torch.tensor([scale], device=device)
        return self._replace(logits=self.logits._replace(scale=other))

    def _change(self, function: Callable[[Tensor], Tensor]) -> LossInputs:
        return LossInputs._make(
            function(part) if isinstance(part, Tensor) else part for part in self
        )


# A loss is an `nn.Module`, whose parameters are trained with the model, or any function. It
# returns () float32. All processes call the loss at the same time, and training minimizes the mean
# of their losses.
Loss = Callable[[LossInputs], Tensor]


def load_loss(name: str, *, chunk_size: int | None = None) -> nn.Module:
    """Make a loss by its name in `LOSSES`."""
    if name not in LOSSES:
        raise ValueError(f"loss={name!r} must be one of {', '.join(LOSSES)}.")
    file, class_name = LOSSES[name]
    module = import_module(f".{file}", __package__)
    return getattr(module, class_name)(chunk_size=chunk_size)  # type: ignore[no-any-return]


def list_fitted(loss: Loss) -> dict[str, nn.Parameter]:
    """Return the parameters of a loss that are fitted together with the temperature, by name.

    Each module names its fitted parameters in its attribute `fitted_with_temperature`.
    """
    modules = loss.modules() if isinstance(loss, nn.Module) else ()
    fitted = {
        id(getattr(module, name))
        for module in modules
        for name in getattr(module, "fitted_with_temperature", ())
    }
    named = loss.named_parameters() if isinstance(loss, nn.Module) else ()
    return {name: parameter for name, parameter in named if id(parameter) in fitted}


def identify_callable(function: Any) -> str:
    """Describe a loss, or another callable, for the run record: its name, settings and parts."""
    if is_dataclass(function):
        return repr(function)
    if isinstance(function, partial):
        name, keywords = identify_callable(function.func), sorted(function.keywords.items())
        return f"partial({name}, {function.args}, {keywords})"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    settings = function.extra_repr() if isinstance(function, nn.Module) else ""
    part = getattr(function, "loss", None)
    shown = [settings, f"loss={identify_callable(part)}" if callable(part) else ""]
    return f"{name}({', '.join(filter(None, shown))})" if any(shown) else name


_ROWS_WITHOUT_GRADIENT = 512


def iterate_chunks(num_rows: int, size: int | None = None) -> Iterator[slice]:
    """Yield chunks of rows for a loss; the default is one chunk, or several without gradients."""
    size = size or (num_rows if torch.is_grad_enabled() else _ROWS_WITHOUT_GRADIENT)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def gather_rows(inputs: LossInputs, *parts: Tensor) -> tuple[list[Tensor], int]:
    """Gather the rows of all processes, (A, width), for each part of a batch, (B, width).

    Also return the index of this process's first row among the gathered rows. A single collective
    gathers all parts, so their order cannot differ between processes.
    """
    if not _is_shared(inputs):
        return list(parts), 0
    gathered = gather_with_gradient(torch.cat(parts, dim=1))
    widths = [part.shape[1] for part in parts]
    return list(gathered.split(widths, dim=1)), dist.get_rank() * len(parts[0])


def gather_ids(inputs: LossInputs, ids: Tensor) -> Tensor:
    """Gather the ids of all processes' rows, (A, columns) int64."""
    return _gather(ids) if _is_shared(inputs) else ids


def _gather(rows: Tensor) -> Tensor:
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def _is_shared(inputs: LossInputs) -> bool:
    return not inputs.is_whole and dist.is_initialized() and dist.get_world_size() > 1


class _GatherWithGradient(torch.autograd.Function):
    """Gathers the rows of all processes; backward sums all gradients of this process's rows.

    `torch.distributed.nn.functional.all_gather` computes the same gradients, but it is deprecated
    in favor of a private function that torch 2.6 lacks.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        return _gather(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        total = gradient.new_empty(ctx.num_rows, *gradient.shape[1:])
        # torch 2.13 warns about the name used in torch 2.6. With two processes, the sum has the
        # same bits as an `all_reduce` of all rows; with more processes, the order of the sum
        # depends on the backend.
        add = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        add(total, gradient)
        return total


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes in rank order, with gradients."""
    return _GatherWithGradient.apply(rows)  # type: ignore[no-any-return, no-untyped-call]
