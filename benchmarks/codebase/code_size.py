"""Measures the code base: its size, the ways through it, start-up and tests.

    python -m benchmarks.codebase.code_size --label after --run-tests
    python -m benchmarks.codebase.code_size --label before --checkout CHECKOUT --test-seconds 302

Sources are counted by `code_counts.py`, ways by `code_walks.py`. Times are medians over fresh
processes; the first process warms the file cache and does not count. `before` is the commit that a
redesign started from, in a checkout of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.codebase.code_counts import count_by_folder, count_sources, read_sources
from benchmarks.codebase.code_walks import measure_walks
from benchmarks.shared.provenance import describe_run, read_commit

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = "modeling_llm2clip"
_IMPORT = f"""
import time
started = time.perf_counter()
import {_PACKAGE}
print(time.perf_counter() - started)
"""


def main() -> None:
    """Measure one checkout, print the entry, and write it beside the other one."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkout", type=Path, default=_ROOT, help="checkout to measure")
    parser.add_argument("--label", choices=["before", "after"], required=True)
    parser.add_argument("--runs", type=int, default=5, help="processes for each time")
    tests = parser.add_mutually_exclusive_group()
    tests.add_argument("--run-tests", action="store_true", help="time `pytest -q`")
    tests.add_argument("--test-seconds", type=float, help="a time measured before")
    parser.add_argument(
        "--output", type=Path, default=_ROOT / "benchmarks" / "results" / "code_size.json"
    )
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    sources = read_sources(checkout)
    entry = {
        **describe_run("torch", "transformers", "pytest"),
        "commit": read_commit(checkout),
        **count_sources(sources),
        "by_folder": count_by_folder(sources),
        "walks": measure_walks(checkout),
        **measure_start(checkout, options.runs),
        **measure_tests(checkout, run=options.run_tests, seconds=options.test_seconds),
    }
    recorded = json.loads(options.output.read_text("utf-8")) if options.output.is_file() else {}
    recorded[options.label] = entry
    options.output.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(entry, indent=2))


def measure_start(checkout: Path, runs: int) -> dict[str, Any]:
    """Time `import modeling_llm2clip` and `llm2clip --help` in fresh processes.

    Args:
        checkout: Root of the checkout.
        runs: Processes for each of the two.

    Returns:
        Medians in seconds. The import is timed inside the process, the command from outside.
    """
    imported, helped = [], []
    for _ in range(runs + 1):
        imported.append(float(_run_python(checkout, "-c", _IMPORT).stdout))
        started = time.perf_counter()
        _run_python(checkout, "-m", _PACKAGE, "--help")
        helped.append(time.perf_counter() - started)
    return {
        "import_seconds": round(statistics.median(imported[1:]), 3),
        "help_seconds": round(statistics.median(helped[1:]), 3),
        "runs": runs,
    }


def measure_tests(checkout: Path, *, run: bool, seconds: float | None) -> dict[str, Any]:
    """Count the lines and tests of the checkout's suite and, where asked, time it.

    Args:
        checkout: Root of the checkout.
        run: Whether to run `pytest -q`.
        seconds: A time that was measured before, recorded as it is.

    Returns:
        `test_lines`, `num_tests` without slow and GPU tests, `num_tests_deselected`, and
        `test_seconds`.

    Raises:
        RuntimeError: The tests fail, or pytest collects none.
    """
    listed = _run_pytest(checkout, "--collect-only", "-q").stdout
    counts = re.search(r"(\d+)(?:/\d+)? tests collected(?: \((\d+) deselected\))?", listed)
    if counts is None:
        raise RuntimeError(f"pytest collected nothing in {checkout}: {listed[-500:]}")
    files = sorted((checkout / "tests").rglob("*.py"))
    result: dict[str, Any] = {
        "test_lines": sum(len(path.read_text("utf-8").splitlines()) for path in files),
        "num_tests": int(counts[1]),
        "num_tests_deselected": int(counts[2] or 0),
        "test_seconds": seconds,
    }
    if run:
        started = time.perf_counter()
        done = _run_pytest(checkout, "-q", check=False)
        result["test_seconds"] = round(time.perf_counter() - started, 1)
        if done.returncode:
            lines = done.stdout.splitlines()
            failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
            raise RuntimeError("\n".join([f"Tests of {checkout} fail:", *failed, lines[-1]]))
    return result


def _run_pytest(
    checkout: Path, *flags: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    return _run_python(checkout, "-m", "pytest", "-p", "no:cacheprovider", *flags, check=check)


def _run_python(
    checkout: Path, *command: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "", "COLUMNS": "120", "NO_COLOR": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *command], cwd=checkout, env=environment,
        capture_output=True, text=True, check=check,
    )  # fmt: skip


if __name__ == "__main__":
    main()
