"""What the command lines of both steps share: flags, the run, and what is said at its end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from llava_conversations import Conversation
from llava_trainer import LlavaArguments, train_llava
from transformers import LlavaProcessor


def parse(
    parser: argparse.ArgumentParser, **defaults: Any
) -> tuple[argparse.Namespace, LlavaArguments]:
    """Parse a step's own arguments, then the output folder and the flags of both steps.

    Args:
        defaults: of this step, for fields of `LlavaArguments`.
    Raises: ValueError for settings that are impossible.
    """
    parser.add_argument("output", type=Path)
    parser.add_argument("--check-images", action="store_true", help="decode every image first")
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    _add_training_flags(parser.add_argument_group("training"))
    parser.set_defaults(**{**asdict(LlavaArguments()), **defaults})
    parsed = parser.parse_args()
    return parsed, LlavaArguments(
        **{f.name: getattr(parsed, f.name) for f in fields(LlavaArguments)}
    )


def _add_training_flags(group: Any) -> None:
    """Add a flag for each of `LlavaArguments`."""
    group.add_argument("--epochs", type=float)
    group.add_argument("--steps", type=int, help="instead of epochs")
    group.add_argument("--batch-size", type=int, help="over all processes together")
    group.add_argument("--device-batch-size", type=int, help="conversations on a device at a time")
    group.add_argument("--lr", type=float)
    group.add_argument("--max-length", type=int, help="tokens, those of the image included")
    group.add_argument("--clip-norm", type=float)
    group.add_argument("--gradient-checkpointing", action="store_true")
    group.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"),
        help="auto: bfloat16 on a GPU that computes in it",
    )  # fmt: skip
    group.add_argument("--device", choices=("auto", "cpu"))
    group.add_argument("--workers", dest="num_workers", type=int, help="that decode images")
    group.add_argument("--log-every", type=int, help="steps")
    group.add_argument("--save-every", type=int, help="steps between checkpoints")
    group.add_argument("--seed", type=int)


def train_and_tell(
    load_model: Callable[[], tuple[Any, LlavaProcessor]],
    conversations: Sequence[Conversation],
    output: Path,
    arguments: LlavaArguments,
    *,
    wrote: str,
    **settings: Any,
) -> int:
    """Run `train_llava` and say how it ended; returns its exit code.

    Args:
        wrote: what is said behind the folder of the written model.
        settings: the others of `train_llava`.
    """
    exit_code = train_llava(load_model, conversations, output, arguments, **settings)
    state = PartialState()
    # One that ends before the others may abort, and the launcher stops the writer of the model.
    state.wait_for_everyone()
    state.destroy_process_group()
    if not state.is_main_process:  # which alone writes
        return exit_code
    if exit_code:
        print(f"Stopped; continue with --resume. The last checkpoint is in {output}.")
    else:
        print(f"Wrote {output / 'model'}{wrote}")
    return exit_code
