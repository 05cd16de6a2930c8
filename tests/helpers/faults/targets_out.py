"""Every output of the package that it reads again.

An output that holds digests must read as it was written, or be refused. Commands that only encode
do not check those of a model folder: `doctor` must call the folder damaged, or its embeddings are
those that it records. ONNX graphs have no digests.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from faults import outputs_data, outputs_runs
from faults.counts import Counts
from faults.damage import repeat, run_targets

TARGETS = (*outputs_data.TARGETS, *outputs_runs.TARGETS)


def run(folder: Path, seconds: float, seed: int) -> Counts:
    """Damage every output in turn."""
    outputs_data.begin(folder)
    return run_targets(TARGETS, folder, seconds, seed)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        outputs_data.begin(Path(scratch))
        repeat(TARGETS)
