"""The lower precision that was chosen for a model, in a file beside its weights.

Without the file nothing is lowered. It is written once, when `precision_probe.choose_precision` is
asked to, so that no load measures again and two loads never differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data.atomic_files import write_atomically
from ..model_folders.fingerprint import fingerprint_text
from ..model_folders.model_folder import find_model_folder
from .precision import LowerPrecision

PRECISION_FILE = "encoding_precision.json"


def read_precision(model: str | Path) -> LowerPrecision | None:
    """Read what was chosen for a model's captions; None where nothing was, or nothing paid.

    Args:
        model: folder or Hub id.
    Raises: ValueError when the file is broken, or was written for another model.
    """
    folder = find_model_folder(model)
    file = folder / PRECISION_FILE
    if not file.is_file():
        return None
    remedy = "Delete it; choose_precision writes a new one."
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        chosen, recorded = record["chosen"], record["fingerprint"]
        precision = None if chosen is None else _parse(chosen)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({error!r}). {remedy}") from error
    found = fingerprint_text(folder)
    if different := sorted(k for k in {*found, *recorded} if found.get(k) != recorded.get(k)):
        raise ValueError(f"{file} is of a model with another {', '.join(different)}. {remedy}")
    return precision


def write_precision(
    folder: Path, precision: LowerPrecision | None, measured: Mapping[str, Any]
) -> None:
    """Record a choice beside the model's weights, with what it rests on."""
    chosen = None
    if precision is not None:
        dtype = str(precision.dtype).removeprefix("torch.")
        chosen = {"dtype": dtype, "first_layer": precision.first_layer}
    record = {"chosen": chosen, "fingerprint": fingerprint_text(folder), **measured}
    write_atomically(folder / PRECISION_FILE, (json.dumps(record, indent=2) + "\n").encode())


def _parse(chosen: Mapping[str, Any]) -> LowerPrecision:
    return LowerPrecision(getattr(torch, chosen["dtype"]), int(chosen["first_layer"]))
