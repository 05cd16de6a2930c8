"""How long threads spin is bounded for the commands, before torch is loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_llm2clip.cli.options import bound_spinning

ROOT = Path(__file__).parents[2]


def test_a_command_bounds_the_spinning_before_torch_is_loaded() -> None:
    code = (
        "import os, sys; from modeling_llm2clip.__main__ import main; "
        "main(['search', '/nowhere', 'a dog']); "
        "print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_WAIT", "GOMP", "KMP"))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**kept, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.split() == ["False", "10000"], done.stderr


def test_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate sets variables of another OpenMP, and torch reads its own only once."""

    def bound(**environment: str) -> dict[str, str]:
        bound_spinning(environment)
        return environment

    assert "torch" in sys.modules or __import__("torch")
    assert bound() == {}
    monkeypatch.delitem(sys.modules, "torch")
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        assert bound(**{name: "7"}) == {name: "7"}
    of_accelerate = {"KMP_BLOCKTIME": "1", "KMP_AFFINITY": "granularity=fine,compact,1,0"}
    assert bound(**of_accelerate)["GOMP_SPINCOUNT"] == "10000"


LAUNCHERS = {
    "python": ["-m", "modeling_llm2clip"],
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1",
                   "--module", "modeling_llm2clip"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP elsewhere")
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_openmp_itself_has_the_bound_however_a_command_is_launched(launcher: str) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP", "KMP"))}
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], "env"], cwd=ROOT, capture_output=True, text=True,
        timeout=900, env={**kept, "PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    counts = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert "10000" in counts
    if launcher == "python":  # the launcher of accelerate loads torch too, and only waits
        assert set(counts) == {"10000"}
