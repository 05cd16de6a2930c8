"""Reads versions, hardware and commit for run records, results, `llm2clip env` and benchmarks."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "modeling_llm2clip", "torch", "transformers", "sentence-transformers", "accelerate", "peft",
    "datasets", "timm", "safetensors", "numpy",
)  # fmt: skip


def list_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """List the versions of Python and packages; "not installed" if a package is missing."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def describe_hardware() -> dict[str, Any]:
    """Describe the machine: architecture, number of torch threads, and GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "processor_threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def read_commit() -> str:
    """Return the code's commit if it runs from a git checkout."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():  # installed, perhaps inside another project's checkout
        return "not a checkout"
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return "unknown"
    return done.stdout.strip() or "unknown"
