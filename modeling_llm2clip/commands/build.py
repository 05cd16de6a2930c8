"""`llm2clip build`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._extras import require
from ..hub.picture_choices import NORMALIZATIONS
from ..hub.prompt_presets import PROMPT_NAMES
from .extras import list_needs_of_adapter, list_needs_of_llm, list_needs_of_model
from .pick import pick


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    build = commands.add_parser("build", help="put an untrained model together from two towers")
    build.add_argument("vision", help="Hub id or folder of a vision tower")
    build.add_argument("llm", help="Hub id, folder or .gguf file of a language model")
    build.add_argument("output", type=Path, help="folder to write")
    prompt = build.add_argument_group("prompt around every caption (one choice is needed)")
    prompt.add_argument("--prompt", choices=PROMPT_NAMES)
    prompt.add_argument("--prefix", help="text in front of every caption")
    prompt.add_argument("--suffix", help="text behind every caption")
    build.add_argument("--projection-dim", type=int, default=512)
    build.add_argument("--max-text-length", type=int, default=512)
    build.add_argument("--text-pooling", choices=("mean", "last_token"), default="mean")
    build.add_argument("--vision-pooling", choices=("pooler", "cls", "mean"), default="pooler")
    build.add_argument("--image-size", type=int, help="side of the pictures; default: the tower's")
    build.add_argument(
        "--normalization",
        choices=NORMALIZATIONS,
        default="own",
        help="mean and std of the pictures: the tower's own, CLIP's, 0.5, or ImageNet's",
    )
    build.add_argument("--text-adapter-layers", type=int, default=4)
    build.add_argument("--visual-projection-bias", action="store_true")
    build.add_argument("--caption-adapter", type=Path, help="LoRA of a caption-tuned LLM")
    build.add_argument("--accept-adapter-base", metavar="NAME", help="the LoRA's name for this LLM")
    build.add_argument("--causal", dest="bidirectional", action="store_false")
    build.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    build.add_argument("--seed", type=int, default=0)
    build.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    require(*list_needs_of_llm(arguments.llm), *list_needs_of_adapter(arguments.caption_adapter))
    require(*list_needs_of_model(arguments.vision))
    import torch

    from ..data.trained_emoji import TrainedEmoji
    from ..hub.build import BuildArguments, build_from_sources
    from ..hub.card_facts import CardFacts, find_license
    from ..hub.export import export_model
    from ..hub.new_folder import require_new_folder
    from ..hub.tower_sources import add_up_trained_emoji

    require_new_folder(arguments.output)  # before the towers are loaded
    model, processor = build_from_sources(
        arguments.vision,
        arguments.llm,
        pick(BuildArguments, arguments),
        dtype=getattr(torch, arguments.dtype),
        caption_adapter=arguments.caption_adapter,
        accept_adapter_base=arguments.accept_adapter_base,
    )
    facts = CardFacts(
        vision_license=find_license(arguments.vision), text_license=find_license(arguments.llm)
    )
    # An adapter does not say which captions it has seen.
    trained_emoji = add_up_trained_emoji(arguments.vision, arguments.llm).add(
        TrainedEmoji(is_complete=arguments.caption_adapter is None)
    )
    folder = export_model(
        model, processor, arguments.output, facts=facts, trained_emoji=trained_emoji
    )
    print(f"Wrote {folder}. Adapter and projections are random: align it before use.")
    return 0
