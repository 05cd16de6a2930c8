"""Kills every command at names that appear and at random moments, and lets it go on.

A case kills the runs of one command in one folder, up to three times. The call that is left alone
at the end must end with the undisturbed output, and nothing half written may stay beside it.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from faults.commands import COMMANDS, Command, prepare
from faults.counts import Counts, Outcome, judge_refusal
from faults.processes import LIMIT, Ended, compute, import_everything, start

_MOST_NAMES = 2  # that kill in one case, beside one random moment
_MOST_RANDOM = 3  # moments in a case without names
_TIMES_UNDISTURBED = 10  # at which a run has hung


@dataclass(frozen=True)
class Undisturbed:
    """A run without kills: its output, and when it began to write and ended."""

    output: object
    begins: float
    ends: float


def run(folder: Path, seconds: float, seed: int) -> Counts:
    """Kill each command in one case, and go round as long as there is time."""
    import_everything()
    inputs, counts = prepare(folder), Counts()
    undisturbed = {command: _run_undisturbed(command, inputs, folder) for command in COMMANDS}
    ends = time.monotonic() + seconds
    for number in count():
        for command, whole in undisturbed.items():
            if number and time.monotonic() > ends:
                return counts
            place = f"{seed}/{command.name}/{number}"
            case = _Case(command, inputs, folder / "case", whole)
            outcome, details = case.run(place)
            if case.num_kills or outcome != "harmless":  # it may have ended before the first one
                counts.add(outcome, place, details)
    raise AssertionError("unreachable")


def _run_undisturbed(command: Command, inputs: Mapping[str, Path], folder: Path) -> Undisturbed:
    output = command.begin(inputs, folder / "case")
    names = _list_paths(output.parent, "**/*")
    fork = start(command.fill_in(inputs, output.parent), output.parent)
    begins: list[float] = []

    def note_begin() -> bool:
        if not begins and _list_paths(output.parent, "**/*") - names:
            begins.append(time.monotonic() - fork.started)
        return False

    ended = fork.wait(until=note_begin)
    if ended.code != 0:
        raise RuntimeError(f"{command.name}: exit code {ended.code}: {ended.log[-3000:]}")
    read = compute(command.read, output, folder=output.parent)
    return Undisturbed(read, begins[0] if begins else 0, ended.seconds)


@dataclass
class _Case:
    command: Command
    inputs: Mapping[str, Path]
    folder: Path
    undisturbed: Undisturbed
    num_kills: int = 0

    def run(self, place: str) -> tuple[Outcome, str]:
        """Kill the runs of a case, whose draws depend on its place, and judge what is left."""
        self.command.begin(self.inputs, self.folder)
        kills = self._draw(random.Random(place))
        done: list[str] = []
        for description, is_due in kills:
            ended = self._start(is_due)
            if ended.code != -signal.SIGKILL:
                break
            self.num_kills += 1
            done.append(f"{description} ({ended.seconds:.2f} s)")
        else:
            ended = self._start(None)
        outcome, details = self._judge(ended)
        return outcome, f"killed at {', '.join(done) or 'no moment'}; {details}"

    def _draw(self, drawn: random.Random) -> list[tuple[str, Callable[[float], bool]]]:
        """Draw some of the names in their order, and then random moments."""
        names = sorted(drawn.sample(range(len(self.command.moments)),
                                    min(_MOST_NAMES, len(self.command.moments))))  # fmt: skip
        patterns = [self.command.moments[number] for number in names]
        num_random = 1 if patterns else drawn.randint(1, _MOST_RANDOM)
        begins, ends = self.undisturbed.begins / 2, self.undisturbed.ends
        moments = [drawn.uniform(begins, ends) for _ in range(num_random)]
        return [
            *((pattern, self._wait_for(pattern)) for pattern in patterns),
            *((f"{moment:.2f} s", moment.__lt__) for moment in moments),
        ]

    def _wait_for(self, pattern: str) -> Callable[[float], bool]:
        """Tell whether there is a new name, once the folder is as the runs before left it."""
        known: set[Path] | None = None

        def is_there(_: float) -> bool:
            nonlocal known
            names = _list_paths(self.folder, pattern)
            known = names if known is None else known
            return bool(names - known)

        return is_there

    def _start(self, is_due: Callable[[float], bool] | None) -> Ended:
        words = self.command.fill_in(self.inputs, self.folder)
        if is_due is None:
            limit = max(LIMIT, _TIMES_UNDISTURBED * self.undisturbed.ends)
            return start(words, self.folder).wait(limit)
        is_due(0)  # what is there already
        fork = start(words, self.folder)
        return fork.wait(until=lambda: is_due(time.monotonic() - fork.started))

    def _judge(self, ended: Ended) -> tuple[Outcome, str]:
        if ended.code is None:
            return "hung", ended.log
        try:
            read = compute(self.command.read, self.folder / self.command.output, folder=self.folder)
        except RuntimeError as error:
            return "lost", f"exit code {ended.code}: {ended.log}\n{error}"
        if read != self.undisturbed.output:
            # A call that is refused since a killed one had finished keeps the whole output.
            return "lost" if ended.code else "silently_wrong", ended.log
        left = [path for path in self.folder.rglob("*") if _is_half_written(path, self.folder)]
        if left:
            return "lost", f"{left} stay"
        if ended.code:
            places = (str(self.folder), self.command.output)
            return judge_refusal(ended.code, ended.log, places), ended.log
        return "harmless", ""


def _list_paths(folder: Path, pattern: str) -> set[Path]:
    """Return the paths of a pattern, while a run removes and renames folders."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # raised by Python below 3.13
            return set(folder.glob(pattern))


def _is_half_written(path: Path, folder: Path) -> bool:
    """Tell whether a file with content is hidden, or temporary by its name."""
    parts = path.relative_to(folder).parts
    is_hidden = any(part.startswith(".") for part in parts[:-1]) and parts[-1][0] != "."
    return path.is_file() and path.stat().st_size > 0 and (is_hidden or path.suffix == ".tmp")
