"""What decides the speed on a GPU and can be counted without one, here and in another checkout.

    python -m benchmarks.gpu.gpu_proxies --before ../another-checkout

| part | counted |
| --- | --- |
| `full_width` | operations, kernels, attention: sizes of the paper, tensors without content |
| `shapes` | share of real tokens in batches, and their shapes, for made-up lengths of captions |
| `transfers` | values that the host waits for, and tensors that cross, of a batch or step |
| `cpu_ms` | CPU milliseconds of one thread for what the host does beside its GPU |

A CPU runs all of it in the way that a GPU would. The counts depend on the code alone. CPU times
depend on the machine, whose load is recorded beside them. Without `--before` its recorded figures
are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.shared.provenance import describe_run, read_commit, write_result

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--before", type=Path, help="another checkout")
    output = Path(__file__).parents[1] / "results" / "gpu_proxies.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    if arguments.before is not None:
        figures["before"] = measure(arguments.before.resolve())
    elif arguments.output.is_file():
        recorded = json.loads(arguments.output.read_text(encoding="utf-8"))
        figures["before"] = recorded["before"]
    figures["after"] = measure(ROOT)
    frame = describe_run("torch", "transformers", "sentence-transformers", threads=1)
    write_result(arguments.output, frame | figures)


def measure(checkout: Path) -> dict[str, Any]:
    """Measure the package of a checkout in a process of its own.

    Args:
        checkout: its folder.

    Returns:
        Its commit, the load of the machine before, and the figures of `proxy_worker.py`.
    """
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as folder:
        # The package of the one checkout beside the benchmarks of this one.
        for name, root in (("modeling_llm2clip", checkout), ("benchmarks", ROOT)):
            (Path(folder) / name).symlink_to(root / name)
        (Path(folder) / "examples").symlink_to(ROOT / "examples")
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu.proxy_worker"],
            cwd=folder, stdout=subprocess.PIPE, text=True, check=True,
            env={**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    return {"commit": read_commit(checkout), "load": load, **json.loads(done.stdout)}


if __name__ == "__main__":
    main()
