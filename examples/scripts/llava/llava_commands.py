"""The command line that both steps share: flags, the run, and its last message."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from llava_conversations import Conversation
from llava_trainer import LlavaConfig, train_llava
from transformers import LlavaProcessor

from modeling_llm2clip.scheduling.graceful_stop import StageInterrupt


def parse(
    parser: argparse.ArgumentParser, **defaults: Any
) -> tuple[argparse.Namespace, LlavaConfig]:
    """Parse a step's own arguments, then the output folder and the flags of both steps.

    Args:
        defaults: of this step, for fields of `LlavaConfig`.
    Raises: ValueError for impossible options.
    """
    parser.add_argument("output", type=Path)
    parser.add_argument("--check-images", action="store_true", help="decode every image first")
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    _add_training_flags(parser.add_argument_group("training"))
    parser.set_defaults(**{**asdict(LlavaConfig()), **defaults})
    parsed = parser.parse_args()
    return parsed, LlavaConfig(**{f.name: getattr(parsed, f.name) for f in fields(LlavaConfig)})


def _add_training_flags(group: Any) -> None:
    """Add a flag for each of `LlavaConfig`."""
    group.add_argument("--num-train-epochs", type=float)
    group.add_argument("--max-steps", type=int, help="instead of epochs")
    group.add_argument("--global-batch-size", type=int, help="over all processes together")
    group.add_argument(
        "--per-device-train-batch-size", type=int, help="conversations on a device at a time"
    )
    group.add_argument("--learning-rate", type=float)
    group.add_argument("--max-length", type=int, help="tokens, those of the image included")
    group.add_argument("--max-grad-norm", type=float)
    group.add_argument("--gradient-checkpointing", action="store_true")
    group.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"),
        help="auto: bfloat16 on a GPU that computes in it",
    )  # fmt: skip
    group.add_argument("--device", choices=("auto", "cpu"))
    group.add_argument("--num-workers", type=int, help="that decode images")
    group.add_argument("--logging-steps", type=int)
    group.add_argument("--save-steps", type=int, help="steps between checkpoints")
    group.add_argument("--seed", type=int)


def train_and_report(
    load_model: Callable[[], tuple[Any, LlavaProcessor]],
    conversations: Sequence[Conversation],
    output: Path,
    config: LlavaConfig,
    *,
    wrote: str,
    **options: Any,
) -> int:
    """Run `train_llava` and say how it ended; returns its exit code.

    Args:
        wrote: end of the message that names the written model.
        options: the others of `train_llava`.
    """
    exit_code = 0
    try:
        folder = train_llava(load_model, conversations, output, config, **options)
        said = f"Wrote {folder}{wrote}"
    except StageInterrupt as error:
        said, exit_code = str(error), 128 + error.signal
    state = PartialState()
    # If a process ends early it may abort, and the launcher then stops the writer of the model.
    state.wait_for_everyone()
    state.destroy_process_group()
    if state.is_main_process:
        print(said)
    return exit_code
