"""Hides library warnings that a user of a command can do nothing about, each by its exact words."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable


def _but(begins: str) -> Callable[[logging.LogRecord], bool]:
    """Build a filter that drops a logger's records that begin with certain words."""
    return lambda record: not str(record.msg).startswith(begins)


# A module or logger, and the message or filter that hides it.
# peft asks for it while it adds or merges a LoRA; we do not.
_WARNING = ("transformers.modeling_utils", "`is_gradient_checkpointing` is deprecated")
# transformers' Trainer imports peft, and peft bitsandbytes, which looks for a faster kernel.
_AT_IMPORT = (
    "bitsandbytes.backends.cpu.ops",
    _but("Failed to load CPU gemm_4bit_forward from kernels-community"),
)
# Two checkpoints of one second; the numbers in their names order them all the same.
_TIMES = (
    "transformers.trainer_utils",
    _but("mtime may not be reliable on this filesystem"),
)


def hide_known_warnings() -> None:
    """Hide the known warnings for the rest of this process."""
    module, begins = _WARNING
    warnings.filterwarnings("ignore", message=begins, module=module.replace(".", r"\."))
    for source, filtering in (_AT_IMPORT, _TIMES):
        logging.getLogger(source).addFilter(filtering)  # once, however often this is called
