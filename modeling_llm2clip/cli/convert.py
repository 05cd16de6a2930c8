"""`llm2clip convert`."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .._extras import TIMM_TOWER, require
from ..configs.build_config import PROMPT_NAMES, BuildConfig
from ..configs.export_config import ConvertConfig
from ..configs.source_format import PREPROCESSINGS, SOURCE_FORMATS, SourceFormat
from .card_flags import add_card_flags, pick_licenses
from .extras import list_needs_of_adapter, list_needs_of_llm, list_needs_of_model
from .parser import add_device_flag, choose_device

_LLM2VEC = "llm2vec"
COMPONENTS = ("full", "vision", "text")
DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("quick_gelu", "gelu", "silu")
_TIMM_RECIPES = ("eva02", "siglip2")
# What an LLM2Vec folder says itself, or a model without official weights has not → its default.
_NOT_WITH_LLM2VEC: dict[str, Any] = {
    "file": None,
    "revision": None,
    "llm_revision": None,
    "llm_lora": [],
    "max_text_length": None,
    "text_pooling": None,
    "activation": None,
    "preprocessing": None,
    "head_width": None,
    "rope_reference_size": None,
    "components": "full",
}
# Flags that only some recipes use → these.
_RECIPES_WITH = {
    "head_width": ("openai", "eva02", "siglip2"),
    "rope_reference_size": ("eva02",),
}


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    convert = commands.add_parser(
        "convert",
        help="an official checkpoint into a model folder",
        examples=(
            "llm2clip convert microsoft/LLM2CLIP-Openai-L-14-336 model --recipe openai-hub --llm "
            "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned --dtype bfloat16",
        ),
    )
    add_flags(convert)
    convert.set_defaults(run=run)


def add_flags(convert: argparse.ArgumentParser) -> None:
    """Add the flags."""
    convert.add_argument("source", help="weight file, folder or Hub id of the checkpoint")
    convert.add_argument("output", type=Path, help="folder to write")
    convert.add_argument(
        "--recipe",
        required=True,
        choices=(*SOURCE_FORMATS, _LLM2VEC),
        help="family of the checkpoint, and what its weights do not say; "
        f"{_LLM2VEC}: an LLM2Vec folder as text tower of a new model",
    )
    convert.add_argument(
        "--file", help="weight file inside a Hub repository or folder; default: the only one"
    )
    convert.add_argument(
        "--revision",
        help="branch, tag or commit of the checkpoint's Hub repository; default: its main branch",
    )
    llm = convert.add_argument_group("language model")
    llm.add_argument(
        "--llm",
        help="Hub id or folder of the LLM; of a LoRA, its base; no default, and needed unless the "
        f"source is a merged {_LLM2VEC} folder",
    )
    llm.add_argument(
        "--llm-revision",
        help="branch, tag or commit of the LLM's Hub repository; default: its main branch",
    )
    llm.add_argument(
        "--llm-lora",
        action="append",
        default=[],
        metavar="LORA",
        help="LoRA to merge: a folder, ID or ID@REVISION; repeatable; default: none",
    )
    llm.add_argument(
        "--accept-lora-base",
        metavar="NAME",
        help="the LoRA's name for this LLM; default: the LLM's own",
    )
    llm.add_argument(
        "--vision", help=f"vision tower of a new model ({_LLM2VEC} only, needed there; no default)"
    )
    _add_recipe_flags(convert.add_argument_group("in place of what the recipe says"))
    convert.add_argument(
        "--components", choices=COMPONENTS, default="full",
        help="the whole model, or its vision or text half alone",
    )  # fmt: skip
    convert.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights")
    convert.add_argument(
        "--shard-size-mb", type=int, default=1000, help="most megabytes of a weight file"
    )
    add_device_flag(convert)
    add_card_flags(convert.add_argument_group("the model card"))
    convert.add_argument(
        "--push", metavar="ORG/NAME", help="upload it, private, once healthy; default: no upload"
    )


def _add_recipe_flags(group: Any) -> None:
    recipes = "default: the recipe's"
    group.add_argument(
        "--prompt", choices=PROMPT_NAMES, help=f"prompt around every caption; {recipes}"
    )
    group.add_argument(
        "--prefix", dest="prompt_prefix", help=f"text in front of every caption; {recipes}"
    )
    group.add_argument(
        "--suffix", dest="prompt_suffix", help=f"text behind every caption; {recipes}"
    )
    group.add_argument(
        "--max-text-length", type=int, help=f"most tokens of a text, with its prompt; {recipes}"
    )
    group.add_argument(
        "--text-pooling", choices=("mean", "last_token"),
        help=f"mean of the tokens of a text, or the last one; {recipes}",
    )  # fmt: skip
    group.add_argument(
        "--normalize-text-before-adapter", action=argparse.BooleanOptionalAction, default=None,
        help=f"give texts unit length before the text adapter; {recipes}",
    )  # fmt: skip
    group.add_argument(
        "--activation", choices=ACTIVATIONS, help=f"activation of the vision tower; {recipes}"
    )
    group.add_argument(
        "--preprocessing", choices=tuple(PREPROCESSINGS),
        help=f"mean and std of the images: OpenAI's, or 0.5; {recipes}",
    )  # fmt: skip
    group.add_argument(
        "--head-width", type=int,
        help=f"width of an attention head of the vision tower; {recipes}",
    )  # fmt: skip
    group.add_argument(
        "--rope-reference-size", type=int,
        help=f"side in patches that EVA02's rotary positions are scaled to; {recipes}",
    )  # fmt: skip


def choose_recipe(arguments: argparse.Namespace) -> SourceFormat:
    """Take the named recipe with what other flags say in its place.

    Raises: ValueError for a flag that the recipe has no use for.
    """
    given = {
        field.name: value
        for field in fields(SourceFormat)
        if (value := getattr(arguments, field.name, None)) is not None
    }
    for name, recipes in _RECIPES_WITH.items():
        if name in given and arguments.recipe not in recipes:
            raise ValueError(
                f"{_flag(name)} goes with the recipes {recipes}; {arguments.recipe!r} has no use "
                "for it. Leave it out."
            )
    if "prompt_prefix" in given or "prompt_suffix" in given:
        given.setdefault("prompt", None)
    return replace(SOURCE_FORMATS[arguments.recipe], **given)


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    from ..model_folders.atomic_folder import require_new_folder

    require_new_folder(arguments.output)
    if arguments.recipe == _LLM2VEC:
        return _build(arguments)
    require(*([TIMM_TOWER] if arguments.recipe in _TIMM_RECIPES else []))
    if arguments.llm is None or arguments.vision is not None:
        raise ValueError("A checkpoint is converted with its LLM: give --llm, and no --vision.")
    recipe = choose_recipe(arguments)
    arguments.device = str(choose_device(arguments))
    config = _read_config(arguments)
    if arguments.push is not None:
        _require_publishable(arguments)
    from ..conversion.convert_checkpoint import convert_checkpoint
    from ..conversion.source_checkpoint import CheckpointSource
    from ..conversion.source_llm import LLMSource

    folder = convert_checkpoint(
        CheckpointSource(arguments.source, arguments.file, arguments.revision),
        LLMSource(
            arguments.llm,
            arguments.llm_revision,
            tuple(arguments.llm_lora),
            arguments.accept_lora_base,
        ),
        arguments.output,
        recipe,
        config,
        name=arguments.push,
    )
    record = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
    print(f"{folder}: healthy")
    for reason, keys in sorted(record["dropped"].items()):
        print(f"left out, {reason}: {', '.join(keys)}")
    print(f"Wrote {folder}: {record['num_parameters']:,} parameters. {_what_next(arguments)}")
    _push(arguments)
    return 0


def _read_config(arguments: argparse.Namespace) -> ConvertConfig:
    return ConvertConfig(
        components=arguments.components,
        dtype=arguments.dtype,
        max_shard_size=f"{arguments.shard_size_mb}MB",
        base_models=arguments.base_models and tuple(arguments.base_models),
        device=arguments.device,
        **pick_licenses(arguments),
    )


def _require_publishable(arguments: argparse.Namespace) -> None:
    """Refuse, before anything is opened, what could not be published."""
    from ..model_folders.model_card_data import CardData, require_license
    from ..publishing.push_to_hub import require_repo_id

    require_repo_id(arguments.push)
    require_license(CardData(**pick_licenses(arguments)), arguments.source)


def _build(arguments: argparse.Namespace) -> int:
    require(
        *(list_needs_of_model(arguments.vision) if arguments.vision else ()),
        *(list_needs_of_llm(arguments.llm) if arguments.llm else ()),
        *list_needs_of_adapter(arguments.source),
    )
    _require_llm2vec_flags(arguments)
    arguments.device = str(choose_device(arguments))
    _read_config(arguments)  # checked before anything is loaded
    if arguments.push is not None:
        from ..publishing.push_to_hub import require_repo_id

        require_repo_id(arguments.push)
        raise ValueError(
            f"--push: the recipe {_LLM2VEC!r} makes an untrained model, and none is published. "
            "Leave --push out, align the model (llm2clip align), and export that with --push."
        )
    from ..configs.export_config import CardConfig
    from ..conversion.llm2vec import build_from_llm2vec

    base_models = arguments.base_models and tuple(arguments.base_models)
    normalizes = arguments.normalize_text_before_adapter
    folder = build_from_llm2vec(
        arguments.vision,
        Path(arguments.source),
        arguments.output,
        BuildConfig(
            prompt=arguments.prompt,
            prompt_prefix=arguments.prompt_prefix,
            prompt_suffix=arguments.prompt_suffix,
            normalize_text_before_adapter=True if normalizes is None else normalizes,
            accept_lora_base=arguments.accept_lora_base,
            dtype=arguments.dtype,
            device=arguments.device,
        ),
        base=arguments.llm,
        card=CardConfig(base_models=base_models, **pick_licenses(arguments)),
    )
    print(f"Wrote {folder}. Adapter and projections are random: align it before use.")
    return 0


def _require_llm2vec_flags(arguments: argparse.Namespace) -> None:
    if arguments.vision is None:
        raise ValueError("An LLM2Vec folder becomes half of a new model: give --vision.")
    given = [
        _flag(name)
        for name, default in _NOT_WITH_LLM2VEC.items()
        if getattr(arguments, name) != default
    ]
    if given:
        raise ValueError(
            f"The recipe {_LLM2VEC!r} has no use for {', '.join(given)}: the folder says how texts "
            "are pooled and how long they may be, the vision tower how images are prepared, and "
            "no half is written alone. Leave them out; a revision is had by downloading it."
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _what_next(arguments: argparse.Namespace) -> str:
    return f"Its embeddings are recorded; check any copy with: llm2clip doctor {arguments.output}"


def _push(arguments: argparse.Namespace) -> None:
    if arguments.push is None:
        return
    from ..publishing.push_to_hub import push_to_hub

    address = push_to_hub(arguments.output, arguments.push, device=arguments.device)
    print(f"Published {address}. Pin its last part with revision=… when you load it.")
