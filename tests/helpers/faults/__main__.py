"""Runs harnesses, prints their counts and every failure, and records them.

    PYTHONPATH=tests/helpers python -m faults --seconds 1200 --seed 7
    PYTHONPATH=tests/helpers python -m faults --only kills --output faults.json

The same seed gives the same cases in the same order; how many there are depends on the time. The
exit code is 1 if a case failed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from faults.counts import Counts, NotHereError

# A module of this package each, with `run(folder, seconds, seed)`.
KINDS = ("commands", "kills", "targets_in", "targets_out", "writers", "disks", "endpoint")


def main() -> int:
    """Run every harness, or the chosen ones."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", choices=KINDS, action="append", help="a harness; repeatable")
    parser.add_argument("--seconds", type=float, default=120, help="time for each harness")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file of the record")
    arguments = parser.parse_args()
    harnesses = {}
    for kind in arguments.only or KINDS:
        run: Callable[[Path, float, int], Counts] = importlib.import_module(f"faults.{kind}").run
        with tempfile.TemporaryDirectory(prefix=f"faults-{kind}-") as folder:
            try:
                counts = run(Path(folder).resolve(), arguments.seconds, arguments.seed)
            except NotHereError as error:
                print(f"{kind}: {error}", flush=True)  # noqa: T201
                continue
        harnesses[kind] = asdict(counts)
        shown = ", ".join(
            f"{name} {n}" for name, n in harnesses[kind].items() if name != "failures"
        )
        print(f"{kind}, seed {arguments.seed}: {shown}", flush=True)  # noqa: T201
        for failure in counts.failures:
            print(f"{kind}, seed {arguments.seed}: {failure}", file=sys.stderr)  # noqa: T201
    if arguments.output:
        from benchmarks.shared.provenance import describe_run, write_result

        about = describe_run("torch", "transformers", "lancedb", threads=1)
        called = {"seconds": arguments.seconds, "seed": arguments.seed}
        write_result(arguments.output, {**about, **called, "harnesses": harnesses})
    return int(any(counts["failures"] for counts in harnesses.values()))


if __name__ == "__main__":
    sys.exit(main())
