"""`llm2clip tune-captions`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._extras import CAPTION_TUNING, require
from .captioned_data import add_data_flags, read_data
from .extras import list_needs_of_model
from .pick import pick


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    tune = commands.add_parser("tune-captions", help="teach the LLM to tell captions apart (LoRA)")
    tune.add_argument("model", help="folder or Hub id, from llm2clip build")
    add_data_flags(tune)  # the pictures themselves are not needed
    tune.add_argument("output", type=Path, help="folder to write")
    tune.add_argument("--merge", action="store_true", help="also write output/model, LoRA merged")
    tune.add_argument("--start", type=Path, help="adapter to begin from, of an earlier tuning")
    tune.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    tune.add_argument("--device", choices=("auto", "cpu"), default="auto")
    tune.add_argument(
        "--other-pairs", nargs=2, action="append", default=[], metavar=("FILE", "WEIGHT"),
        help="JSON lines of query, positive, negatives; batches for one batch of captions",
    )  # fmt: skip
    _add_settings(tune.add_argument_group("training"))
    tune.set_defaults(run=run)


def _add_settings(group: Any) -> None:
    group.add_argument("--epochs", type=float, default=1.0)
    group.add_argument("--steps", type=int, help="instead of epochs")
    group.add_argument("--pairings", type=int, default=1, help="of a picture's captions an epoch")
    group.add_argument("--batch-size", type=int, default=64, help="pairs a process and step")
    group.add_argument("--mini-batch-size", type=int, help="pairs at a time, cached gradients")
    group.add_argument("--lr", type=float, default=2e-4)
    group.add_argument("--warmup-steps", type=int, default=300)
    group.add_argument("--scale", type=float, default=50.0, help="inverse temperature")
    group.add_argument(
        "--negatives", choices=("one-way", "both-ways", "all-captions"), default="both-ways"
    )
    group.add_argument(
        "--num-alike", type=int, default=0,
        help="hard batches: pictures that come with each, those it is still confused with",
    )  # fmt: skip
    group.add_argument(
        "--held-out", type=int, help="pictures for the accuracy; default: a fifth, 1,000 at most"
    )
    group.add_argument("--eval-every", type=int, default=0, help="steps; 0: before and after")
    group.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    group.add_argument("--gradient-checkpointing", action="store_true")
    group.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="auto: bfloat16 on a GPU that computes in it",
    )  # fmt: skip
    group.add_argument("--adapter-dtype", choices=("float32", "float16"), default="float32")
    group.add_argument("--rank", type=int, default=16)
    group.add_argument("--alpha", type=int, default=32)
    group.add_argument("--lora-dropout", type=float, default=0.0)
    group.add_argument("--lora-targets", nargs="+", default=["all-linear"])
    group.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    require(*CAPTION_TUNING)
    require(*list_needs_of_model(arguments.model, extra="train"))
    from ..data.caption_groups import group_captions, read_text_pairs
    from ..hub.caption_adapter import merge_caption_adapter
    from ..hub.new_folder import clear_leftovers, require_new_folder
    from ..modeling_llm2clip import LLM2CLIPTextModel
    from ..processing_llm2clip import LLM2CLIPProcessor
    from ..training.caption_contrastive import TuneArguments, plan_tuning, run_tuning
    from ..training.processes import join_processes

    weights = [_read_weight(file, text) for file, text in arguments.other_pairs]
    state = join_processes(cpu=True if arguments.device == "cpu" else None)
    merged = arguments.output / "model"
    if arguments.merge:
        clear_leftovers(merged)
        require_new_folder(merged)
        _require_whole_model(arguments.model)
    arguments.lora = _pick_lora(arguments)
    settings = pick(TuneArguments, arguments)
    groups = group_captions(read_data(arguments, require_pictures=False))
    others = [read_text_pairs(file) for file, _ in arguments.other_pairs]
    plan = plan_tuning(
        arguments.model,
        groups,
        arguments.output,
        settings,
        other_pairs=[*zip(others, weights, strict=True)],
        start=arguments.start,
        resume=arguments.resume,
    )
    processor = LLM2CLIPProcessor.from_pretrained(arguments.model)
    model = LLM2CLIPTextModel.from_pretrained(arguments.model).to(state.device)
    result = run_tuning(model, processor, plan)
    if not state.is_main_process:
        return result.exit_code
    if result.adapter is None:
        print(f"Stopped; continue with --resume. The last checkpoint is in {arguments.output}.")
        return result.exit_code
    print(f"Wrote {result.adapter}. CRA {result.cra_before:.1%} -> {result.cra_after:.1%}.")
    print(
        f"{result.counts['num_truncated']} of {result.counts['num_texts']} texts are longer than "
        f"{processor.longest_text} tokens and cut."
    )
    if arguments.merge:
        merge_caption_adapter(arguments.model, result.adapter, merged)
        print(f"Wrote {merged}. Next: llm2clip extract {merged} DATA STORE")
    return 0


def _read_weight(file: str, text: str) -> float:
    from ..training.pair_batches import require_weight

    try:
        weight = float(text)
    except ValueError:
        raise ValueError(f"--other-pairs {file} {text}: the weight is no number.") from None
    require_weight(weight, f"--other-pairs {file}")
    return weight


def _require_whole_model(model: str) -> None:
    """Raise ValueError for half a model, which cannot be written with the LoRA merged."""
    from ..configuration_llm2clip import LLM2CLIPConfig
    from ..hub.doctor.patient import find_folder

    found = LLM2CLIPConfig.from_pretrained(find_folder(model)).architectures
    if found != ["LLM2CLIPModel"]:
        raise ValueError(
            f"{model} holds {found}, and --merge writes a whole model. Give that of the whole, or "
            "leave --merge out."
        )


def _pick_lora(arguments: argparse.Namespace) -> Any:
    from ..training.caption_encoder import LoraArguments

    targets = arguments.lora_targets
    return LoraArguments(
        rank=arguments.rank,
        alpha=arguments.alpha,
        dropout=arguments.lora_dropout,
        targets=targets[0] if targets == ["all-linear"] else targets,
    )
