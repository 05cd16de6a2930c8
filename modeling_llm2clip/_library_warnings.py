"""Hides library warnings that users of a command cannot act on, matched by their exact words."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable


def _but(begins: str) -> Callable[[logging.LogRecord], bool]:
    """Build a log filter that drops messages with a certain beginning."""
    return lambda record: not str(record.msg).startswith(begins)


# Each is a module or logger, and the start of its message or a filter that hides it.
# peft uses the deprecated attribute when it adds or merges a LoRA; our code does not.
_WARNING = ("transformers.modeling_utils", "`is_gradient_checkpointing` is deprecated")
# transformers' Trainer imports peft, which imports bitsandbytes, which looks for a faster kernel.
_AT_IMPORT = (
    "bitsandbytes.backends.cpu.ops",
    _but("Failed to load CPU gemm_4bit_forward from kernels-community"),
)
# Two checkpoints were saved within a second; the numbers in their names still order them.
_TIMES = (
    "transformers.trainer_utils",
    _but("mtime may not be reliable on this filesystem"),
)


def hide_known_warnings() -> None:
    """Hide the known warnings for the rest of this process."""
    module, begins = _WARNING
    warnings.filterwarnings("ignore", message=begins, module=module.replace(".", r"\."))
    for source, filtering in (_AT_IMPORT, _TIMES):
        logging.getLogger(source).addFilter(filtering)  # adding it again has no effect
