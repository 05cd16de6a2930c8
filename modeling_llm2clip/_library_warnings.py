"""Warnings of libraries that a user can do nothing about, each hidden by its exact words.

Anything else that a library warns of is shown. Commands hide all of them; in Python the one of
bitsandbytes alone is hidden, while a public name is imported.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class _Hidden:
    """A warning that stays away.

    Attributes:
        begins: how it begins, word for word.
        source: the module that warns, or the logger.
        reason: why nobody needs to see it.
    """

    begins: str
    source: str
    reason: str


_PYTHON_WARNINGS = (
    _Hidden(
        "`is_gradient_checkpointing` is deprecated",
        "transformers.modeling_utils",
        "peft asks for it while it adds or merges a LoRA; we do not.",
    ),
)
_AT_IMPORT = _Hidden(
    "Failed to load CPU gemm_4bit_forward from kernels-community",
    "bitsandbytes.backends.cpu.ops",
    "transformers' Trainer imports peft, and peft bitsandbytes, which looks for a faster kernel.",
)
_LOG_RECORDS = (
    _Hidden(
        "mtime may not be reliable on this filesystem",
        "transformers.trainer_utils",
        "two checkpoints of one second; the numbers in their names order them all the same.",
    ),
    _AT_IMPORT,
)


class _Without(logging.Filter):
    """Lets every record of a logger pass but those that begin with certain words."""

    def __init__(self, begins: str) -> None:
        super().__init__()
        self.begins = begins

    def __eq__(self, other: object) -> bool:  # so that a logger gets it once
        return isinstance(other, _Without) and other.begins == self.begins

    def __hash__(self) -> int:
        return hash(self.begins)

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.begins)


def hide_known_warnings() -> None:
    """Hide them for the rest of this process."""
    for hidden in _PYTHON_WARNINGS:
        warnings.filterwarnings(
            "ignore", message=hidden.begins, module=hidden.source.replace(".", r"\.")
        )
    for hidden in _LOG_RECORDS:
        logging.getLogger(hidden.source).addFilter(_Without(hidden.begins))


@contextmanager
def imports_hidden() -> Iterator[None]:
    """Hide what a library logs while it is imported, and nothing after that."""
    logger, hiding = logging.getLogger(_AT_IMPORT.source), _Without(_AT_IMPORT.begins)
    was_hidden = hiding in logger.filters
    logger.addFilter(hiding)
    try:
        yield
    finally:
        if not was_hidden:
            logger.removeFilter(hiding)
