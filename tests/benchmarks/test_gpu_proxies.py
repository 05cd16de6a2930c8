"""What crosses to a GPU is counted as a GPU would see it, and a read is never missed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.transfers import Transfers

_CPU = torch.device("cpu")


def count(work: Callable[[Tensor, Tensor], object]) -> dict[str, Any]:
    """Count what a function of a tensor of the host and one of the device crosses."""
    with Transfers() as transfers:
        there = transfers.place(torch.arange(1.0, 5.0))
        work(torch.arange(1.0, 5.0), there)
    counted = vars(transfers.crossings)
    return {name: number for name, number in counted.items() if number and name != "readers"}


@pytest.mark.parametrize(
    "read",
    [
        lambda there: there.sum().item(),
        lambda there: bool((there * 2 > 0).all()),
        lambda there: float(there[0]),
        lambda there: there.tolist(),
        lambda there: there.nonzero(),
        lambda there: there[there > 1],
        lambda there: torch.equal(there, there),
        lambda there: there.detach().view(2, 2).T.numpy(),
    ],
)
def test_a_value_of_the_device_is_a_read_and_one_of_the_host_is_none(
    read: Callable[[Tensor], object],
) -> None:
    assert count(lambda _, there: read(there)) == {"reads": 1}
    assert count(lambda here, _: read(here)) == {}


def test_copies_are_counted_once_by_direction_and_by_whether_the_host_waits() -> None:
    assert count(lambda here, _: here.to(_CPU)) == {"copies_in": 1, "bytes_in": 16}
    assert count(lambda here, _: here.to(_CPU).to(_CPU)) == {"copies_in": 1, "bytes_in": 16}
    ahead = count(lambda here, _: here.to(_CPU, non_blocking=True))
    assert ahead == {"copies_ahead": 1, "bytes_in": 16}
    assert count(lambda _, there: there.cpu().tolist()) == {"copies_out": 1, "bytes_out": 16}
    assert count(lambda here, _: here.to(torch.float64).cpu()) == {}
    made = count(lambda _, there: torch.tensor([1, 2], device=there.device))
    assert made == {"copies_in": 1, "bytes_in": 16}
    assert count(lambda _, there: torch.zeros(2, device=there.device).add(there[:2])) == {}
    assert count(lambda here, _: bool(torch.tensor([1], device=here.device) > 0)) == {}


def test_what_a_module_makes_and_its_gradients_are_on_the_device() -> None:
    layer = nn.Linear(4, 1)

    def train(here: Tensor, _: Tensor) -> None:
        layer(here.to(_CPU)).sum().backward()
        norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        assert norm > 0

    assert count(train) == {"copies_in": 1, "bytes_in": 16, "reads": 1}


def test_a_run_fails_by_parity_and_by_lost_speed_and_not_by_a_missed_goal(tmp_path: Path) -> None:
    recorded = {"fast": {"value": 100.0}, "short": {"value": 1.0}}
    bench = Bench(_CPU, False, tmp_path, recorded)
    bench.note_speed("fast", 81.0, "texts/s", goal=200.0)
    bench.note_speed("short", 1.2, "s", goal=0.5, lower=True)
    bench.note_parity("near", 0.9995, 0.999, at_least=True)
    assert bench.failures == {}
    assert [bench.rows[name]["met"] for name in ("fast", "short")] == [False, False]
    bench.note_speed("fast", 79.0, "texts/s")
    bench.note_speed("short", 1.3, "s", lower=True)
    bench.note_parity("near", 0.998, 0.999, at_least=True)
    bench.note_parity("ranks", 1, 0, at_least=False)
    assert list(bench.failures) == ["fast", "short", "near", "ranks"]
    # What an earlier run recorded stays; a row that it lacks is there with its failure.
    assert {name: bench.kept_rows[name] for name in recorded} == recorded
    assert not bench.kept_rows["ranks"]["holds"]
    # A NaN is near to nothing.
    bench.note_parity("broken", float("nan"), 0.999, at_least=True)
    assert not bench.rows["broken"]["holds"]
