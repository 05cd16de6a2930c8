"""What a run writes beside its weights, so that it can be read and repeated: `run.json`."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.atomic_files import is_unfinished, write_atomically

if TYPE_CHECKING:  # what a folder holds is asked before anything that takes long to import
    from torch import nn

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
# How the work is shared out, and nothing of what it comes to: another value continues the same run.
_MAY_DIFFER = {"num_workers"}
_PACKAGES = (
    "modeling_llm2clip", "torch", "transformers", "sentence-transformers", "accelerate", "peft",
    "datasets", "timm", "safetensors", "numpy",
)  # fmt: skip


def write_run_record(
    folder: Path, *, arguments: Mapping[str, Any], seed: int, model: nn.Module
) -> None:
    """Write `run.json`: command, arguments, versions, commit, seed, hardware, trainable parameters.

    Args:
        arguments: what the run was given; anything that JSON does not know is written as text.
        model: the module that is trained, ready for the first step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "arguments": _to_json(arguments),
        "seed": seed,
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _read_commit(),
        "hardware": _describe_hardware(),
        "parameters": count_parameters(model),
    }
    _write(folder, {**_read_record(folder), **record})


def write_run_entry(folder: Path, name: str, value: Any) -> None:
    """Add what came of a run, or was decided in it, to its record."""
    _write(folder, {**_read_record(folder), name: value})


def read_run_entry(folder: Path, name: str) -> Any:
    """Return what `write_run_entry` added; None where it is not there."""
    return _read_record(folder).get(name)


def _read_record(folder: Path) -> dict[str, Any]:
    file = folder / RUN_FILE
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    # Whole or not there: a run that is killed here must still be known when it is resumed.
    write_atomically(folder / RUN_FILE, (json.dumps(record, indent=2) + "\n").encode())


def require_fresh_or_resumed(folder: Path, *, resume: bool) -> None:
    """Raise ValueError for a folder with files: of no run, or of one that is not to be resumed."""
    # A run that was killed while it wrote its record has done nothing yet.
    if not folder.exists() or all(is_unfinished(path) for path in folder.iterdir()):
        return
    if not (folder / RUN_FILE).is_file():
        raise ValueError(f"{folder} is not empty and holds no {RUN_FILE}. Name a new folder.")
    if not resume:
        raise ValueError(
            f"{folder} holds an earlier run. Continue it with --resume, or name a new folder."
        )


def require_fresh_or_same_run(folder: Path, arguments: Mapping[str, Any], *, resume: bool) -> None:
    """Refuse an output folder that holds another run's files, or any without `resume`.

    Raises: ValueError naming every argument that differs, with both values; or those that the
        run's record, of another version of this package, has no value of.
    """
    require_fresh_or_resumed(folder, resume=resume)
    file = folder / RUN_FILE
    if not file.is_file():
        return
    earlier, now = _read_arguments(file), _to_json(arguments)
    if unknown := sorted(set(now) - set(earlier) - _MAY_DIFFER):
        raise ValueError(
            f"{file} does not say {', '.join(unknown)}: another version of this package began this "
            "run, and whether it would go on as it began cannot be told. Name a new folder."
        )
    earlier, now = _flatten(earlier), _flatten(now)
    different = [
        f"{name}: {earlier.get(name)!r} then, {now.get(name)!r} now"
        for name in sorted(set(earlier) | set(now))
        if name not in _MAY_DIFFER and earlier.get(name) != now.get(name)
    ]
    if different:
        raise ValueError(f"{folder} holds another run: {'; '.join(different)}. Name a new folder.")


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Count parameters of each direct part of a module: `{part: {total, trainable}}`, and `all`."""
    table: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        for part in (name.split(".")[0], "all"):
            row = table.setdefault(part, {"total": 0, "trainable": 0})
            row["total"] += parameter.numel()
            row["trainable"] += parameter.numel() * parameter.requires_grad
    return table


def _read_arguments(file: Path) -> dict[str, Any]:
    """What a run was given, from its record; ValueError where the file is none of ours."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes that are no text
        raise ValueError(f"{file} cannot be read ({error}). Name a new folder.") from error
    arguments = record.get("arguments") if isinstance(record, dict) else None
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{file} has no arguments: it is not the record of a run of this package. Name a new "
            "folder."
        )
    return arguments


def _flatten(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give what stands in nested tables a name of its own, so that it is told alone."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        nested = _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat.update(nested if nested is not None else {prefix + name: value})
    return flat


def _to_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the arguments read as when they come back from `run.json`."""
    return json.loads(json.dumps(dict(arguments), default=str))  # type: ignore[no-any-return]


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _read_commit() -> str:
    """Commit of the code, where it runs from a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():  # installed, perhaps inside somebody else's checkout
        return "not a checkout"
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return "unknown"
    return found.stdout.strip() or "unknown"


def _describe_hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "processor_threads": torch.get_num_threads(),
        "gpus": gpus,
    }
