"""The same code, run by this checkout and by one from before, in turns on the same machine."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).parents[2]


def measure_in_turns(
    before: Path, code: str, arguments: Sequence[str], *, questions: Sequence[str], rounds: int
) -> dict[str, dict[str, float]]:
    """Ask a process per checkout each question in every round, and take the medians.

    Args:
        before: The other checkout of this repository.
        code: Program of the processes: it prints "ready", and then a number for each line it reads.
        arguments: Of the code.
        questions: Lines that it reads.
        rounds: How often each is asked.

    Returns:
        By question, the median `before` and `after`, and the median of their ratios as `share`.
    """
    figures: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(_start(checkout, code, arguments))
            for name, checkout in (("before", before.resolve()), ("after", HERE))
        }
        for _ in range(rounds):
            for question in questions:
                for name, process in processes.items():
                    answers = figures.setdefault(question, {}).setdefault(name, [])
                    answers.append(_ask(process, question))
    return {
        question: {
            **{name: round(statistics.median(answers), 2) for name, answers in of.items()},
            "share": round(statistics.median(map(_divide, of["after"], of["before"])), 3),
        }
        for question, of in figures.items()
    }


def _start(checkout: Path, code: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"{checkout}: the process did not start, exit code {process.wait()}.")
    return process


def _ask(process: subprocess.Popen[str], question: str) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(question + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def _divide(after: float, before: float) -> float:
    return after / before
