"""Seconds of a command on an idle machine and beside busy processes, by OpenMP's wait policy.

    python -m benchmarks.speed.busy_machine --model llm2clip-demo/model

`llm2clip embed` embeds English captions of the emoji with the policy that the command chooses and
with the two that a user may choose, in turns. Beside it runs nothing, or one busy loop per core.
What else the machine did is recorded as the processes that were running when a run began.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.shared.provenance import describe_run, write_result

POLICIES: dict[str, dict[str, str]] = {
    "of the command": {},
    "of OpenMP": {"GOMP_SPINCOUNT": "300000"},  # its default where threads do not outnumber cores
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
_BUSY_LOOP = "while True: pass"


def main() -> None:
    """Measure, print, and write the result."""
    arguments = _parse()
    seconds: dict[str, dict[str, list[float]]] = {}
    others: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        data = write_captions(Path(temporary) / "captions.csv", arguments.count)
        for state, loops in (("idle", 0), ("busy", os.cpu_count() or 1)):
            with busy_loops(loops):
                rounds = seconds.setdefault(state, {name: [] for name in POLICIES})
                for turn in range(arguments.rounds):
                    for name, chosen in rotate(turn):
                        others.setdefault(state, []).append(max(0, count_running() - loops))
                        folder = Path(temporary) / f"{state}-{turn}-{name}"
                        rounds[name].append(time_embed(arguments.model, data, folder, chosen))
    result = {
        "count": arguments.count,
        "median_seconds": {
            state: {name: round(statistics.median(times), 1) for name, times in rounds.items()}
            for state, rounds in seconds.items()
        },
        "seconds": {
            state: {name: [round(value, 1) for value in times] for name, times in rounds.items()}
            for state, rounds in seconds.items()
        },
        "busy_loops": os.cpu_count(),
        "other_processes": {state: statistics.median(counts) for state, counts in others.items()},
        **describe_run("torch", "transformers"),
    }
    write_result(arguments.output, result)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--count", type=int, default=200, help="captions")
    parser.add_argument("--rounds", type=int, default=3)
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "busy_machine.json")
    return parser.parse_args()


def write_captions(file: Path, count: int) -> Path:
    """Write captions of the emoji, one per line, as `embed` reads them."""
    from modeling_llm2clip import load_records
    from modeling_llm2clip.data.records.record_loading import find_example_data

    records = load_records(find_example_data() / "emoji")
    captions = list(dict.fromkeys(c for r in records if r.lang == "en" for c in r.captions))
    with file.open("w", encoding="utf-8", newline="") as opened:
        csv.writer(opened).writerows([("id", "text"), *enumerate(captions[:count])])
    return file


def rotate(turn: int) -> list[tuple[str, dict[str, str]]]:
    """Order the policies so that each is the first once in as many turns as there are."""
    policies = list(POLICIES.items())
    first = turn % len(policies)
    return policies[first:] + policies[:first]


def count_running() -> int:
    """Count the processes that run or wait for a core, without this one (Linux)."""
    return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Run loops that each keep a core busy, and end them."""
    loops = [subprocess.Popen([sys.executable, "-c", _BUSY_LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def time_embed(model: str, data: Path, folder: Path, chosen: dict[str, str]) -> float:
    """Return the seconds of one `llm2clip embed`, start included."""
    command = [sys.executable, "-m", "modeling_llm2clip", "embed", model, str(data), str(folder)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    started = time.perf_counter()
    subprocess.run(
        [*command, "--modality", "text", "--no-show-progress"],
        check=True, env={**kept, **chosen}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
