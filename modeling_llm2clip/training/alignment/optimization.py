"""What every alignment shares: which parameters decay, how the learning rate moves, and steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import StepProgress

_LINES_SHOWN = 10  # of a whole run


def recompute_activations(tower: Any) -> None:
    """Make a tower compute its activations anew in the backward pass: slower, in less memory."""
    # Newer versions of transformers call it so, and warn of the old name.
    enable = getattr(tower, "activation_checkpointing_enable", None)
    (enable or tower.gradient_checkpointing_enable)({"use_reentrant": False})


def split_by_decay(
    parameters: Iterable[nn.Parameter], weight_decay: float, **settings: Any
) -> list[dict[str, Any]]:
    """Decay matrices only: not norms, biases and the temperature (arXiv:2103.00020).

    Args:
        settings: of both groups, e.g. `lr`.
    Returns: groups for an optimizer, without empty ones.
    """
    listed = list(parameters)
    groups = [
        {"params": [p for p in listed if p.ndim > 1], "weight_decay": weight_decay, **settings},
        {"params": [p for p in listed if p.ndim <= 1], "weight_decay": 0.0, **settings},
    ]
    return [group for group in groups if group["params"]]


def count_warmup_steps(warmup_steps: float, num_steps: int) -> int:
    """Count the steps of a run's warm-up; in the step after them the rate is at its peak.

    Args:
        warmup_steps: below 1 a share of the run, rounded down; else a number of steps.
        num_steps: of the run.
    Raises: ValueError when the run ends before the learning rate is at its peak.
    """
    counted = int(warmup_steps * num_steps if warmup_steps < 1 else warmup_steps)
    if counted >= num_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps:g} of a run of {num_steps} steps: its learning rate would "
            f"never reach its peak. Give fewer than {num_steps} steps, or a share of the run below "
            "1, such as 0.1 (--warmup-steps), or train longer (--max-steps, --num-train-epochs)."
        )
    return counted


def warm_up_then_cosine(steps: int, *, begin: int = 0) -> Callable[[int], float]:
    """Factor of the learning rate at each step: up for a tenth of the steps, down as a cosine.

    Args:
        begin: steps at the start during which it is 0.
    """
    warm_up = max(1, (steps - begin) // 10)

    def factor(step: int) -> float:
        if step < begin:
            return 0.0
        if step - begin < warm_up:
            return (step - begin + 1) / warm_up
        done = (step - begin - warm_up) / max(1, steps - begin - warm_up)
        return 0.5 * (1 + math.cos(math.pi * done))

    return factor


def descend(
    losses: Iterable[Tensor],
    parameters: Sequence[nn.Parameter],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    show_progress: bool = False,
) -> list[float]:
    """Take a step of AdamW down each loss, in memory and without checkpoints.

    Args:
        losses: () each, as many as `steps`; the next is asked for when the step before is done.
        lr: peak learning rate; see `warm_up_then_cosine`.
    Returns: the loss of every step.
    Raises: FloatingPointError at the first loss or gradient that is not finite, before its step,
        and when a weight is not finite at the end; naming the step.
    """
    optimizer = torch.optim.AdamW(
        split_by_decay(parameters, weight_decay), lr=lr, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_cosine(steps))
    done: list[float] = []
    progress = StepProgress(steps, shown=show_progress)
    for loss in losses:
        if not loss.isfinite():
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {len(done)}. Lower the learning rate ({lr}), "
                "or look for broken embeddings."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not norm.isfinite():
            raise FloatingPointError(
                f"The gradient's norm is {norm.item()} at step {len(done)}, although the loss is "
                f"finite. Lower the learning rate ({lr})."
            )
        optimizer.step()
        schedule.step()
        done.append(loss.item())
        progress.update(len(done))
        if len(done) % max(1, steps // _LINES_SHOWN) == 0:
            rate = schedule.get_last_lr()[0]
            progress.show(len(done), {"loss": done[-1], "learning_rate": rate})
    progress.close()
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise FloatingPointError(
            f"A weight is not finite after step {len(done)}. Lower the learning rate ({lr})."
        )
    return done
