"""Commands and functions in forks of a process that has imported everything.

A kill then hits the work, not the imports. What forks must not have started threads: lancedb is not
imported here, and no model computes; `compute` does both in a fork.
"""

from __future__ import annotations

import importlib
import math
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

LIMIT = 900.0  # seconds after which a command has hung; each takes a few on an idle machine
_PRELOADED = (
    "torch", "transformers", "accelerate", "modeling_llm2clip.__main__",
    "modeling_llm2clip.building.build_model", "modeling_llm2clip.conversion.convert_checkpoint",
    "modeling_llm2clip.embedding.embed", "modeling_llm2clip.embedding.extract",
    "modeling_llm2clip.evaluation.evaluate", "modeling_llm2clip.publishing.export_model",
    "modeling_llm2clip.recipes.train", "modeling_llm2clip.search.image_index",
    "modeling_llm2clip.search.tag_images", "modeling_llm2clip.training.alignment.align",
    "modeling_llm2clip.training.finetuning.finetune_llm", "torch.utils.tensorboard",
)  # fmt: skip
_numbers = count()


def import_everything() -> None:
    """Import what the commands import, once for all forks."""
    for module in _PRELOADED:
        importlib.import_module(module)


@dataclass(frozen=True)
class Ended:
    """How a fork ended.

    Attributes:
        code: exit code, or the negative number of the signal; None if it hung and was killed.
        log: what it printed.
        seconds: how long it took.
    """

    code: int | None
    log: str
    seconds: float


class Fork:
    """A running fork, whose current folder is `folder`.

    Its log, and `<folder>.scratch` with its temporary files and cache, are beside the folder.
    """

    def __init__(self, work: Callable[[], int | None], folder: Path) -> None:
        self.scratch = folder.with_name(f"{folder.name}.scratch")
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.log = folder.with_name(f"{folder.name}.{next(_numbers)}.log")
        self.started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(work, folder, self.scratch, self.log)
        self._ended: Ended | None = None

    def poll(self) -> Ended | None:
        """Return how the fork ended; None while it runs."""
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._note(os.waitstatus_to_exitcode(status))
        return self._ended

    def wait(self, limit: float = LIMIT, *, until: Callable[[], bool] = lambda: False) -> Ended:
        """Wait for its end; at the time limit its whole process group is killed.

        Args:
            limit: seconds from its start.
            until: the fork alone is killed as soon as this is true.
        """
        while (ended := self.poll()) is None:
            if until():
                self.kill()
            elif time.monotonic() - self.started > limit:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return self._note(None)
            time.sleep(0.002)
        return ended

    def kill(self) -> None:
        """Kill it, as the kernel does where memory is short; its workers see that it is gone."""
        os.kill(self.pid, signal.SIGKILL)

    def _note(self, code: int | None) -> Ended:
        log = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        self._ended = Ended(code, log, time.monotonic() - self.started)
        return self._ended


def start(words: Sequence[str], folder: Path) -> Fork:
    """Start `llm2clip WORDS` in a folder."""

    def work() -> int:
        from modeling_llm2clip.__main__ import main

        return main(words)

    return Fork(work, folder)


def run(words: Sequence[str], folder: Path, *, kill_after: float = math.inf) -> Ended:
    """Run `llm2clip WORDS` in a folder to its end, or kill it after so many seconds."""
    fork = start(words, folder)
    return fork.wait(until=lambda: time.monotonic() - fork.started >= kill_after)


def compute(function: Callable[..., Any], *arguments: Any, folder: Path) -> Any:
    """Return what a function returns in a fork, where it may start threads.

    Raises:
        RuntimeError: The function raised an error, or hung; the message has its traceback.
    """
    file = folder.with_name(f"{folder.name}.{next(_numbers)}.pickle")

    def work() -> None:
        file.write_bytes(pickle.dumps(function(*arguments)))

    ended = Fork(work, folder).wait()
    if ended.code != 0:
        raise RuntimeError(f"exit code {ended.code} of {function}: {ended.log[-2000:]}")
    value = pickle.loads(file.read_bytes())
    file.unlink()
    return value


def _become(work: Callable[[], int | None], folder: Path, scratch: Path, log: Path) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        descriptor = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(folder)
        os.environ.update(XDG_CACHE_HOME=str(scratch), TMPDIR=str(scratch))
        tempfile.tempdir = None  # read the variable anew
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
