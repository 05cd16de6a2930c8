"""Two writers of one output at once, equal ones or different ones.

What is there in the end must be the result of the one that ended well, or of one after the other;
who does not end well is refused by name, with a remedy. If nobody ends well, the next call must.
Nothing else may be left, but the whole result of a refused writer whose message says where.
"""

from __future__ import annotations

import itertools
import random
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from faults.commands import COMMANDS, Command, prepare
from faults.counts import FEWEST_CASES, Counts, Outcome, judge_refusal
from faults.processes import Ended, Fork, compute, import_everything, start

_AT_ONCE = _EQUAL = 0.5  # shares of the pairs
_REMEDY = re.compile(r"\b(Wait|[Cc]hoose|Resume|Continue)\b")
_Call: TypeAlias = tuple[str, ...]  # words that are added to those of a row


def run(folder: Path, seconds: float, seed: int) -> Counts:
    """Start two writers of every command in turn.

    Args:
        folder: where everything goes.
        seconds: after which no more are started, except the fewest that a harness has.
        seed: decides which calls start, and when.
    """
    import_everything()
    pairs, started = _Pairs(folder, seed), time.monotonic()
    for command in itertools.cycle(COMMANDS):
        is_over = time.monotonic() - started > seconds
        if is_over and pairs.counts.cases >= FEWEST_CASES:
            break
        pairs.try_pair(command)
    return pairs.counts


class _State(NamedTuple):
    """Content of an output, as its command compares it, and all names beside it."""

    result: object
    names: set[str]


class _Pairs:
    """Draws pairs of calls, and judges what came of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.case, self.seed, self.random = folder / "case", seed, random.Random(seed)
        self.inputs: Mapping[str, Path] = prepare(folder)
        self.counts = Counts()
        self.in_turn: dict[tuple[str, tuple[_Call, ...]], _State | None] = {}
        self.seconds: dict[str, float] = {}

    def try_pair(self, command: Command) -> None:
        """Start two writers, wait until both have ended, and count the outcome."""
        is_equal = self.random.random() < _EQUAL or not command.different
        share = 0.0 if self.random.random() < _AT_ONCE else self.random.random()
        calls: list[_Call] = [(), () if is_equal else command.different]
        self._run_in_turn(command, ())
        delay = share * self.seconds[command.name]
        case = f"--seed {self.seed}, pair {self.counts.cases}: {command.name} {calls[1]}"
        command.begin(self.inputs, self.case)
        writers = [self._start(command, calls[0])]
        time.sleep(delay)
        writers.append(self._start(command, calls[1]))
        ended = [writer.wait() for writer in writers]
        outcome, reason = self._judge(command, calls, ended)
        logs = "\n".join(f"exit code {writer.code}: {writer.log[-900:]}" for writer in ended)
        self.counts.add(outcome, f"{case}, {delay:.2f} s apart", f"{logs}\n{reason}")

    def _judge(
        self, command: Command, calls: Sequence[_Call], ended: Sequence[Ended]
    ) -> tuple[Outcome, str]:
        """Return the outcome of two calls, and why it is a bad one."""
        if any(writer.code is None for writer in ended):
            return "hung", ""
        well = [call for call, writer in zip(calls, ended, strict=True) if writer.code == 0]
        for call in calls:
            if not well and self._start(command, call).wait().code == 0:
                well = [call]
        if not well:
            return "lost", "Neither call ends well afterwards."
        legal = [self._run_in_turn(command, *order) for order in (well, well[::-1])]
        states = [state for state in legal if state is not None]
        if not states:
            return "lost", "Both ended well, and one after the other they do not."
        result, names = self._read(command, command.output)
        if result not in [state.result for state in states]:
            return "silently_wrong", "Another result is there."
        for name in names - states[0].names:
            if not self._is_kept(command, name, calls, ended):
                return "lost", f"{name} is left."
        refused = [writer for writer in ended if writer.code]
        for writer in refused:
            places = (str(self.case), command.output)
            if judge_refusal(writer.code, writer.log, places) == "unnamed":
                return "unnamed", "The message names no place."
            if not _REMEDY.search(writer.log):
                return "unnamed", "The message has no remedy."
        return "refused_by_name" if refused else "harmless", ""

    def _is_kept(
        self, command: Command, name: str, calls: Sequence[_Call], ended: Sequence[Ended]
    ) -> bool:
        """Tell whether a refused writer says that its result is under a name, and is right."""
        kept = self._read(command, name).result
        for call, writer in zip(calls, ended, strict=True):
            alone = self._run_in_turn(command, call)
            if writer.code and name in writer.log and alone is not None and kept == alone.result:
                return True
        return False

    def _run_in_turn(self, command: Command, *calls: _Call) -> _State | None:
        """Return what calls leave, one after the other; None if the last one is refused."""
        if (key := (command.name, calls)) not in self.in_turn:
            behind = self.case.with_name("behind")
            if self.case.exists():
                self.case.rename(behind)
            command.begin(self.inputs, self.case)
            for call in calls:
                ended = self._start(command, call).wait()
                self.seconds.setdefault(command.name, ended.seconds)
            if ended.code is None or (ended.code and len(calls) == 1):
                raise RuntimeError(f"{command.name} {calls}: {ended.code}: {ended.log[-3000:]}")
            state = None if ended.code else self._read(command, command.output)
            if state is not None and state.result is None:
                raise RuntimeError(f"{command.name} {calls} left nothing that can be read")
            self.in_turn[key] = state
            shutil.rmtree(self.case)
            if behind.exists():
                behind.rename(self.case)
        return self.in_turn[key]

    def _start(self, command: Command, call: _Call) -> Fork:
        return start(command.fill_in(self.inputs, self.case, *call), self.case)

    def _read(self, command: Command, name: str) -> _State:
        read: tuple[object, set[str]] = compute(_read, command, self.case, name, folder=self.case)
        return _State(*read)


def _read(command: Command, folder: Path, name: str) -> tuple[object, set[str]]:
    try:
        result = command.read(folder / name)
    except (OSError, ValueError, KeyError):  # nothing whole is there
        result = None
    return result, {path.name for path in folder.iterdir()}
