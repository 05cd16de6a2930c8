"""Python in a process of its own, or in several that PyTorch starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# By the loopback interface alone: the machine's own name may be looked up in a network.
_LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--local-addr=localhost")
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


def run_python(*arguments: object, processes: int = 1, timeout: float = 400) -> str:
    """Run Python with the package and these helpers at hand; returns what it printed.

    Args:
        *arguments: as `python` takes them, such as a script and its own arguments.
        processes: how many processes run them together.
        timeout: seconds after which it is ended.
    """
    launch = (*_LAUNCHER, f"--nproc-per-node={processes}") if processes > 1 else ()
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers")))
    done = subprocess.run(
        [sys.executable, *launch, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=timeout, cwd=ROOT,
        env={**os.environ, **_LOOPBACK, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
