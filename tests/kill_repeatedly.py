"""Kills an `llm2clip` command at random moments until it has died often enough.

    python tests/kill_repeatedly.py --times 20 FOLDER -- extract MODEL DATA {output}

The command first runs undisturbed into FOLDER/undisturbed, which also tells how long it takes until
it writes and until it ends. Then it runs into FOLDER/killed-0, is killed (SIGKILL) at a random
moment, and run again, so often that about as much work as there is passes between the kills. If it
completes before it has died often enough, another round begins in FOLDER/killed-1, and so on. Every
finished folder must equal the undisturbed one; what equal means is the caller's to say.
FOLDER/report.json has `seconds`, `seconds_to_first_file`, `kills` (moments) and `folders`.

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
from dataclasses import dataclass
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
    undisturbed = run_once(arguments.command, arguments.folder / "undisturbed", log)
    _require_success(undisturbed, log)
    moments, folders = _kill_until_enough(arguments, undisturbed, log)
    report = {
        "seconds": undisturbed.seconds,
        "seconds_to_first_file": undisturbed.seconds_to_first_file,
        "kills": moments,
        "folders": folders,
    }
    (arguments.folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _kill_until_enough(
    arguments: argparse.Namespace, undisturbed: Life, log: Path
) -> tuple[list[float], list[str]]:
    generator = random.Random(arguments.seed)
    begins = undisturbed.seconds_to_first_file
    longest = begins + 2 * (undisturbed.seconds - begins) / arguments.times
    moments: list[float] = []
    folders = []
    for number in range(_MOST_ROUNDS):
        folder = arguments.folder / f"killed-{number}"
        folders.append(str(folder))
        while len(moments) < arguments.times:
            moment = generator.uniform(begins / 2, longest)
            life = run_once(arguments.command, folder, log, kill_after=moment)
            if life.code != -signal.SIGKILL:
                break
            moments.append(round(moment, 3))
        else:
            life = run_once(arguments.command, folder, log)
        _require_success(life, log)
        if len(moments) == arguments.times:
            return moments, folders
    raise SystemExit(f"Only {len(moments)} kills in {_MOST_ROUNDS} rounds: the command is short.")


@dataclass(frozen=True)
class Life:
    """One run: its exit code, or the negative signal that killed it, and how long it took."""

    code: int
    seconds: float
    seconds_to_first_file: float


def run_once(
    command: list[str], output: Path, log: Path, *, kill_after: float = float("inf")
) -> Life:
    """Run a command in a fork, and kill it after so many seconds."""
    argv = [word.replace("{output}", str(output)) for word in command]
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(argv, log)
    first_file = 0.0
    while True:
        seconds = time.monotonic() - started
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return Life(os.waitstatus_to_exitcode(status), seconds, first_file)
        if seconds >= kill_after:
            os.kill(child, signal.SIGKILL)
        if not first_file and output.is_dir() and any(output.iterdir()):
            first_file = seconds
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


def _require_success(life: Life, log: Path) -> None:
    if life.code:
        raise SystemExit(f"exit code {life.code}; the log ends with:\n{log.read_text()[-2000:]}")


if __name__ == "__main__":
    main()
