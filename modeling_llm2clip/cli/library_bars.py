"""Progress bars of libraries, such as "Loading weights" of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial


def wants_no_bars(run: Callable[[], object]) -> bool:
    """Whether a command is run with `--no-show-progress`.

    Args:
        run: The call of the command, with its configs.
    """
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
