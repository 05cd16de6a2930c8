"""`llm2clip doctor`."""

from __future__ import annotations

import argparse
from typing import Any

from .._extras import require
from .extras import list_needs_of_model


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    doctor = commands.add_parser("doctor", help="check a checkpoint from the outside")
    doctor.add_argument("model", help="Hub id or folder")
    doctor.add_argument("--revision")
    doctor.add_argument("--device", default="cpu")
    doctor.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    require(*list_needs_of_model(arguments.model, revision=arguments.revision))
    from ..hub.doctor import diagnose

    diagnosis = diagnose(arguments.model, revision=arguments.revision, device=arguments.device)
    print(diagnosis.report())
    return 0 if diagnosis.healthy else 1
