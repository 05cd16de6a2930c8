"""The demo's scores over several seeds: other held-out emoji, another random adapter.

    python -m benchmarks.accuracy.demo_seeds

Runs `llm2clip demo` once per seed, each in a process of its own, and lists the reports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.shared.provenance import describe_run, write_result


def main() -> None:
    """Run the seeds and write the list of reports."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="folder for the runs, which are removed")
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "demo.json")
    arguments = parser.parse_args()
    reports = [{**_run_demo(seed, arguments.work), **describe_run()} for seed in arguments.seeds]
    write_result(arguments.output, reports)


def _run_demo(seed: int, work: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        output = Path(folder) / "demo"
        flags = ["--output", str(output), "--seed", str(seed), "--device", "cpu"]
        subprocess.run([sys.executable, "-m", "modeling_llm2clip", "demo", *flags], check=True)
        report: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return report


if __name__ == "__main__":
    main()
