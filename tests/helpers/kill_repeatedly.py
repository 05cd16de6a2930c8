"""Kills an `llm2clip` command at random moments until it has died often enough.

    python tests/helpers/kill_repeatedly.py --times 20 FOLDER -- extract MODEL DATA {output}
    python tests/helpers/kill_repeatedly.py --times 5 --again=--resume --at run.json \
        --at '.model-*' FOLDER -- align MODEL DATA {output}

The command first runs undisturbed into FOLDER/undisturbed, which also shows how long it takes until
it writes and until it ends. Then it runs into FOLDER/killed-0, is killed (SIGKILL) at a random
moment, and run again, so often that about as much work as there is passes between the kills. If it
completes before it has died often enough, another round begins in FOLDER/killed-1, and so on. With
`--at PATTERN`, which may be repeated, one more folder, FOLDER/killed-at, sees one kill for each
pattern: as soon as there is a new file or folder of such a name. `--again=FLAG` is added to a
command whose folder holds something already. In a word that names a YAML file, `{output}` is
replaced in a copy of that file beside the output. Every finished folder must equal the undisturbed
one; what equal means is the caller's to say. FOLDER/report.json has `seconds`,
`seconds_to_first_file`, `kills` (moments of the random ones), `kills_at` (moments by pattern) and
`folders`.

All imports are done once, and every run is a fork: a kill then hits the work, not the imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Imported by every run of a training command; imports alone start no threads.
_PRELOADED = ("torch", "transformers", "accelerate", "modeling_llm2clip.__main__",
              "modeling_llm2clip.embedding.extract",
              "modeling_llm2clip.training.alignment.align",
              "modeling_llm2clip.model_folders.model_writing",
              "modeling_llm2clip.embedding.embed",
              "modeling_llm2clip.recipes.train",
              "torch.utils.tensorboard")  # fmt: skip
_MOST_ROUNDS = 50
_MOST_ATTEMPTS = 3


def main() -> None:
    """Run, kill, and write down what happened."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", action="append", default=[], help="pattern of a name in the folder")
    parser.add_argument("--again", help="flag of a command whose folder holds something already")
    parser.add_argument("command", nargs="+", help="arguments of llm2clip, {output} among them")
    arguments = parser.parse_args()
    for module in _PRELOADED:
        importlib.import_module(module)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(arguments.command, again=arguments.again, log=arguments.folder / "log.txt")
    undisturbed = runs.complete(arguments.folder / "undisturbed")
    killed_at = _kill_at_each(runs, arguments.at, arguments.folder / "killed-at")
    moments, folders = _kill_until_enough(runs, arguments, undisturbed)
    report = {
        "seconds": undisturbed.seconds,
        "seconds_to_first_file": undisturbed.seconds_to_first_file,
        "kills": moments,
        "kills_at": killed_at,
        "folders": [*([str(arguments.folder / "killed-at")] if killed_at else []), *folders],
    }
    (arguments.folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _kill_at_each(runs: Runs, patterns: list[str], folder: Path) -> dict[str, float]:
    moments = {}
    before = folder.with_name(f"{folder.name}-before")
    for pattern in patterns:
        for _ in range(_MOST_ATTEMPTS):
            _copy(folder, before)
            life = runs.run(folder, kill_at=pattern)
            if life.code == -signal.SIGKILL:
                break
            # This process saw no name that was there for a moment only: other processes ran.
            _copy(before, folder)
        else:
            raise SystemExit(f"exit code {life.code} before there was a new {pattern} in {folder}.")
        moments[pattern] = round(life.seconds, 3)
    if patterns:
        runs.complete(folder)
    return moments


def _kill_until_enough(
    runs: Runs, arguments: argparse.Namespace, undisturbed: Life
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
            life = runs.run(folder, kill_after=moment)
            if life.code != -signal.SIGKILL:
                runs.require_success(life)
                break
            moments.append(round(moment, 3))
        else:
            runs.complete(folder)
        if len(moments) == arguments.times:
            return moments, folders
    raise SystemExit(f"Only {len(moments)} kills in {_MOST_ROUNDS} rounds: the command is short.")


@dataclass(frozen=True)
class Life:
    """One run: its exit code, or the negative signal that killed it, and how long it took."""

    code: int
    seconds: float
    seconds_to_first_file: float


@dataclass(frozen=True)
class Runs:
    """Runs one command in forks.

    Attributes:
        command: arguments of llm2clip, `{output}` among them.
        again: flag that is added where the output folder holds something already.
        log: file for what the runs print.
    """

    command: list[str]
    again: str | None
    log: Path

    def run(self, output: Path, *, kill_after: float = math.inf, kill_at: str = "") -> Life:
        """Run once; kill after so many seconds, or when a new name fits the pattern `kill_at`."""
        argv = [_fill_in(word, output) for word in self.command]
        if self.again and _list_names(output):
            argv.append(self.again)
        known = _list_names(output, kill_at)
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _become(argv, self.log)
        first_file = 0.0
        while True:
            seconds = time.monotonic() - started
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return Life(os.waitstatus_to_exitcode(status), seconds, first_file)
            if seconds >= kill_after or _list_names(output, kill_at) - known:
                os.kill(child, signal.SIGKILL)
            if not first_file and _list_names(output):
                first_file = seconds
            time.sleep(0.002)

    def complete(self, output: Path) -> Life:
        """Run undisturbed to the end."""
        life = self.run(output)
        self.require_success(life)
        return life

    def require_success(self, life: Life) -> None:
        """Exit with the end of the log when a run failed."""
        if life.code:
            tail = self.log.read_text()[-2000:]
            raise SystemExit(f"exit code {life.code}; the log ends with:\n{tail}")


def _copy(folder: Path, to: Path) -> None:
    """Replace a folder by a copy of another one, which may not exist."""
    shutil.rmtree(to, ignore_errors=True)
    if folder.exists():
        shutil.copytree(folder, to, symlinks=True)


def _fill_in(word: str, output: Path) -> str:
    """Replace `{output}` in a word, or in the YAML file that it names."""
    if not word.endswith(".yaml"):
        return word.replace("{output}", str(output))
    filled = output.with_suffix(".yaml")
    text = Path(word).read_text(encoding="utf-8")
    filled.write_text(text.replace("{output}", str(output)), encoding="utf-8")
    return str(filled)


def _list_names(folder: Path, pattern: str = "*") -> set[Path]:
    return set(folder.glob(pattern)) if pattern else set()


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


if __name__ == "__main__":
    main()
