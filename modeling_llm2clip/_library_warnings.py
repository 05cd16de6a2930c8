"""Warnings of libraries that a user can do nothing about, each hidden by its exact words.

Anything else that a library warns of is shown. Commands hide all of them; in Python the one of
bitsandbytes alone is hidden, while a public name is imported.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Each is a module or logger, and how what it says begins, word for word.
# peft asks for it while it adds or merges a LoRA; we do not.
_WARNING = ("transformers.modeling_utils", "`is_gradient_checkpointing` is deprecated")
# transformers' Trainer imports peft, and peft bitsandbytes, which looks for a faster kernel.
_AT_IMPORT = (
    "bitsandbytes.backends.cpu.ops",
    "Failed to load CPU gemm_4bit_forward from kernels-community",
)
# Two checkpoints of one second; the numbers in their names order them all the same.
_TIMES = ("transformers.trainer_utils", "mtime may not be reliable on this filesystem")


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
    module, begins = _WARNING
    warnings.filterwarnings("ignore", message=begins, module=module.replace(".", r"\."))
    for source, begins in (_AT_IMPORT, _TIMES):
        logging.getLogger(source).addFilter(_Without(begins))


@contextmanager
def imports_hidden() -> Iterator[None]:
    """Hide what a library logs while it is imported, and nothing after that."""
    source, begins = _AT_IMPORT
    logger, hiding = logging.getLogger(source), _Without(begins)
    was_hidden = hiding in logger.filters
    logger.addFilter(hiding)
    try:
        yield
    finally:
        if not was_hidden:
            logger.removeFilter(hiding)
