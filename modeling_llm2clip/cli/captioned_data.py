"""The flags that say where captioned images are, and the reading of them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..data.records import CaptionedImage


def add_data_flags(parser: Any) -> None:
    """Add DATA, and what helps to read it."""
    parser.add_argument("data", help="captioned images: folder, *.parquet, *.tar, COCO *.json")
    parser.add_argument(
        "--image-dir", type=Path, help="folder of the images; default: beside the data"
    )
    parser.add_argument(
        "--ignore-fields",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="fields of your own in the data, which are not read; default: none",
    )
    parser.add_argument(
        "--check-images", action=argparse.BooleanOptionalAction,
        help="decode every image before anything else; default: where the command decodes them, "
        "and not again with --resume",
    )  # fmt: skip


def require_data(arguments: argparse.Namespace) -> None:
    """Raise ValueError when DATA or `--image-dir` is not there, before anything is imported."""
    data, images = arguments.data, arguments.image_dir
    if not Path(data).exists() and not re.search(r"[*?[]", data):
        raise ValueError(
            f"{data}: no such data. Give a folder, *.parquet, *.tar or a COCO *.json file."
        )
    if images is not None and not images.is_dir():
        raise ValueError(f"--image-dir {images}: no such folder.")


def read_data(arguments: argparse.Namespace, *, require_images: bool) -> list[CaptionedImage]:
    """Read all records, or raise once with every error.

    Args:
        require_images: whether the command decodes the images; it then checks them first.
    """
    from ..data.record_loading import load_records

    check_images = arguments.check_images
    if check_images is None:
        check_images = require_images and not getattr(arguments, "resume", False)
    return load_records(
        arguments.data,
        image_dir=arguments.image_dir,
        require_images=require_images or check_images,
        check_images=check_images,
        ignore_fields=arguments.ignore_fields,
        show_progress=True,
    )
