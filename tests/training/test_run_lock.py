"""One run at a time in a folder, by a lock that ends with its process; checkpoints by step."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aligning import Prepared, Run, read_losses
from launches import ROOT
from tuning import SHORT, tune

from modeling_llm2clip.training.run_folder import (
    CHECKPOINTS,
    LOCK_FILE,
    _hold,
    lock_run,
    mark_complete,
)

FUTURE = time.time() + 10 * 365 * 86_400
IN_USE = "run is in use: another process trains in it now"


def list_steps(output: Path) -> list[int]:
    folders = (output / CHECKPOINTS).glob("checkpoint-*")
    return sorted(int(folder.name.removeprefix("checkpoint-")) for folder in folders)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(
    prepared: Prepared, finished: Run, tmp_path: Path, resume: bool
) -> None:
    output = tmp_path / "run"
    if resume:
        finished.copy_without_model(output)
    with lock_run(output):
        before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=IN_USE):
            prepared.align(output, resume=resume)
        with pytest.raises(ValueError, match=IN_USE):
            tune(output, SHORT, resume=resume)
        assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (output / LOCK_FILE).exists()
    assert prepared.align(output, resume=resume).results["steps"] == 6
    assert not (output / LOCK_FILE).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are forked")
def test_the_lock_ends_with_its_process_and_not_with_its_workers(tmp_path: Path) -> None:
    output = tmp_path / "run"
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from modeling_llm2clip.training.run_folder import lock_run\n"
        "with lock_run(Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n"
        "        os.close(1)\n"
        "        time.sleep(5)\n"
        "        os._exit(0)\n"
        "    time.sleep(0.5)\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(300)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(output)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=IN_USE), lock_run(output):
            pytest.fail("both hold it")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=60)
    assert (output / LOCK_FILE).is_file()  # which locks nothing any more
    with lock_run(output):
        pass
    assert not output.exists()


def test_a_refused_run_leaves_no_folder(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few for a batch"):
        prepared.align(tmp_path / "run", global_batch_size=20, held_out_ratio=0.5)
    assert not (tmp_path / "run").exists()


def test_runs_that_begin_and_end_at_once_are_refused_or_run(tmp_path: Path) -> None:
    """One removes its empty folder as another opens it, which raised in every try."""

    def begin_and_end(_: int) -> int:
        held = 0
        for _ in range(300):
            with _hold(tmp_path / "run") as is_held:
                held += is_held
        return held

    with ThreadPoolExecutor(4) as pool:
        held = list(pool.map(begin_and_end, range(4)))
    assert sum(held) > 0
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError), _hold(tmp_path / "file"):
        pass


def test_the_last_two_checkpoints_are_kept_whatever_their_times(tmp_path: Path) -> None:
    for step, seconds in ((9, FUTURE), (10, FUTURE), (100, 0.0), (11, FUTURE)):
        folder = tmp_path / CHECKPOINTS / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        os.utime(folder, (seconds, seconds))
    mark_complete(tmp_path, 100)
    assert list_steps(tmp_path) == [11, 100]


@pytest.mark.parametrize("stage", ["align", "finetune-llm"])
@pytest.mark.slow
def test_a_run_with_checkpoints_of_the_future_is_resumed(
    stage: str, prepared: Prepared, tmp_path: Path
) -> None:
    output = tmp_path / "run"

    def run(**options: Any) -> None:
        if stage == "align":
            prepared.align(output, save_steps=1, max_steps=3, **options)
        else:
            tune(output, replace(SHORT, save_steps=1, max_steps=3, warmup_steps=1), **options)

    run()
    wanted = read_losses(output)
    assert list_steps(output) == [2, 3]
    checkpoints = output / CHECKPOINTS
    shutil.rmtree(output / "model", ignore_errors=True)
    shutil.rmtree(checkpoints / "checkpoint-3")
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-1")
    for folder in checkpoints.iterdir():
        os.utime(folder, (FUTURE, FUTURE))
    run(resume=True)
    assert list_steps(output) == [2, 3] and read_losses(output) == wanted
