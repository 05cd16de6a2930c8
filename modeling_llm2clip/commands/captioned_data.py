"""The flags that say where captioned pictures are, and the reading of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..data.captioned_images import CaptionedImage


def add_data_flags(parser: Any) -> None:
    """Add DATA, and what helps to read it."""
    parser.add_argument("data", help="captioned pictures: folder, *.parquet, *.tar, COCO *.json")
    parser.add_argument(
        "--images", type=Path, help="folder of the pictures, if not beside the data"
    )
    parser.add_argument(
        "--ignore-fields", nargs="+", default=[], metavar="FIELD", help="of your own, in the data"
    )
    parser.add_argument(
        "--check-pictures", action=argparse.BooleanOptionalAction,
        help="decode every picture before anything else; default: where the command decodes them, "
        "and not again with --resume",
    )  # fmt: skip


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
