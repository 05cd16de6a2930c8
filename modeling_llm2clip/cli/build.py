"""`llm2clip build`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._extras import DEMO, require
from ..configs.build_config import PROMPT_NAMES
from .extras import list_needs_of_adapter, list_needs_of_llm, list_needs_of_model
from .parser import add_device_flag, choose_device
from .pick import pick

# In the place of a tower: the demo's own, which needs no hub.
EMBEDDED = "embedded"
# What stands in the place of the other tower: (argument, kind) → what it is.
_SWAPPED = {("VISION", "text"): "a language model", ("LLM", "vision"): "a vision tower"}


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    build = commands.add_parser(
        "build",
        help="put an untrained model together from two towers",
        examples=(
            "llm2clip build openai/clip-vit-large-patch14-336 meta-llama/Llama-3.2-1B-Instruct "
            "my-model --prompt llama-3",
        ),
    )
    build.add_argument("vision", help="Hub id or folder of a vision tower; embedded: the demo's")
    build.add_argument(
        "llm", help="Hub id, folder or .gguf file of a language model; embedded: the demo's"
    )
    build.add_argument("output", type=Path, help="folder to write")
    _add_prompt_flags(
        build.add_argument_group("prompt around every caption (required: one choice)")
    )
    _add_architecture_flags(build)
    _add_weight_flags(build)
    add_device_flag(build)
    build.set_defaults(run=run)


def _add_prompt_flags(prompt: Any) -> None:
    prompt.add_argument("--prompt", choices=PROMPT_NAMES, help="a known prompt; no default")
    prompt.add_argument(
        "--prefix",
        dest="prompt_prefix",
        help="text in front of every caption; default: that of --prompt",
    )
    prompt.add_argument(
        "--suffix", dest="prompt_suffix",
        help="text behind every caption; default: that of --prompt",
    )  # fmt: skip


def _add_architecture_flags(build: Any) -> None:
    build.add_argument(
        "--projection-dim", type=int, default=512, help="width of the space of both embeddings"
    )
    build.add_argument(
        "--max-text-length", type=int, default=512, help="most tokens of a text, with its prompt"
    )
    build.add_argument(
        "--text-pooling", choices=("mean", "last_token"), default="mean",
        help="what represents a text: the mean of its tokens, or the last one",
    )  # fmt: skip
    build.add_argument(
        "--vision-pooling", choices=("pooler", "cls", "mean", "patch_mean"), default="pooler",
        help="what represents an image: the tower's pooler, its CLS token, the mean of all tokens, "
        "CLS and registers too, or of the patches alone",
    )  # fmt: skip
    build.add_argument("--image-size", type=int, help="side of the images; default: the tower's")
    build.add_argument(
        "--normalization",
        choices=("own", "openai", "half", "imagenet"),
        default="own",
        help="mean and std of the images: the tower's own, CLIP's, 0.5, or ImageNet's",
    )
    build.add_argument(
        "--text-adapter-layers", type=int, default=4, help="residual blocks of the text adapter"
    )
    build.add_argument(
        "--normalize-text-before-adapter", action=argparse.BooleanOptionalAction, default=True,
        help="scale the LLM's embeddings to unit length before the text adapter",
    )  # fmt: skip
    build.add_argument(
        "--visual-projection-bias", action=argparse.BooleanOptionalAction, default=True,
        help="bias of the image projection, which the closed-form start of align needs",
    )  # fmt: skip


def _add_weight_flags(build: Any) -> None:
    build.add_argument(
        "--caption-lora", dest="lora", type=Path, help="LoRA of a caption-tuned LLM; default: none"
    )
    build.add_argument(
        "--accept-lora-base", metavar="NAME",
        help="the LoRA's name for this LLM; default: the LLM's own",
    )  # fmt: skip
    build.add_argument(
        "--tokenizer-code", metavar="COMMIT",
        help="run the code of the LLM's tokenizer as it is in this commit of its Hub repository; "
        "default: none is run",
    )  # fmt: skip
    build.add_argument(
        "--causal", dest="bidirectional", action="store_false",
        help="keep the LLM causal, to compare with",
    )  # fmt: skip
    build.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="dtype of the weights",
    )  # fmt: skip
    build.add_argument(
        "--seed", type=int, default=0, help="seed of the text adapter and the projections"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    from ..building.tower_loading import require_sources
    from ..model_folders.atomic_folder import require_new_folder

    require_new_folder(arguments.output)
    licenses = _take_embedded(arguments)
    require(*list_needs_of_llm(arguments.llm), *list_needs_of_adapter(arguments.lora))
    require(*list_needs_of_model(arguments.vision))
    _require_prompt(arguments)
    _require_order(arguments)
    require_sources(vision=arguments.vision, text=arguments.llm, lora=arguments.lora)
    arguments.device = str(choose_device(arguments))

    from ..building.build_model import build_model
    from ..configs.build_config import BuildConfig
    from ..configs.export_config import CardConfig

    card = CardConfig(vision_license=licenses.get("vision"), text_license=licenses.get("llm"))
    config = pick(BuildConfig, arguments)
    folder = build_model(arguments.vision, arguments.llm, arguments.output, config, card=card)
    print(f"Wrote {folder}. Adapter and projections are random: align it before use.")
    return 0


def _take_embedded(arguments: argparse.Namespace) -> dict[str, str]:
    """Put the demo's towers in the place of their name, fetched where they are not in the cache.

    Its language model comes with its caption-tuned LoRA and its prompt, unless others are given.

    Returns: licenses of the towers that were taken, by `"vision"` and `"llm"`.
    """
    taken = [place for place in ("vision", "llm") if getattr(arguments, place) == EMBEDDED]
    if not taken:
        return {}
    require(*DEMO)
    from ..data.record_loading import find_example_data
    from ..demo.pretrained_towers import EFFICIENTNET, SMOLLM2, SMOLLM2_BASE, fetch_tower

    if "vision" in taken:
        arguments.vision = str(fetch_tower(EFFICIENTNET))
    if "llm" in taken:
        arguments.llm = str(fetch_tower(SMOLLM2))
        arguments.accept_lora_base = arguments.accept_lora_base or SMOLLM2_BASE
        if arguments.lora is None and arguments.bidirectional:
            arguments.lora = find_example_data() / "caption_lora"
        if arguments.prompt_prefix is None and arguments.prompt_suffix is None:
            arguments.prompt = arguments.prompt or "chatml"
    return dict.fromkeys(taken, "apache-2.0")


def _require_prompt(arguments: argparse.Namespace) -> None:
    """Raise ValueError where no prompt is chosen, before anything is imported."""
    if (
        arguments.prompt is None
        and arguments.prompt_prefix is None
        and arguments.prompt_suffix is None
    ):
        raise ValueError(
            f"Give --prompt, one of {', '.join(PROMPT_NAMES)}, or a --prefix and --suffix of your "
            "own. A prompt is never guessed, because the embeddings depend on it."
        )


def _require_order(arguments: argparse.Namespace) -> None:
    """Raise ValueError for a tower in the other's place, told from its `config.json`."""
    from ..model_folders.model_types import find_model_type

    for place, source in (("VISION", arguments.vision), ("LLM", arguments.llm)):
        found = find_model_type(source)
        if found is None:
            continue
        if what := _SWAPPED.get((place, found.content)):
            raise ValueError(
                f"{source} is {what}, in the place of {place}. The order is: llm2clip build "
                "VISION LLM OUTPUT."
            )
        if found.content in ("above", "lora", "store"):
            raise ValueError(f"{found.advice} It cannot be {place}.")
