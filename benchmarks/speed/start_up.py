"""Measures where the seconds of a command go before it encodes anything.

    python -m benchmarks.speed.start_up

Each command runs on 16 emoji with a name each in three languages, so nearly all of its time is
start-up, except for `align`, which also trains. Three runs give the medians of seconds and CPU
seconds. One more run under Python's import timer reports what imports take, by package, and one
under cProfile what loading and checks take; the profiler slows Python down, so its parts are upper
bounds.
"""

from __future__ import annotations

import argparse
import os
import pstats
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.shared.provenance import describe_run, write_result
from benchmarks.speed.command_pairs import ROOT, TASKS, prepare, run, write_images

COMMANDS = (
    "extract captions",
    "extract images",
    "align",
    "embed captions",
    "index images",
    "search",
)
_PACKAGES = ("torch", "transformers", "modeling_llm2clip")
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)")
# Functions that do not call each other, so that their times add up.
_PHASES = {
    "hashes of weights": ("fingerprint.py", "_describe_weights"),
    "processors": ("processing_llm2clip.py", "from_pretrained"),
    "weights": ("base_llm2clip.py", "from_pretrained"),
    "check of packing": ("packing_llm2clip.py", "can_pack"),
}


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="what else runs on the machine")
    output = ROOT / "benchmarks" / "results" / "start_up.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        write_images(data, 16)
        places = prepare(Path(scratch) / "prepared", ROOT, data)
        commands = {}
        for name in COMMANDS:
            words = [word.format(**places) for word in TASKS[name]]
            commands[name] = measure(words, arguments.rounds)
            print(name, commands[name], file=sys.stderr)
    frame = describe_run("torch", "transformers", note=arguments.note)
    write_result(arguments.output, frame | {"rounds": arguments.rounds, "commands": commands})


def measure(words: list[str], rounds: int) -> dict[str, Any]:
    """Run a command several times, and return its times and their parts."""
    usages = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            usages.append(run(ROOT, words, Path(scratch)))
    return {
        "seconds": round(statistics.median(usage["seconds"] for usage in usages), 2),
        "cpu_s": round(statistics.median(usage["cpu_s"] for usage in usages), 2),
        "imports": time_imports(words),
        "phases": time_phases(words),
    }


def time_imports(words: list[str]) -> dict[str, float]:
    """Return the seconds that imports take, by package."""
    microseconds: Counter[str] = Counter()
    lines = _run_python(["-X", "importtime", "-m", "modeling_llm2clip", *words]).splitlines()
    for match in filter(None, map(_IMPORT.match, lines)):
        microseconds[match[2] if match[2] in _PACKAGES else "others"] += int(match[1])
    return {name: round(microseconds[name] / 1e6, 2) for name in (*_PACKAGES, "others")}


def time_phases(words: list[str]) -> dict[str, float]:
    """Return the seconds in the functions of `_PHASES`, under the profiler."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "profile"
        _run_python(["-m", "cProfile", "-o", str(file), "-m", "modeling_llm2clip", *words])
        # Of each function: own calls, calls, own seconds, seconds, callers.
        functions: dict[tuple[str, int, str], Any] = vars(pstats.Stats(str(file)))["stats"]
    return {
        phase: round(
            sum(
                stats[3]
                for (path, _, function), stats in functions.items()
                if (Path(path).name, function) == place
            ),
            2,
        )
        for phase, place in _PHASES.items()
    }


def _run_python(arguments: list[str]) -> str:
    """Run Python in an empty folder, and return what it wrote to stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as scratch:
        return subprocess.run(
            [sys.executable, *arguments], cwd=scratch, env=environment, check=True,
            capture_output=True, text=True,
        ).stderr  # fmt: skip


if __name__ == "__main__":
    main()
