"""The flags that say where captioned pictures are, and the reading of them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..data.captioned_images import CaptionedImage


def add_data_flags(parser: Any) -> None:
    """Add DATA, and what helps to read it."""
    parser.add_argument("data", help="captioned pictures: folder, *.parquet, *.tar, COCO *.json")
    parser.add_argument(
        "--images", type=Path, help="folder of the pictures; default: beside the data"
    )
    parser.add_argument(
        "--ignore-fields",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="fields of your own in the data, which are not read; default: none",
    )
    parser.add_argument(
        "--check-pictures", action=argparse.BooleanOptionalAction,
        help="decode every picture before anything else; default: where the command decodes them, "
        "and not again with --resume",
    )  # fmt: skip


def require_data(arguments: argparse.Namespace) -> None:
    """Raise ValueError when DATA or `--images` is not there, before anything is imported."""
    data, images = arguments.data, arguments.images
    if not Path(data).exists() and not re.search(r"[*?[]", data):
        raise ValueError(
            f"{data}: no such data. Give a folder, *.parquet, *.tar or a COCO *.json file."
        )
    if images is not None and not images.is_dir():
        raise ValueError(f"--images {images}: no such folder.")


def read_data(arguments: argparse.Namespace, *, require_pictures: bool) -> list[CaptionedImage]:
    """Read all records, or raise once with every fault.

    Args:
        require_pictures: whether the command decodes the pictures; it then checks them first.
    """
    from ..data.captioned_sources import read_captioned

    check_pictures = arguments.check_pictures
    if check_pictures is None:
        check_pictures = require_pictures and not getattr(arguments, "resume", False)
    return read_captioned(
        arguments.data,
        images=arguments.images,
        require_pictures=require_pictures or check_pictures,
        check_pictures=check_pictures,
        ignored_fields=arguments.ignore_fields,
        show_progress=True,
    )
