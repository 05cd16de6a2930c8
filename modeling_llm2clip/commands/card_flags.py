"""Flags of what a model card states, which several commands have."""

from __future__ import annotations

import argparse
from typing import Any

LICENSE_FLAGS = ("license_id", "license_name", "license_link", "vision_license", "text_license")


def add_card_flags(card: Any) -> None:
    """Add the flags of licences and of the names of both towers."""
    card.add_argument(
        "--license", dest="license_id", metavar="ID", help="of the weights, e.g. apache-2.0"
    )
    card.add_argument("--license-name", help="with --license other")
    card.add_argument("--license-link", help="with --license other")
    card.add_argument(
        "--base-models", nargs=2, metavar=("VISION", "LLM"), help="Hub ids of the towers"
    )
    card.add_argument("--vision-license", help="of the vision tower it derives from")
    card.add_argument("--text-license", help="of the language model it derives from")


def pick_licenses(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `CardFacts` that were given."""
    given = {name: getattr(arguments, name) for name in LICENSE_FLAGS}
    return {name: value for name, value in given.items() if value}
