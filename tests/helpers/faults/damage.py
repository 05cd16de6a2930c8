"""Damages files, and judges what their readers make of them.

A case changes one file of a target, in its bytes or, where its format has any, in its fields. It
may read as the undisturbed file does, or be refused by a message with the name of the file or of
its folder. A target whose files are data of a user names an independent reader: other data that
are valid must be read as that reads them.

Each case runs in a fork with limits of time and memory, so that a crash is a case, too. A case is
repeated by its name: `python -m faults.targets_in 0/tar/17`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.counts import Counts, Outcome
from faults.mutations import mutate
from faults.processes import Fork
from modeling_llm2clip.__main__ import _describe, main

_SECONDS, _TIMES_UNDISTURBED = 60.0, 10  # of a case, before it counts as hung
_MOST_SECONDS = 1800  # to make the files of a target, such as a whole recipe
_BYTES = 4 << 30  # of memory that a case may take
_STARTS_THREADS = ("lancedb", "ray")  # when they are imported, which no fork has
_SHARE_RESTORED = 0.2  # of cases after which the whole files are read again


@dataclass(frozen=True)
class Target:
    """Files that are read, and how.

    Attributes:
        name: Name of the target.
        make: Writes the files into an empty folder; returns the file or folder to damage.
        read: Reads them as a user's call does, and returns what `repr` compares.
        expect: Reads them independently of the package: what is read must be the same, and what
            this cannot read must be refused. `anything` for files whose every content is one of
            its own. Without it, only the undisturbed result is right.
        files: Patterns of the files that are damaged.
        ways: Damage to their "bytes", their "fields", or both.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    expect: Callable[[Path], object] | None = None
    files: tuple[str, ...] = ("*",)
    ways: tuple[str, ...] = ("bytes", "fields")


class RefusalError(Exception):
    """A command ended with this message."""


def anything(path: Path) -> object:  # noqa: ARG001
    """Expect any result: no independent reader can say which is right."""
    return anything


def call(*words: object, codes: Sequence[int] = (0,)) -> int:
    """Run a command in this process; what it prints goes to the log of the case."""
    sys.stderr.flush()
    printed = os.lseek(2, 0, os.SEEK_CUR)
    code = main([*map(str, words)])
    if code not in codes:
        sys.stderr.flush()
        raise RefusalError(os.pread(2, 1 << 20, printed).decode(errors="replace"))
    return code


def run_targets(targets: Sequence[Target], folder: Path, seconds: float, seed: int) -> Counts:
    """Damage each target for its share of the time, at least once."""
    counts, ends = Counts(), time.monotonic() + seconds
    for place, target in enumerate(targets):
        harness = _Harness(target, folder / target.name.replace(" ", "-"), seed)
        share_ends = time.monotonic() + (ends - time.monotonic()) / (len(targets) - place)
        number = 0
        while not number or time.monotonic() < share_ends:
            outcome, details = harness.run(number)
            counts.add(outcome, f"{seed}/{target.name}/{number}", details)
            number += 1
        shutil.rmtree(harness.folder)
    gc.unfreeze()
    return counts


def repeat(targets: Sequence[Target]) -> None:
    """Run the case that the command line names, and print what happened."""
    import tempfile

    seed, name, number = sys.argv[1].split("/")
    with tempfile.TemporaryDirectory() as folder:
        target = next(target for target in targets if target.name == name)
        outcome, details = _Harness(target, Path(folder) / "case", int(seed)).run(int(number))
        sys.stdout.write(f"{outcome}: {details}\n")


