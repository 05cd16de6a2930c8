"""The losses of the alignment, the batch that they get, and the rows of all processes.

Gathered rows let gradients flow back to each process. The mean over the processes of a loss that is
computed so, and of its gradients, which distributed training takes, is exactly that of one process
with the whole batch.
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

# Name in `AlignConfig.loss` → file of this folder and class, imported when it is used. Every class
# is an `nn.Module` that takes `chunk_size`: rows of the logits computed at a time, or None for all.
LOSSES = {"contrastive": ("pairs", "ContrastiveLoss"), "sigmoid": ("pairs", "SigmoidLoss")}


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
        kept_embeds: (K, P) float32, unit length: texts that are kept near a teacher; the same ones
            on every process.
        kept_targets: (K, P) float32, what the teacher gives for them.
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
    kept_embeds: Tensor | None = None
    kept_targets: Tensor | None = None
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


_ROWS_WITHOUT_GRADIENT = 512


def iterate_chunks(num_rows: int, size: int | None = None) -> Iterator[slice]:
    """Yield the rows that a loss compares at a time: by default all, or some without gradients."""
    size = size or (num_rows if torch.is_grad_enabled() else _ROWS_WITHOUT_GRADIENT)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def gather_rows(inputs: LossInputs, *parts: Tensor) -> tuple[list[Tensor], int]:
    """Return each part of a batch, (B, width), with the rows of all processes, (A, width).

    Also returned is the number of this process's first row among them. All parts go in one
    collective, so that their order cannot differ between processes.
    """
    if not _is_shared(inputs):
        return list(parts), 0
    gathered = gather_with_gradient(torch.cat(parts, dim=1))
    widths = [part.shape[1] for part in parts]
    return list(gathered.split(widths, dim=1)), dist.get_rank() * len(parts[0])


def gather_ids(inputs: LossInputs, ids: Tensor) -> Tensor:
    """Return the ids of all processes' rows, (A, columns) int64."""
    return _gather(ids) if _is_shared(inputs) else ids


def _gather(rows: Tensor) -> Tensor:
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def _is_shared(inputs: LossInputs) -> bool:
    return not inputs.is_whole and dist.is_initialized() and dist.get_world_size() > 1


class _GatherWithGradient(torch.autograd.Function):
    """Forward: rows of all processes. Backward: the sum of all processes' gradients for our rows.

    `torch.distributed.nn.functional.all_gather` gives the same gradients, and is deprecated in
    favor of a private function that torch 2.6 lacks.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        return _gather(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        total = gradient.new_empty(ctx.num_rows, *gradient.shape[1:])
        # torch 2.13 warns of the name that torch 2.6 has. Two processes add up the same bits as
        # `all_reduce`, of all rows, would; with more, the order of a sum is the backend's.
        add = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        add(total, gradient)
        return total


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes in the order of their ranks, differentiably."""
    gathered: Tensor = _GatherWithGradient.apply(rows)  # type: ignore[no-untyped-call]
    return gathered
