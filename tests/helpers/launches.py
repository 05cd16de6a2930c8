"""Run Python in its own process, or in several that PyTorch launches."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Use only the loopback interface, because resolving the machine's name may need a network.
_LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--local-addr=localhost")
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


def run_python(*arguments: object, processes: int = 1, timeout: float = 400) -> str:
    """Run Python with the package and these helpers on its path, and return its output.

    Args:
        *arguments: Arguments of `python`, such as a script and its own arguments.
        processes: Number of processes to launch together.
        timeout: Time limit in seconds.
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


def start_with_ray(
    folder: Path, stage: str, *arguments: object, modality: str
) -> subprocess.Popen[str]:
    """Start a stage with Ray in its own process, so a hanging cluster cannot outlive the test.

    Args:
        folder: Folder for the script.
        stage: Public name of the function.
        *arguments: Its arguments; they are pickled.
        modality: Its modality.
    """
    script, pickled = folder / "with_ray.py", folder / "arguments.pickle"
    script.write_text(
        "import pickle, sys\n"
        f"from modeling_llm2clip import {stage} as run\n"
        "arguments = pickle.load(open(sys.argv[1], 'rb'))\n"
        "run(*arguments, modality=sys.argv[2], engine='ray')\n"
    )
    pickled.write_bytes(pickle.dumps(arguments))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(
        [sys.executable, str(script), str(pickled), modality], env=environment, cwd=folder,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