class _Harness:
    """A target's files, made once, and its cases."""

    def __init__(self, target: Target, folder: Path, seed: int) -> None:
        self.target, self.folder, self.seed = target, folder, seed
        self.whole, self.copy = folder / "whole", folder / "given"
        self.report = folder / "report.json"
        self.whole.mkdir(parents=True)
        started = time.monotonic()
        outcome, made = self._fork(self._make, limit=_MOST_SECONDS)
        if outcome != "made":
            raise RuntimeError(f"{target.name} cannot be read undamaged: {made}")
        self.limit = max(_SECONDS, _TIMES_UNDISTURBED * (time.monotonic() - started))
        root, self.undisturbed, modules = json.loads(made)
        self.root = Path(root)
        for name in modules:  # once, not in every case
            if not name.startswith(_STARTS_THREADS):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        gc.freeze()

    def run(self, number: int) -> tuple[Outcome, str]:
        """Run one case; return its outcome, and its details."""
        rng = random.Random(f"{self.seed}/{self.target.name}/{number}")
        is_restored = rng.random() < _SHARE_RESTORED
        outcome, details = self._fork(lambda: self._damage(rng), limit=self.limit)
        if outcome in ("harmless", "refused_by_name") and is_restored:
            again, more = self._fork(self._restore, limit=self.limit)
            if again != "harmless":
                return "lost", f"{details}; whole again: {more}"
        return outcome, details

    def _make(self) -> tuple[str, str]:
        before = {*sys.modules}
        root = self.target.make(self.whole).relative_to(self.whole)
        self._copy_whole()
        value = repr(self.target.read(self.copy / root))
        return "made", json.dumps([str(root), value, sorted({*sys.modules} - before)])

    def _copy_whole(self) -> None:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.whole, self.copy, symlinks=True)

    def _damage(self, rng: random.Random) -> tuple[str, str]:
        self._copy_whole()
        root = self.copy / self.root
        files = [root]
        if root.is_dir():
            files = [file for pattern in self.target.files for file in root.rglob(pattern)]
            files = sorted({file for file in files if file.is_file()})
        file = rng.choice(files)
        details = f"{file.relative_to(self.copy)}: {mutate(file, rng, self.target.ways)}"
        self.report.write_text(json.dumps(["unnamed", details]), encoding="utf-8")
        return self._judge(root, details, self._list_names(file))

    def _list_names(self, file: Path) -> set[str]:
        """List what names a file: folders whose names are plain words by their paths alone."""
        below = [file, *file.parents][: len(file.relative_to(self.copy).parts)]
        return {*map(str, below), *(path.name for path in below if not path.name.isalpha())}

    def _restore(self) -> tuple[str, str]:
        for file in self.whole.rglob("*"):
            place = self.copy / file.relative_to(self.whole)
            if file.is_file():
                if place.is_dir():
                    shutil.rmtree(place)
                shutil.copy2(file, place)
        value = repr(self.target.read(self.copy / self.root))
        return ("harmless" if value == self.undisturbed else "lost"), value[:500]

    def _judge(self, root: Path, details: str, names: set[str]) -> tuple[str, str]:
        try:
            value = repr(self.target.read(root))
        except BaseException as error:
            message = str(error) if isinstance(error, RefusalError) else _describe_error(error)
            details = f"{details}: {message or traceback.format_exc()}"
            named = message is not None and any(name in message for name in names)
            return ("refused_by_name" if named else "unnamed"), details
        if self.target.expect is None:
            expected = self.undisturbed
        else:
            try:
                expected = repr(self.target.expect(root))
            except Exception as error:
                expected = f"a refusal, as of {error!r}"
        if value == expected or expected == repr(anything):
            return "harmless", details
        return "silently_wrong", f"{details}: read {value[:600]}, expected {expected[:600]}"

    def _fork(self, job: Callable[[], tuple[str, str]], *, limit: float) -> tuple[str, str]:
        self.report.write_text(json.dumps(["unnamed", ""]), encoding="utf-8")

        def work() -> None:
            _limit_memory()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            self.report.write_text(json.dumps(job()), encoding="utf-8")

        fork = Fork(work, self.folder)
        ended = fork.wait(limit)
        fork.log.unlink()
        outcome, details = json.loads(self.report.read_text(encoding="utf-8"))
        if ended.code == 0:
            return outcome, details
        is_hung = ended.code is None
        details = f"{details}: exit code {ended.code}; {ended.log[-2000:]}"
        return ("hung" if is_hung else "unnamed"), details


def _limit_memory() -> None:
    """Allow so many bytes more than the process has; only Linux says how many it has."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + _BYTES
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _describe_error(error: BaseException) -> str | None:
    return _describe(error) if isinstance(error, Exception) else None
