"""The lock on the folder of a training run: two runs at once would mix their files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..data.atomic_files import lock_unless_held
from .run_folder import LOCK_FILE

_HELD: set[IO[str]] = set()
_ATTEMPTS = 100


def _close_inherited() -> None:
    """Leave the lock to the main process alone: workers of a loader outlive it for seconds."""
    while _HELD:
        _HELD.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold the folder of a run for the processes of one launcher, or refuse to begin.

    It is a lock of the kernel on a file in the folder, so that it ends with the main process,
    however that ends. Where the file system has no `flock`, nothing is locked. A folder that is
    empty in the end is removed.
    """
    with ExitStack() as stack:
        is_held = [True]
        if PartialState().is_main_process:
            is_held = [stack.enter_context(_hold(folder))]
        broadcast_object_list(is_held)
        if not is_held[0]:
            raise ValueError(
                f"{folder} is in use: another process trains in it now. Let it end and continue "
                "its run with --resume ('resume=True' in Python), or choose a new folder."
            )
        yield


@contextmanager
def _hold(folder: Path) -> Iterator[bool]:
    file = folder / LOCK_FILE
    with _open(file) as opened:
        is_held = lock_unless_held(file, opened)  # a run that ended has removed its own
        if is_held:
            _HELD.add(opened)
        try:
            yield is_held
        finally:
            _HELD.discard(opened)
            if is_held:
                file.unlink(missing_ok=True)
                with suppress(OSError):  # it is not empty, or another run removes it
                    folder.rmdir()


def _open(file: Path) -> IO[str]:
    """Open a file in a folder that is made, and that a run which ends may remove meanwhile."""
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError, FileExistsError):
            file.parent.mkdir(parents=True, exist_ok=True)
            return file.open("a", encoding="utf-8")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.open("a", encoding="utf-8")
