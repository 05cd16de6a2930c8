"""`llm2clip finetune-llm`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._extras import CAPTION_TUNING, require
from .captioned_data import add_data_flags, read_data, require_data
from .extras import list_needs_of_model
from .parser import add_device_flag, choose_device

if TYPE_CHECKING:
    from ..configs.finetune_config import FinetuneConfig

_FIELDS = {
    "epochs": "num_train_epochs", "steps": "max_steps", "pairings": "num_pairings",
    "batch_size": "per_device_train_batch_size", "mini_batch_size": "mini_batch_size",
    "lr": "learning_rate", "warmup_steps": "warmup_steps", "scale": "scale",
    "negatives": "negatives", "num_alike": "num_hard_negatives", "held_out": "num_held_out",
    "eval_every": "eval_steps", "save_every": "save_steps",
    "gradient_checkpointing": "gradient_checkpointing", "precision": "precision",
    "adapter_dtype": "lora_dtype", "rank": "lora_rank", "alpha": "lora_alpha",
    "lora_dropout": "lora_dropout", "lora_targets": "lora_target_modules", "seed": "seed",
    "device": "device", "skip_single_captions": "skip_single_captions", "start": "init_lora",
    "merge": "merge",
}  # fmt: skip


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    tune = commands.add_parser(
        "finetune-llm",
        help="teach the LLM to tell captions apart (LoRA)",
        examples=("llm2clip finetune-llm my-model my-images tuned --merge",),
    )
    tune.add_argument("model", help="folder or Hub id, from llm2clip build")
    add_data_flags(tune)  # the images themselves are not needed
    tune.add_argument("output", type=Path, help="folder to write")
    tune.add_argument(
        "--skip-single-captions", action="store_true",
        help="leave out images with one caption only, and say how many",
    )  # fmt: skip
    tune.add_argument("--merge", action="store_true", help="also write output/model, LoRA merged")
    tune.add_argument(
        "--start", type=Path, help="adapter of an earlier tuning to begin from; default: a new one"
    )
    tune.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    add_device_flag(tune)
    tune.add_argument(
        "--other-pairs", nargs=2, action="append", default=[], metavar=("FILE", "WEIGHT"),
        help="JSON lines of query, positive, negatives, and how many of their batches come for one "
        "of captions; repeatable; default: none",
    )  # fmt: skip
    _add_settings(tune.add_argument_group("training"))
    tune.set_defaults(run=run)


def _add_settings(group: Any) -> None:
    group.add_argument("--epochs", type=float, default=1.0, help="passes over the data")
    group.add_argument("--steps", type=int, help="number of steps; default: what --epochs comes to")
    group.add_argument("--pairings", type=int, default=1, help="of an image's captions an epoch")
    group.add_argument("--batch-size", type=int, default=64, help="pairs a process and step")
    group.add_argument(
        "--mini-batch-size", type=int,
        help="pairs at a time, with cached gradients; default: the whole batch",
    )  # fmt: skip
    group.add_argument("--lr", type=float, default=2e-4, help="peak learning rate")
    group.add_argument(
        "--warmup-steps",
        type=float,
        default=0.1,
        help="steps until the learning rate is at its peak; below 1 a share of the run",
    )
    group.add_argument("--scale", type=float, default=50.0, help="inverse temperature")
    group.add_argument(
        "--negatives", choices=("query-to-doc", "symmetric", "all"), default="symmetric",
        help="texts of the batch that a text is compared with: for first captions the second "
        "ones, the reverse too, or all others",
    )  # fmt: skip
    group.add_argument(
        "--num-alike", type=int, default=0,
        help="hard batches: images that come with each, those it is still confused with",
    )  # fmt: skip
    group.add_argument(
        "--held-out", type=int, help="images for the accuracy; default: a fifth, 1,000 at most"
    )
    group.add_argument("--eval-every", type=int, default=0, help="steps; 0: before and after")
    group.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory for more time"
    )
    group.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="auto: bfloat16 on a GPU that computes in it",
    )  # fmt: skip
    group.add_argument(
        "--adapter-dtype", choices=("float32", "float16", "bfloat16"), default="float32",
        help="dtype of the written LoRA",
    )  # fmt: skip
    group.add_argument("--rank", type=int, default=16, help="rank of the LoRA")
    group.add_argument("--alpha", type=int, default=32, help="alpha of the LoRA")
    group.add_argument("--lora-dropout", type=float, default=0.0, help="dropout of the LoRA")
    group.add_argument(
        "--lora-targets", nargs="+", default=["all-linear"],
        help="names of the linear layers with a LoRA",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="seed of everything random")


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    require(*CAPTION_TUNING)
    require(*list_needs_of_model(arguments.model, extra="train"))
    from ..model_folders.atomic_folder import clear_leftovers, require_new_folder
    from ..model_folders.model_types import require_own_model
    from ..training.run_folder import require_fresh_or_resumed

    config = _read_config(arguments)
    merged = arguments.output / "model"
    if arguments.merge:
        clear_leftovers(merged)
        require_new_folder(merged)
    require_fresh_or_resumed(arguments.output, resume=arguments.resume)
    require_own_model(arguments.model)
    require_data(arguments)
    choose_device(arguments)

    from accelerate import PartialState

    from ..training.finetuning.finetune_llm import describe_finetuning, finetune_llm

    records = read_data(arguments, require_images=False)
    finetune_llm(arguments.model, records, arguments.output, config, resume=arguments.resume)
    if PartialState().is_main_process:
        print("\n".join(describe_finetuning(arguments.output)))
    return 0


def _read_config(arguments: argparse.Namespace) -> FinetuneConfig:
    from ..configs.finetune_config import FinetuneConfig

    values = {field: getattr(arguments, flag) for flag, field in _FIELDS.items()}
    values["text_pairs"] = [
        (file, _read_weight(file, text)) for file, text in arguments.other_pairs
    ]
    return FinetuneConfig(**values)


def _read_weight(file: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        raise ValueError(f"--other-pairs {file} {text}: the weight is no number.") from None
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"--other-pairs {file} {text}: give a finite weight above 0.")
    return weight
