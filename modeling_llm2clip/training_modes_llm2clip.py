"""Keeps what is frozen in evaluation mode while the rest is trained.

Uploaded with the weights.
"""

from __future__ import annotations

from torch import nn


def settle_frozen(tower: nn.Module) -> None:
    """Put a frozen tower, or the frozen batch normalization inside a tower, into evaluation mode.

    In training mode batch normalization moves its statistics by every batch, even where its
    weights are frozen. No optimizer and no LoRA knows of them, so they would be lost on saving.

    Args:
        tower: changed in place. Statistics without weights of their own move only where every
            parameter of the tower is trained.
    """
    parameters = list(tower.parameters())
    if not any(p.requires_grad for p in parameters):
        tower.eval()
        return
    trains_all = all(p.requires_grad for p in parameters)
    for module in tower.modules():
        # Not getattr: peft's wrapper shows the statistics of the layer inside it.
        if any(name == "running_mean" for name, _ in module.named_buffers(recurse=False)):
            own = list(module.parameters(recurse=False))
            if not (any(p.requires_grad for p in own) if own else trains_all):
                module.eval()
