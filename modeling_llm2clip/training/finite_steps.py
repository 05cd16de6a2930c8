"""Find the first step with a non-finite gradient, without synchronizing the device every step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..encoding.devices import runs_ahead


class FiniteSteps:
    """Skips all optimizer steps from the first non-finite gradient on, entirely on the device.

    Args:
        device: Device of the weights.
        first_step: Number of the first observed step.

    Attributes:
        found_inf: () float32, 1 from the first non-finite step on. A fused torch optimizer with
            this attribute then leaves weights and moments unchanged.
    """

    def __init__(self, device: torch.device, *, first_step: int = 0) -> None:
        self.found_inf = torch.zeros((), device=device)
        self._first_step = first_step
        self._num_finite = torch.zeros((), dtype=torch.int64, device=device)
        self._facts: dict[str, Tensor] = {}

    def attach(self, optimizer: torch.optim.Optimizer) -> bool:
        """Make an optimizer skip non-finite steps by itself; return False if this is not possible.

        Skipping needs a fused optimizer on a device that runs asynchronously. Otherwise, call
        `read` before every optimizer step, which costs nothing on a synchronous device.
        """
        is_fused = all(group.get("fused") for group in optimizer.param_groups)
        if not is_fused or not runs_ahead(self.found_inf.device):
            return False
        optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        return True

    def observe(self, norm: Tensor, **facts: Tensor) -> None:
        """Record the gradient norm of a step, before the optimizer step.

        Args:
            norm: Gradient norm, ().
            facts: Tensors to report in an error about this step; their shapes must not change.
        """
        for name, fact in {"norm": norm, **facts}.items():
            kept = self._facts.get(name, fact)
            self._facts[name] = torch.where(self.found_inf > 0, kept, fact)
        torch.maximum(self.found_inf, (~norm.isfinite()).float(), out=self.found_inf)
        self._num_finite += self.found_inf == 0

    def read(self) -> tuple[int, dict[str, Tensor]] | None:
        """Synchronize the device; return the first non-finite step and its tensors, or None."""
        if not self.found_inf:
            return None
        facts = {name: fact.cpu() for name, fact in self._facts.items()}
        return self._first_step + int(self._num_finite), facts


def spread_nonfinite(loss: Tensor) -> Tensor:
    """Make the gradient of a non-finite loss NaN, and leave finite losses unchanged.

    Gradients are averaged over all processes, so all processes skip the same step.
    """
    return loss * (0 * loss.detach() + 1)
