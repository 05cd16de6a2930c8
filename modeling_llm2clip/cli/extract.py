"""`llm2clip extract`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._extras import require
from .captioned_data import add_data_flags, read_data, require_data
from .extras import list_needs_of_data, list_needs_of_model
from .parser import add_device_flag, choose_device

# What only the other kind of extraction would read, by whether images are extracted.
_FIELDS = {"rows_per_shard", "token_budget", "batch_size", "num_workers", "device"}
_FOREIGN_FLAGS = {True: ("token_budget",), False: ("batch_size", "num_workers")}


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    extract = commands.add_parser(
        "extract",
        help="captions, or images, into a store of embeddings; continues one",
        examples=(
            "llm2clip extract tuned/model my-images captions",
            "llm2clip extract tuned/model my-images images --images",
        ),
    )
    extract.add_argument("model", help="Hub id or folder of a model, as build and export write it")
    add_data_flags(extract)
    extract.add_argument("output", type=Path, help="folder of the store, new or begun")
    extract.add_argument("--images", action="store_true", help="images instead of captions")
    extract.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), default="float16",
        help="dtype of the stored embeddings",
    )  # fmt: skip
    extract.add_argument(
        "--rows-per-shard", type=int, default=2048, help="embeddings of a file of the store"
    )
    of_one_kind = {"type": int, "default": argparse.SUPPRESS}  # so that it shows what was given
    extract.add_argument(
        "--token-budget",
        help="most tokens of a batch of captions; default: by device",
        **of_one_kind,
    )
    extract.add_argument(
        "--batch-size", help="images of a batch; default: by device", **of_one_kind
    )
    extract.add_argument(
        "--num-workers", help="threads that decode images; default: 1", **of_one_kind
    )
    add_device_flag(extract)
    extract.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    require(*list_needs_of_data(arguments.data, extra="train"))
    require(*list_needs_of_model(arguments.model, extra="train"))
    from ..configs.extract_config import ExtractConfig
    from ..model_folders.model_types import require_own_model

    _refuse_foreign_flags(arguments)
    given = {name: value for name, value in vars(arguments).items() if name in _FIELDS}
    config = ExtractConfig(store_dtype=arguments.dtype, **given)
    require_own_model(arguments.model)
    require_data(arguments)
    choose_device(arguments)
    from accelerate import PartialState

    from ..model_folders.model_folder import find_model_folder
    from ..training.extraction.extract import describe_extraction, extract

    find_model_folder(arguments.model)  # reading the data may take long
    records = read_data(arguments, require_images=arguments.images)
    modality: Any = "image" if arguments.images else "text"
    extract(arguments.model, records, arguments.output, config, modality=modality)
    state = PartialState()
    if state.is_main_process:
        print("\n".join(describe_extraction(arguments.output)))
    state.destroy_process_group()
    return 0


def _refuse_foreign_flags(arguments: argparse.Namespace) -> None:
    given = [name for name in _FOREIGN_FLAGS[arguments.images] if name in arguments]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        kind, other = ("captions", "it") if arguments.images else ("images", "--images")
        remedy = "leave --images out" if arguments.images else "give --images too"
        raise ValueError(
            f"{flags}: of the extraction of {kind} only. Leave {other} out, or {remedy}."
        )
