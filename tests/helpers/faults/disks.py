"""Disks that become full: small ones in memory, of a size drawn for each case.

The small disk holds the output, or temporary files and caches. A command must end well, or be
refused with the place, the missing room and a remedy. When the disk has grown, the same call must
end with the result of a run that had room all the time, and leave no other name beside it.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from faults.commands import COMMANDS, Command, prepare, read_undisturbed
from faults.counts import FEWEST_CASES, Counts, NotHereError, judge_refusal
from faults.processes import compute, import_everything
from faults.processes import run as run_command

_APART = ("unshare", "--user", "--map-root-user", "--mount")
_PAGE = 4096  # bytes; a disk in memory consists of whole ones
_FILLER = ".filler"  # takes one page
_SHARE_OF_OUTPUTS, _SCRATCH_PAGES = 0.75, 24
_REMEDY = re.compile(r"(No room|No space left|GB free, but the model takes).*\b[Ff]ree ", re.DOTALL)


def run(folder: Path, seconds: float, seed: int) -> Counts:
    """Try cases in a process with mounts of its own, which most Linux systems let any user have.

    Args:
        folder: where everything goes.
        seconds: after which no case begins, except the fewest that a harness has.
        seed: what decides every case.

    Raises:
        NotHereError: This machine gives no small disks.
    """
    if reason := explain_no_disks():
        raise NotHereError(reason)
    words = [*_APART, sys.executable, "-m", "faults.disks", str(folder), str(seconds), str(seed)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return Counts(**json.loads(done.stdout.splitlines()[-1]))


def explain_no_disks() -> str | None:
    """Say why this machine gives no small disks; None if it does."""
    if shutil.which("unshare") is None:
        return "small disks need Linux, which has unshare"
    mount = [*_APART, *_mount(Path("/mnt"), 1)]
    refused = subprocess.run(mount, capture_output=True, check=False).returncode
    return "this machine lets no user mount a small disk" if refused else None


class _Undisturbed(NamedTuple):
    """A run with room: its result, and names and pages of all that is there afterwards."""

    result: Any
    names: set[str]
    pages: int


class _Disks:
    """Draws cases and judges them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.case, self.scratch = folder, folder / "case", folder / "case.scratch"
        self.seed, self.random = seed, random.Random(seed)
        self.inputs: Mapping[str, Path] = prepare(folder)
        self.counts = Counts()
        self.undisturbed: dict[str, _Undisturbed] = {}

    def try_case(self, command: Command) -> None:
        """Run a command on a small disk; where it is refused, make room and run it again."""
        on_output, share = self.random.random() < _SHARE_OF_OUTPUTS, self.random.random()
        if command.name not in self.undisturbed:
            self.undisturbed[command.name] = self._run_undisturbed(command)
        expected = self.undisturbed[command.name]
        self._begin(command)
        disk = self.case if on_output else self.scratch
        fewest, most = _count_pages(disk), expected.pages if on_output else _SCRATCH_PAGES
        pages = fewest + int(share * max(most - fewest, 2))
        name = (
            f"--seed {self.seed}, case {self.counts.cases}: {command.name}, "
            f"{'output' if on_output else 'scratch'} on {pages} pages"
        )
        with _small_disk(disk, pages):
            first = run_command(command.fill_in(self.inputs, self.case), self.case)
            ended = first
            (disk / _FILLER).unlink()
            if first.code:
                subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
                ended = run_command(command.fill_in(self.inputs, self.case), self.case)
            if None in (first.code, ended.code):
                self.counts.add("hung", name, f"{first.log}\n{ended.log}")
            elif ended.code:
                self.counts.add("lost", name, f"{first.log}\n{ended.log}")
            elif differences := self._compare(command, expected):
                self.counts.add("lost" if first.code else "silently_wrong", name, differences)
            elif first.code:
                outcome = judge_refusal(first.code, first.log, (str(disk), command.output))
                has_remedy = _REMEDY.search(first.log) is not None
                self.counts.add(outcome if has_remedy else "unnamed", name, first.log)
            else:
                self.counts.add("harmless", name)

    def _run_undisturbed(self, command: Command) -> _Undisturbed:
        result = read_undisturbed(command, self.inputs, self.folder)
        return _Undisturbed(result, _list_names(self.case), _count_pages(self.case))

    def _begin(self, command: Command) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        command.begin(self.inputs, self.case)

    def _compare(self, command: Command, expected: _Undisturbed) -> str:
        """Say in what a run differs from the undisturbed one; empty if in nothing."""
        if others := _list_names(self.case) ^ expected.names:
            return f"other names beside the output: {sorted(others)}"
        try:
            result = compute(command.read, self.case / command.output, folder=self.case)
        except RuntimeError as error:
            return f"an output that cannot be read: {error}"
        return "" if result == expected.result else "another result"


def _list_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _count_pages(folder: Path) -> int:
    sizes = (file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return sum(-(-size // _PAGE) for size in sizes)


def _mount(folder: Path, pages: int) -> list[str]:
    options = f"size={(pages + 1) * _PAGE},huge=never"  # no disk has no page
    return ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]


@contextmanager
def _small_disk(folder: Path, pages: int) -> Iterator[None]:
    """Put a small disk with the same files in the place of a folder."""
    behind = folder.with_name(f"{folder.name}.behind")
    folder.rename(behind)
    folder.mkdir()
    subprocess.run(_mount(folder, pages), check=True)
    try:
        shutil.copytree(behind, folder, dirs_exist_ok=True)
        (folder / _FILLER).write_bytes(bytes(_PAGE))
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(behind)


def _main(folder: str, seconds: str, seed: str) -> None:
    import_everything()
    from modeling_llm2clip.data.records import record_index
    from modeling_llm2clip.model_folders import weights

    # Tiny models and data take room as large ones do: for weights alone, and in a cache.
    weights._OTHER_FILES_BYTES = 0
    record_index._MOST_ROWS_IN_MEMORY = 0
    disks, started = _Disks(Path(folder), int(seed)), time.monotonic()
    for command in itertools.cycle(COMMANDS):
        is_over = time.monotonic() - started > float(seconds)
        if is_over and disks.counts.cases >= FEWEST_CASES:
            break
        disks.try_case(command)
    sys.stdout.write(f"{json.dumps(asdict(disks.counts))}\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
