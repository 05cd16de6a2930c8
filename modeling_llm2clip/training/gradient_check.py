"""Which parameters a backward pass reaches, found before a run says that it trains them.

Some networks read the weight of a linear layer themselves (`F.linear(x, self.qkv.weight)`). A LoRA
in that layer's place is then never run: it would be counted, saved and merged, and never train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NAMES_SHOWN = 5


def find_without_gradient(module: nn.Module, compute: Callable[[], Tensor]) -> list[str]:
    """List the parameters that ask for a gradient and get none in a backward pass.

    A gradient of zero is one: the first matrix of a new LoRA has no other. The pass is one of
    training, but no layer is left out at random, as an LLM with `layerdrop` does. Afterwards
    gradients, modes and random generators are as they were.
    """
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    was_training = module.training
    module.train()
    dropping: list[Any] = [part for part in module.modules() if "layerdrop" in vars(part)]
    shares = [part.layerdrop for part in dropping]
    for part in dropping:
        part.layerdrop = 0.0
    with torch.random.fork_rng(devices=[*devices]), torch.enable_grad():
        compute().backward()
    module.train(was_training)
    for part, share in zip(dropping, shares, strict=True):
        part.layerdrop = share
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    missing = [name for name, parameter in trained if parameter.grad is None]
    module.zero_grad(set_to_none=True)
    return missing


def require_gradients(without: Iterable[str], *, cause: str, remedy: str) -> None:
    """Refuse a run of which some parameters would never be trained."""
    layers = list(dict.fromkeys(name.partition(".lora_")[0] for name in without))
    if layers:
        shown = ", ".join(layers[:_NAMES_SHOWN]) + (", …" if len(layers) > _NAMES_SHOWN else "")
        raise ValueError(
            f"{cause}: {len(layers)} layers would get no gradient and never be trained, since the "
            f"network passes their LoRA by, or their output has no effect: {shown}. {remedy}"
        )
