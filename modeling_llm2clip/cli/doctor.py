"""`llm2clip doctor`."""

from __future__ import annotations

import argparse
from typing import Any

from .._extras import require
from .extras import list_needs_of_model
from .parser import add_device_flag, choose_device


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    doctor = commands.add_parser(
        "doctor",
        help="check a checkpoint from the outside",
        examples=("llm2clip doctor llm2clip-demo/model",),
    )
    doctor.add_argument("model", help="Hub id or folder")
    doctor.add_argument(
        "--revision", help="branch, tag or commit of a Hub repository; default: its main branch"
    )
    add_device_flag(doctor)
    doctor.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    require(*list_needs_of_model(arguments.model, revision=arguments.revision))
    from ..model_folders.model_types import require_own_model

    require_own_model(arguments.model, revision=arguments.revision)
    device = choose_device(arguments)

    from ..doctor.check_model import check_model

    report = check_model(arguments.model, revision=arguments.revision, device=str(device))
    print(report)
    return 0 if report.healthy else 1
