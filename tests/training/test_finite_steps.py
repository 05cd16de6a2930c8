"""Non-finite steps are found without synchronizing the device."""

from __future__ import annotations

import math

import pytest
import torch
from host_reads import HostReads
from running_ahead import run_ahead
from torch import Tensor, nn

from modeling_llm2clip.training.finite_steps import FiniteSteps, spread_nonfinite

SHAPES = (3, 4), (5,)


def step_through(
    gradients: list[list[Tensor]], *, guarded: bool
) -> tuple[list[Tensor], FiniteSteps]:
    """Take fused steps; return weights and moments after each, and the observed steps."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = torch.optim.AdamW(weights, lr=0.1, fused=True)
    steps = FiniteSteps(torch.device("cpu"), first_step=10)
    states = []
    for number, parts in enumerate(gradients):
        for weight, gradient in zip(weights, parts, strict=True):
            weight.grad = gradient.clone()
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        steps.observe(norm, loss=torch.tensor(float(number)))
        if guarded:
            optimizer.found_inf = steps.found_inf  # type: ignore[attr-defined]
        optimizer.step()
        moments = [value for w in weights for value in optimizer.state[w].values()]
        states.append(torch.cat([t.detach().flatten() for t in (*weights, *moments)]))
    return states, steps


def make_gradients(*, bad: float | None, at: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(6)]
    if bad is not None:
        made[at][0][1, 2] = bad
    return made


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_step_and_all_later_ones_change_nothing(bad: float) -> None:
    gradients = make_gradients(bad=bad, at=3)
    with HostReads() as reads:
        states, steps = step_through(gradients, guarded=True)
    assert reads.names == []
    finite, _ = step_through(gradients[:3], guarded=False)
    for state, wanted in zip(states, [*finite, *3 * finite[-1:]], strict=True):
        assert torch.equal(state, wanted)
    broken = steps.read()
    assert broken is not None
    step, facts = broken
    assert (step, facts["loss"].item(), facts["norm"].isfinite().item()) == (13, 3.0, False)


def test_finite_steps_equal_plain_optimizer_steps() -> None:
    gradients = make_gradients(bad=None, at=0)
    states, steps = step_through(gradients, guarded=True)
    assert steps.read() is None
    assert torch.equal(states[-1], step_through(gradients, guarded=False)[0][-1])


@pytest.mark.parametrize(("fused", "ahead"), [(True, True), (True, False), (None, True)])
def test_an_optimizer_skips_steps_itself_if_it_is_fused_and_its_device_runs_ahead(
    fused: bool | None, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ahead:
        run_ahead(monkeypatch)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], fused=fused)
    steps = FiniteSteps(torch.device("cpu"))
    assert steps.attach(optimizer) is bool(fused and ahead)
    assert getattr(optimizer, "found_inf", None) is (steps.found_inf if fused and ahead else None)


@pytest.mark.parametrize(("factor", "finite"), [(1.0, True), (1e38, False)])
def test_a_non_finite_loss_has_no_finite_gradient(factor: float, finite: bool) -> None:
    """Even if its own gradient is finite: 1e38 * 30 overflows, its gradient 1e38 does not."""
    weight = nn.Parameter(torch.tensor([10.0, 20.0]))
    loss = weight.sum() * factor
    spread = spread_nonfinite(loss)
    spread.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad.isfinite().all().item() is finite
    if finite:
        assert torch.equal(spread, loss) and torch.equal(weight.grad, torch.ones(2))
