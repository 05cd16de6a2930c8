"""Kills an `llm2clip` command at random moments until it has died often enough.

    python tests/kill_repeatedly.py --times 20 FOLDER -- extract MODEL DATA {output}

The command first runs undisturbed into FOLDER/undisturbed, which also tells how long it takes.
Then it runs into FOLDER/killed-0, is killed (SIGKILL) at a moment drawn from that time, and run
again, until it completes; if it has not died often enough by then, another round begins in
FOLDER/killed-1, and so on. Every finished folder must equal the undisturbed one; what equal means
is the caller's to say. FOLDER/report.json has `seconds`, `kills` (moments) and `folders`.

All imports are done once, and every run is a fork: a kill then hits the work, not the imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

# Imported by every run of a training command; imports alone start no threads.
_PRELOADED = ("torch", "transformers", "accelerate", "modeling_llm2clip.__main__",
              "modeling_llm2clip.training.caption_extraction",
              "modeling_llm2clip.training.picture_extraction")  # fmt: skip
_MOST_ROUNDS = 50


def main() -> None:
    """Run, kill, and write down what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("command", nargs="+", help="arguments of llm2clip, {output} among them")
    arguments = parser.parse_args()
    for module in _PRELOADED:
        importlib.import_module(module)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    log = arguments.folder / "log.txt"
    started = time.monotonic()
    _require_success(run_once(arguments.command, arguments.folder / "undisturbed", log), log)
    seconds = time.monotonic() - started
    moments, folders = _kill_until_enough(arguments, seconds, log)
    report = {"seconds": seconds, "kills": moments, "folders": folders}
    (arguments.folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _kill_until_enough(
    arguments: argparse.Namespace, seconds: float, log: Path
) -> tuple[list[float], list[str]]:
    generator = random.Random(arguments.seed)
    moments: list[float] = []
    folders = []
    for number in range(_MOST_ROUNDS):
        folder = arguments.folder / f"killed-{number}"
        folders.append(str(folder))
        while len(moments) < arguments.times:
            moment = generator.uniform(0, seconds)
            code = run_once(arguments.command, folder, log, kill_after=moment)
            if code != -signal.SIGKILL:
                break
            moments.append(round(moment, 3))
        else:
            code = run_once(arguments.command, folder, log)
        _require_success(code, log)
        if len(moments) == arguments.times:
            return moments, folders
    raise SystemExit(
        f"Only {len(moments)} kills in {_MOST_ROUNDS} rounds: the command is too short."
    )


def run_once(
    command: list[str], output: Path, log: Path, *, kill_after: float | None = None
) -> int:
    """Run a command in a fork; returns its exit code, or the negative signal that killed it."""
    argv = [word.replace("{output}", str(output)) for word in command]
    child = os.fork()
    if child == 0:
        _become(argv, log)
    killed_at = None if kill_after is None else time.monotonic() + kill_after
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if killed_at is not None and time.monotonic() >= killed_at:
            os.kill(child, signal.SIGKILL)
            killed_at = None
        time.sleep(0.002)


def _become(argv: list[str], log: Path) -> None:
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        from modeling_llm2clip.__main__ import main as llm2clip

        code = llm2clip(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _require_success(code: int, log: Path) -> None:
    if code:
        raise SystemExit(f"exit code {code}; the log ends with:\n{log.read_text()[-2000:]}")


if __name__ == "__main__":
    main()
