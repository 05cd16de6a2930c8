"""Measures the cost of `import modeling_llm2clip`, beyond `import transformers` and in itself.

    python -m benchmarks.codebase.import_time

Each measurement is a fresh process that imports transformers first and then the package, with
nothing written between; the first process warms the files in the memory of the system and does not
count. Which modules the import may load is a test's business: tests/test_code_rules.py.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks.shared.provenance import describe_processor, read_commit, write_result

_ROOT = Path(__file__).resolve().parents[2]
_MEASURE = """
import sys, time
started = time.perf_counter()
import transformers
between = time.perf_counter()
known = set(sys.modules)
import modeling_llm2clip
ended = time.perf_counter()
print(between - started, ended - between, len(set(sys.modules) - known))
"""


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument(
        "--output", type=Path, default=_ROOT / "benchmarks" / "results" / "import_time.json"
    )
    arguments = parser.parse_args()
    _import_once()
    runs = [_import_once() for _ in range(arguments.runs)]
    transformers, ours, modules = (list(column) for column in zip(*runs, strict=True))
    result = {
        "command": " ".join(["python", "-m", "benchmarks.codebase.import_time", *sys.argv[1:]]),
        "commit": read_commit(),
        "hardware": describe_processor(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
        "seconds_beyond_transformers": round(statistics.median(ours), 4),
        "seconds_beyond_transformers_worst": round(max(ours), 4),
        "seconds_of_transformers": round(statistics.median(transformers), 4),
        "num_modules_added": int(modules[0]),
        "runs": arguments.runs,
    }
    write_result(arguments.output, result)


def _import_once() -> tuple[float, float, float]:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], cwd=_ROOT, capture_output=True, text=True, check=True
    )
    transformers, ours, modules = map(float, done.stdout.split())
    return transformers, ours, modules


if __name__ == "__main__":
    main()
