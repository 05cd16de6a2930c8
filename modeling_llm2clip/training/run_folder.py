"""The files of a training run: `run.json`, `metrics.jsonl` and checkpoints.

`run.json` contains the command, `config` (the options), `inputs` (hashes of model, data and
stores), versions, commit, hardware, parameter counts, `results`, and a hash of the other fields.
Importing this module does not import torch, so a command can check a folder before any slow import.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .._environment import describe_hardware, list_versions, read_commit
from .._suggestions import MAX_LISTED, list_first
from ..data.atomic_files import (
    explain_full_disk,
    is_unfinished,
    lock_unless_held,
    require_new_folder,
    require_writable,
    write_atomically,
)
from ..data.sealed_manifest import (
    FileRecord,
    list_damage,
    read_sealed,
    record_file,
    write_sealed,
)
from ..data.sources.json_files import parse_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..configs.config_fields import Config

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
NEAREST_FILE = "nearest_groups.npy"
INHERITED_FILE = "inherited.safetensors"
# Held while a run is in progress: see `lock_run`.
LOCK_FILE = "run.lock"
# Last file of a checkpoint, sealed, with the SHA-256 of the other files. A checkpoint without it is
# incomplete.
_COMPLETE = "complete"
# Files that are written before the first checkpoint and needed to resume from any checkpoint.
_BESIDE = (NEAREST_FILE, INHERITED_FILE)
# Options that may change on resume because they do not affect the results. Weights and stores are
# compared by content, so their paths may change.
_MAY_DIFFER = {"num_workers", "report_to", "save_steps", "source", "folder"}
_FIXED_STEPS = (
    "The learning rate decays over the planned steps, so their number is fixed: to train longer, "
    "start a new run from this run's result."
)
# Why an option of this name cannot change, if that is not obvious.
_REASONS = {
    "max_steps": _FIXED_STEPS,
    "num_train_epochs": _FIXED_STEPS,
    "num_processes": "Each process has its own random numbers, so their number is fixed.",
}
_CHECKPOINTS_KEPT = 2
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_ATTEMPTS = 100
_HELD: set[IO[str]] = set()


def write_run_record(
    folder: Path, config: Config, inputs: Mapping[str, Any], *, model: nn.Module | None = None
) -> None:
    """Write `run.json`, keeping the results of an existing file."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "config": _to_json(asdict(config)),
        "inputs": _to_json(inputs),
        "versions": list_versions(),
        "commit": read_commit(),
        "hardware": describe_hardware(),
        **({} if model is None else {"parameters": count_parameters(model)}),
    }
    _write(folder, {**_read(folder), **record})


def add_results(folder: Path, **results: Any) -> None:
    record = _read(folder)
    _write(folder, {**record, "results": {**record.get("results", {}), **results}})


def read_results(folder: Path) -> dict[str, Any]:
    """Return the results that `add_results` wrote, or an empty dictionary."""
    return _read(folder).get("results", {})  # type: ignore[no-any-return]


