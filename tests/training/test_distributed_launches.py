"""Launching with accelerate: too few processes are refused, and two machines share one run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aligning import Prepared, command_of, read_losses
from gloo_workers import find_free_port

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.doctor.check_model import check_model

ROOT = Path(__file__).resolve().parents[2]
# Without noise, which depends on the number of processes.
CHANGED: dict[str, Any] = {"max_steps": 4, "save_steps": 4, "device": "auto", "caption_noise": 0.0}


def start_launch(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the command without a launcher."""
    output = tmp_path_factory.mktemp("plain") / "run"
    assert main(command_of(prepared, output, **{**CHANGED, "device": "cpu"})) == 0
    return read_losses(output)


def read_command(file: Path) -> list[str]:
    """Read the command from the comment at the top of a file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    shown = [line.removeprefix("#   ") for line in lines if line.startswith("#   ")]
    return shlex.split(" ".join(line.removesuffix("\\") for line in shown))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--num_processes", "2"), ("--cpu", "--num_processes", "2")])
def test_a_launch_with_fewer_processes_than_requested_is_refused(
    prepared: Prepared, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    command = command_of(prepared, tmp_path / "run", **CHANGED)
    with start_launch(*flags, "-m", "modeling_llm2clip", *command) as process:
        _, shown = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "asked for several processes or machines, but started only one" in shown
    assert "--config_file examples/accelerate/ddp.yaml" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_like_one_with_the_whole_batch(
    prepared: Prepared, plain: dict[int, float], tmp_path: Path
) -> None:
    """Launch them as the configuration's comment says, without a GPU."""
    accelerate, launch, *shown = read_command(ROOT / "examples/accelerate/ddp.yaml")
    assert (accelerate, launch) == ("accelerate", "launch")
    command = command_of(prepared, tmp_path / "run", **CHANGED)
    start = shown.index("align")
    flag = command[4]  # the words after the store are this test's settings
    assert shown[start:] == ["align", "MODEL", "DATA", "OUTPUT", flag, "STORE"]
    port = ("--main_process_port", str(find_free_port()))
    with start_launch(*port, *shown[:start], *command) as process:
        out, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-3000:]
    assert out.count("Wrote") == 1
    # Rounding differences from another order of summation grow over four steps.
    assert read_losses(tmp_path / "run") == pytest.approx(plain, abs=2e-3)
    assert check_model(tmp_path / "run" / "model").healthy


@pytest.mark.slow
def test_two_machines_train_like_one_process_with_the_whole_batch(
    prepared: Prepared, plain: dict[int, float], tmp_path: Path
) -> None:
    """The same machine plays both, with a shared disk."""
    command = command_of(prepared, tmp_path / "run", **CHANGED)
    port = str(find_free_port())
    processes = [
        start_launch(
            "--config_file", "examples/accelerate/ddp.yaml", "--num_processes", "2",
            "--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
            "--main_process_port", port, "-m", "modeling_llm2clip", *command,
        )
        for rank in range(2)
    ]  # fmt: skip
    shown = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], shown[0][1][-3000:]
    assert sum(out.count("Wrote") for out, _ in shown) == 1
    # Rounding differences from another order of summation grow over four steps.
    assert read_losses(tmp_path / "run") == pytest.approx(plain, abs=2e-3)
