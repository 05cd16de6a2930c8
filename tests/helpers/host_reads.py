"""Counts the numbers that Python reads from tensors: each would wait for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

_READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero")


class HostReads(TorchDispatchMode):
    """While it is entered, lists the operators that give Python a number of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if str(func).startswith(_READS):
            self.names.append(str(func))
        called: Callable[..., Any] = func
        return called(*args, **(kwargs or {}))


class StepWatch(TrainerCallback):
    """Keeps the trained weights after each step, and the reads of some steps.

    `first` is the number of the first of these steps, from 0, and `last` that after the last one;
    without them nothing is counted.
    """

    def __init__(self, first: int | None = None, last: int | None = None) -> None:
        self.reads, self.first, self.last = HostReads(), first, last
        self.weights: list[Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.global_step == self.first:
            self.reads.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:  # noqa: ARG002
        if state.global_step == self.last:
            self.reads.__exit__(None, None, None)
        trained = [p.detach().flatten() for p in parts["model"].parameters() if p.requires_grad]
        self.weights.append(torch.cat(trained))
