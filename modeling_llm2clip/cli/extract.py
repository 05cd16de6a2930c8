"""`llm2clip extract`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._extras import require
from .captioned_data import add_data_flags, read_data, require_data
from .extras import list_needs_of_data, list_needs_of_model
from .parser import add_device_flag, choose_device
from .pick import pick

# What only the other kind of extraction would read, by whether images are extracted.
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
    from ..model_folders.model_types import require_own_model
    from ..training.graceful_stop import stop_on_signals

    _refuse_foreign_flags(arguments)
    require_own_model(arguments.model)
    require_data(arguments)
    with stop_on_signals() as stop:  # before what takes long to import
        choose_device(arguments)
        from accelerate import PartialState

        from ..model_folders.model_folder import find_model_folder
        from ..training.extraction.caption_extraction import extract_captions
        from ..training.extraction.extract import ExtractionArguments
        from ..training.extraction.image_extraction import extract_images

        chosen = pick(
            ExtractionArguments, argparse.Namespace(**vars(arguments), show_progress=True)
        )
        find_model_folder(arguments.model)  # reading the data may take long
        records = read_data(arguments, require_images=arguments.images)
        extract = extract_images if arguments.images else extract_captions
        report = extract(arguments.model, records, arguments.output, chosen, stop=stop)
        state = PartialState()
        if state.is_main_process:
            _print_report(report)
        state.destroy_process_group()
        return 0 if report.complete else stop.exit_code


def _refuse_foreign_flags(arguments: argparse.Namespace) -> None:
    given = [name for name in _FOREIGN_FLAGS[arguments.images] if name in arguments]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        kind, other = ("captions", "it") if arguments.images else ("images", "--images")
        remedy = "leave --images out" if arguments.images else "give --images too"
        raise ValueError(
            f"{flags}: of the extraction of {kind} only. Leave {other} out, or {remedy}."
        )


def _print_report(report: Any) -> None:
    counts = ", ".join(f"{number} {name}" for name, number in report.counts.items())
    if not report.complete:
        print(f"Stopped after a whole shard. The same command goes on in {report.folder}.")
        return
    print(
        f"Wrote {report.folder}: {report.num_rows} embeddings of {report.dim} for "
        f"{report.num_items} "
        f"records ({counts}). Align a model on it: llm2clip align -h"
    )