def read_run_record(folder: Path) -> dict[str, Any]:
    file = folder / RUN_FILE
    try:
        return read_sealed(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError includes bytes that are not UTF-8
        raise ValueError(f"{file} cannot be read ({error}). Choose a new folder.") from error


def require_output(output: Path, *, resume: bool, model: Path | None) -> None:
    """Require that a run may use its output folder, and that its model does not exist yet."""
    if model is not None:
        require_new_folder(model)
    require_fresh_or_resumed(output, resume=resume)


def require_fresh_or_resumed(folder: Path, *, resume: bool) -> None:
    """Require an empty folder, or the folder of the run to resume."""
    require_writable(folder)
    # A run that was killed before it wrote its record has not done anything yet.
    if not folder.exists() or all(
        is_unfinished(path) or path.name == LOCK_FILE for path in folder.iterdir()
    ):
        return
    if not (folder / RUN_FILE).is_file():
        raise ValueError(f"{folder} is not empty and has no {RUN_FILE}. Choose a new folder.")
    if not resume:
        raise ValueError(
            f"{folder} contains an earlier run. Resume it with --resume ('resume=True' in Python), "
            "or choose a new folder."
        )


def require_same_run(
    folder: Path,
    config: Config,
    inputs: Mapping[str, Any],
    *,
    resume: bool,
    may_differ: Collection[str] = (),
) -> None:
    """Require that any run in a folder was started with the same options and inputs.

    Options and sections in `may_differ` are not compared, because they do not affect existing
    results. The last checkpoint must be intact.
    """
    require_fresh_or_resumed(folder, resume=resume)
    if not (folder / RUN_FILE).is_file():
        return
    record = read_run_record(folder)
    earlier = _flatten({**_add_defaults(config, record["config"]), **record["inputs"]})
    now = _flatten({**_to_json(asdict(config)), **_to_json(inputs)})
    ignored = _MAY_DIFFER | set(may_differ)
    different = [
        f"{name}: {earlier.get(name)!r} then, {now.get(name)!r} now"
        for name in sorted(set(earlier) | set(now))
        if not ignored & {name, name.partition(".")[0], name.rpartition(".")[2]}
        and earlier.get(name) != now.get(name)
    ]
    if different:
        names = [line.partition(":")[0].rpartition(".")[2] for line in different]
        reasons = dict.fromkeys(_REASONS[name] for name in names if name in _REASONS)
        raise ValueError(
            f"{folder} contains another run: {'; '.join(different)}. "
            f"{' '.join([*reasons, 'Choose a new folder.'])}"
        )
    require_intact_checkpoint(folder)


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Count the `total` and `trainable` parameters of each child module and of `all` together."""
    table: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        for part in (name.split(".")[0], "all"):
            row = table.setdefault(part, {"total": 0, "trainable": 0})
            row["total"] += parameter.numel()
            row["trainable"] += parameter.numel() * parameter.requires_grad
    return table


def list_trained(model: nn.Module) -> set[str]:
    """List the names of the trained parameters; tied parameters are listed only once.

    Buffers are not trained: batch normalization keeps its statistics.
    """
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def require_finite_weights(weights: Mapping[str, Tensor], *, step: int) -> None:
    """Refuse to write weights that are not finite."""
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise FloatingPointError(
            f"{len(broken)} of {len(weights)} trained weights are not finite after step {step}: "
            f"{broken[:MAX_LISTED]}. Nothing was written. Lower the learning rate, or train in "
            "float32."
        )


def mark_complete(output: Path, step: int) -> None:
    """Mark a step's checkpoint as complete, and delete all but the last two checkpoints.

    Checkpoints are ordered by step, because file timestamps depend on clocks and change when files
    are copied.
    """
    checkpoint = output / CHECKPOINTS / f"checkpoint-{step}"
    files = [file for file in sorted(checkpoint.rglob("*")) if file.name != _COMPLETE]
    files += [output / name for name in _BESIDE]
    names = [os.path.relpath(file, checkpoint) for file in files if file.is_file()]
    manifest = {"files": [asdict(record_file(checkpoint, name)) for name in names]}
    write_atomically(checkpoint / _COMPLETE, write_sealed(manifest).encode())
    for folder in _list_checkpoints(output)[:-_CHECKPOINTS_KEPT]:
        shutil.rmtree(folder)


def find_last_checkpoint(output: Path) -> Path | None:
    return next(iter(_list_complete(output)[::-1]), None)


def _list_checkpoints(output: Path) -> list[Path]:
    """List a run's checkpoints in order of step; ignore other folders, which are the user's."""
    folders = (output / CHECKPOINTS).glob("checkpoint-*")
    return sorted((f for f in folders if _CHECKPOINT.fullmatch(f.name)), key=_step_of)


def _list_complete(output: Path) -> list[Path]:
    return [folder for folder in _list_checkpoints(output) if (folder / _COMPLETE).is_file()]


def require_intact_checkpoint(output: Path) -> None:
    """Require that the last checkpoint's files match the recorded checksums."""
    checkpoints = _list_complete(output)
    if not checkpoints:
        return
    last = checkpoints[-1]
    try:
        text = (last / _COMPLETE).read_text(encoding="utf-8", errors="replace")
        damage = list_damage(last, [FileRecord(**file) for file in read_sealed(text)["files"]])
    except ValueError as error:
        damage = [f"{_COMPLETE}: {error}"]
    if damage:
        before = checkpoints[-2].name if checkpoints[:-1] else "the start"
        raise ValueError(
            f"{last} is damaged: {list_first(damage)}. Remove this checkpoint to resume the run "
            f"from {before}."
        )


def discard_later_steps(output: Path, checkpoint: Path | None) -> None:
    """Delete the metrics and incomplete checkpoints of steps that will be repeated."""
    step = 0 if checkpoint is None else _step_of(checkpoint)
    for folder in _list_checkpoints(output):
        if _step_of(folder) > step:
            shutil.rmtree(folder)
    file = output / METRICS_FILE
    if file.is_file():
        try:
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            # The last line of a killed run may be incomplete.
            complete = [line for line in lines if line.endswith("\n")]
            kept = [line for line in complete if parse_json(line)["step"] <= step]
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(
                f"{file} has a damaged line ({error!r}). Fix or remove the line."
            ) from error
        # If the process is killed here, the lines of the remaining steps must not be lost.
        write_atomically(file, "".join(kept).encode())


def _close_inherited() -> None:
    """Close the lock file in a loader worker, which can outlive the main process by seconds."""
    while _HELD:
        _HELD.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def lock_run(folder: Path, call: str = "--resume ('resume=True' in Python)") -> Iterator[None]:
    """Lock a run's folder for the processes of one launcher; raise ValueError if it is in use.

    The kernel holds the lock on a file in the folder and releases the lock however the main process
    ends. Without `flock` support, no lock is taken. If the folder is empty at the end, it is
    removed. If the disk is full, the error message suggests continuing with `call`.
    """
    # Imported here so a command can check a folder without torch.
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    remedy = f"Free some space and continue with {call}"
    with explain_full_disk(folder, "for the run", remedy), ExitStack() as stack:
        is_held = [True]
        if PartialState().is_main_process:
            is_held = [stack.enter_context(_hold(folder))]
        broadcast_object_list(is_held)
        if not is_held[0]:
            raise ValueError(
                f"{folder} is in use by another training process. Wait for it to end and continue "
                f"its run with {call}, or choose a new folder."
            )
        yield


@contextmanager
def _hold(folder: Path) -> Iterator[bool]:
    file = folder / LOCK_FILE
    with _open(file) as opened:
        is_held = lock_unless_held(file, opened)  # a run that just ended has removed this file
        if is_held:
            _HELD.add(opened)
        try:
            yield is_held
        finally:
            _HELD.discard(opened)
            if is_held:
                file.unlink(missing_ok=True)
                with suppress(OSError):  # it is not empty, or another run removed it
                    folder.rmdir()


def _open(file: Path) -> IO[str]:
    """Create a folder and open a file in it; retry if an ending run removes the folder."""
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError, FileExistsError):
            file.parent.mkdir(parents=True, exist_ok=True)
            return file.open("a", encoding="utf-8")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.open("a", encoding="utf-8")


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _read(folder: Path) -> dict[str, Any]:
    file = folder / RUN_FILE
    return read_sealed(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    # Atomic, because a run that is killed here must still be recognized on resume.
    write_atomically(folder / RUN_FILE, write_sealed(_to_json(record)).encode())


def _add_defaults(config: Config, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Add the default of every option that did not exist when a run was recorded."""
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    sections = {
        name: _add_defaults(getattr(config, name), value)
        for name, value in recorded.items()
        if isinstance(value, dict) and is_dataclass(getattr(config, name, None))
    }
    return {**_to_json(defaults), **recorded, **sections}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values to dotted names, so a message can name the values that differ."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat.update(nested if nested is not None else {prefix + name: value})
    return flat


def _to_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as `run.json` will contain them."""
    return json.loads(json.dumps(dict(values), default=str))  # type: ignore[no-any-return]
