"""The frame of every recorded result: commit, hardware, versions, memory, and how it is written."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from modeling_llm2clip._suggestions import counted

_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe_run(*packages: str, threads: int | None = None, note: str = "") -> dict[str, Any]:
    """Commit, hardware and versions of this run.

    Args:
        packages: Distributions whose versions matter, beside Python's own.
        threads: How many compute; None for OMP_NUM_THREADS, or all of the machine's.
        note: Load of the machine, such as "beside other work".
    """
    first, _, _ = os.environ.get("OMP_NUM_THREADS", "").partition(",")  # "2,1" nests
    count = counted(int(threads or first or os.cpu_count() or 1), "thread")
    hardware = f"{describe_processor()}, {platform.machine()}, {count}"
    return {
        "commit": read_commit(),
        "hardware": f"{hardware}, {note}" if note else hardware,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }


def write_result(path: Path, result: Mapping[str, Any] | list[Any]) -> None:
    """Write a result as JSON, and print it.

    Args:
        path: The file.
        result: The measurement.
    """
    text = json.dumps(result, indent=2)
    path.write_text(f"{text}\n", encoding="utf-8")
    print(text)


def read_peak_bytes(*, of_children: bool = False) -> int:
    """Return the highest resident memory of this process so far, or of those that it waited for."""
    who = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    return resource.getrusage(who).ru_maxrss * 1024


class ProcessUsage(NamedTuple):
    """Exit code and use of a process; its peak is never below that of its parent."""

    exit_code: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run_process(command: Sequence[str], **options: Any) -> ProcessUsage:
    """Run a process to its end, and measure it.

    Args:
        command: The program and its arguments.
        options: Further arguments of `subprocess.Popen`.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, **options)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)  # there is nothing left to wait for
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return ProcessUsage(process.returncode, seconds, cpu_seconds, usage.ru_maxrss * 1024)


def read_commit(checkout: Path | None = None) -> str:
    """Short name of the commit of a checkout.

    Args:
        checkout: Its folder. Default: the checkout of this file.
    """
    folder = checkout or Path(__file__).parent
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def describe_processor() -> str:
    """Return the name of the CPU, from Linux or else Python, and its units for matrix products.

    The name alone does not distinguish a CPU with units for bfloat16 from one without.
    """
    lines = dict(_split_line(line) for line in Path("/proc/cpuinfo").read_text().splitlines())
    name = lines.get("model name") or platform.processor() or "unknown"
    units = [unit for unit in _UNITS if unit in lines.get("flags", "").split()]
    return f"{name} ({', '.join(units)})" if units else name


def _split_line(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()
