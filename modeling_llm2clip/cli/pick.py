"""From parsed flags to the dataclass that a public function takes."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any


def pick(arguments_class: Any, namespace: argparse.Namespace) -> Any:
    """Hand a dataclass those parsed arguments that it has fields for."""
    parsed = vars(namespace)
    return arguments_class(**{f.name: parsed[f.name] for f in fields(arguments_class)
                              if f.name in parsed})  # fmt: skip
