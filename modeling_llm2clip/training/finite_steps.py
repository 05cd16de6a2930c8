"""Finds the first step whose gradient is not finite, without a wait for the device at each step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..encoding.devices import runs_ahead


class FiniteSteps:
    """Skips every optimizer step from the first whose gradient is not finite, all on the device.

    Args:
        device: Device of the weights.
        first_step: Number of the first step that is observed.

    Attributes:
        found_inf: () float32, 1 from that step on. A fused optimizer of torch that has it as its
            attribute of this name then leaves weights and moments as they are.
    """

    def __init__(self, device: torch.device, *, first_step: int = 0) -> None:
        self.found_inf = torch.zeros((), device=device)
        self._first_step = first_step
        self._num_finite = torch.zeros((), dtype=torch.int64, device=device)
        self._facts: dict[str, Tensor] = {}

    def attach(self, optimizer: torch.optim.Optimizer) -> bool:
        """Make an optimizer skip steps where its device runs ahead; return whether it will.

        Where not, `read` costs nothing, and belongs before each of its steps.
        """
        is_fused = all(group.get("fused") for group in optimizer.param_groups)
        if not is_fused or not runs_ahead(self.found_inf.device):
            return False
        optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        return True

    def observe(self, norm: Tensor, **facts: Tensor) -> None:
        """Take the norm of a step's gradient, before the optimizer's step.

        Args:
            norm: () norm.
            facts: Tensors for the error about this step; of one shape in all steps.
        """
        for name, fact in {"norm": norm, **facts}.items():
            kept = self._facts.get(name, fact)
            self._facts[name] = torch.where(self.found_inf > 0, kept, fact)
        torch.maximum(self.found_inf, (~norm.isfinite()).float(), out=self.found_inf)
        self._num_finite += self.found_inf == 0

    def read(self) -> tuple[int, dict[str, Tensor]] | None:
        """Wait for the device; return the first step that is not finite, and its facts."""
        if not self.found_inf:
            return None
        facts = {name: fact.cpu() for name, fact in self._facts.items()}
        return self._first_step + int(self._num_finite), facts


def spread_nonfinite(loss: Tensor) -> Tensor:
    """Make the gradient of a loss NaN if the loss is not finite; others stay as they are.

    Gradients are averaged over the processes, so that all of them skip the same step.
    """
    return loss * (0 * loss.detach() + 1)
