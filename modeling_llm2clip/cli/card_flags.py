"""Flags of what a model card states, which several commands have."""

from __future__ import annotations

import argparse
from typing import Any

LICENSE_FLAGS = ("license", "license_name", "license_link", "vision_license", "text_license")


def add_card_flags(card: Any) -> None:
    """Add the flags of licenses and of the names of both towers."""
    card.add_argument(
        "--license",
        metavar="ID",
        help="license of the weights, e.g. apache-2.0; default: that on MODEL's card, if any",
    )
    card.add_argument("--license-name", help="its name, with --license other; default: none")
    card.add_argument("--license-link", help="its address, with --license other; default: none")
    card.add_argument(
        "--base-models", nargs=2, metavar=("VISION", "LLM"),
        help="Hub ids of the towers; default: what their configurations say",
    )  # fmt: skip
    card.add_argument(
        "--vision-license", help="license of the vision tower; default: that of its card, if any"
    )
    card.add_argument(
        "--text-license", help="license of the language model; default: that of its card, if any"
    )


def pick_licenses(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `CardData` that were given."""
    given = {name: getattr(arguments, name) for name in LICENSE_FLAGS}
    return {name: value for name, value in given.items() if value}
