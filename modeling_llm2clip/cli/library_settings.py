"""Settings of libraries for the whole command: progress bars, and how long threads spin."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial

# A user who has set one of these has chosen. Those of other OpenMPs (KMP_…) mean nothing to GNU's,
# and `accelerate launch --cpu` sets them for every process.
_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Rounds of GNU OpenMP, which PyTorch's wheels for Linux use: a few microseconds. Its default is
# milliseconds, in which a thread that waits takes a core from the one that computes, wherever there
# are fewer free cores than threads. Threads that sleep at once (OMP_WAIT_POLICY=PASSIVE) are slower
# on an idle machine. benchmarks/busy_machine.py compares all three.
_SPIN_COUNT = 10_000


def wants_no_bars(run: Callable[[], object]) -> bool:
    """Tell whether a command is run with `--no-show-progress`."""
    configs = run.keywords.values() if isinstance(run, partial) else ()
    return any(getattr(config, "show_progress", True) is False for config in configs)


@contextmanager
def library_bars_hidden() -> Iterator[None]:
    """Hide the bars of transformers and huggingface_hub, and show them again afterwards."""
    from transformers.utils import logging

    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep waiting threads from spinning for long, unless the user chose, or torch is loaded.

    OpenMP reads its settings when torch loads it. Child processes inherit them.
    """
    if "torch" not in sys.modules and not any(name in environment for name in _CHOICES):
        environment["GOMP_SPINCOUNT"] = str(_SPIN_COUNT)
