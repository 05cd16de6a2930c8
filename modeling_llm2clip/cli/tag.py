"""`llm2clip tag`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._extras import require
from .extras import list_needs_of_model
from .image_folder import (
    add_folder_arguments,
    add_folder_flags,
    encode_folder,
    report_truncated,
    require_folder,
    tell,
)

if TYPE_CHECKING:
    from ..search.tag_images import TaggedImage

_SUFFIXES = (".csv", ".jsonl")


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    tag = commands.add_parser(
        "tag",
        help="label the images of a folder, into CSV or JSON lines",
        examples=(
            "llm2clip tag aligned/model my-images --labels labels.txt --template "
            '"a photo of a {}" --output tags.csv',
        ),
    )
    add_folder_arguments(tag)
    tag.add_argument(
        "--labels", type=Path, required=True, metavar="FILE",
        help="one label per line; *.csv with columns label and prompt; *.json, a list of labels "
        "or an object of label to prompts",
    )  # fmt: skip
    tag.add_argument(
        "--template", nargs="+", default=["{}"], metavar="TEXT",
        help="prompts for labels that bring none, with {} for the label; several are averaged",
    )  # fmt: skip
    tag.add_argument("--top-k", type=int, default=3, help="labels per image")
    tag.add_argument(
        "--threshold", type=float, metavar="COSINE", help="least cosine of a label; default: none"
    )
    tag.add_argument(
        "--output", type=Path, metavar="FILE",
        help="new file, *.csv or *.jsonl; default: CSV on stdout",
    )  # fmt: skip
    add_folder_flags(tag)
    tag.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    require(*list_needs_of_model(arguments.model))
    from ..model_folders.model_types import require_own_model
    from ..search.tag_labels import read_labels

    labels = read_labels(arguments.labels, templates=arguments.template)
    _check_flags(arguments)  # before what takes long
    require_folder(arguments)
    require_own_model(arguments.model)
    from ..search.tag_images import encode_labels, tag_images

    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    encoded = encode_folder(arguments)
    prompts = [prompt for label in labels for prompt in label.prompts]
    report_truncated(encoded.processor, prompts, "prompts")
    tagged = tag_images(
        encoded.model,
        encoded.gallery,
        labels,
        encode_labels(encoded.model, encoded.processor, labels),
        top_k=arguments.top_k,
        threshold=arguments.threshold,
    )
    _write(tagged, arguments.output, threshold=arguments.threshold)
    return 0


def _check_flags(arguments: argparse.Namespace) -> None:
    output = arguments.output
    if arguments.top_k < 1:
        raise ValueError(f"--top-k {arguments.top_k} gives no label. Give at least 1.")
    if arguments.threshold is not None and not -1 <= arguments.threshold <= 1:
        raise ValueError(f"--threshold {arguments.threshold} is no cosine. Give one in [-1, 1].")
    if output is None:
        return
    if output.suffix not in _SUFFIXES:
        raise ValueError(f"--output {output} must end in {' or '.join(_SUFFIXES)}.")
    if output.exists():
        raise FileExistsError(f"{output} exists. Name a new file, or remove it.")


def _write(tagged: Iterable[TaggedImage], output: Path | None, *, threshold: float | None) -> None:
    from ..search.tag_images import write_tags

    if output is None:
        num_images, num_untagged = write_tags(tagged, sys.stdout, ".csv")
    else:
        unfinished = output.with_name(f".{output.name}.tmp")
        try:
            with unfinished.open("w", encoding="utf-8", newline="") as file:
                num_images, num_untagged = write_tags(tagged, file, output.suffix)
            unfinished.replace(output)
        finally:
            unfinished.unlink(missing_ok=True)
        tell(f"Wrote the labels of {num_images:,} images to {output}.")
    if num_untagged:
        tell(f"{num_untagged:,} of {num_images:,} images have no label; threshold {threshold}.")
