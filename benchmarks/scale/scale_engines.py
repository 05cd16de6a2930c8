"""The same extraction by one process, by two partitions and by two actors of Ray: bytes and time.

Called by `scale.py engines`. Each process and each actor has one thread, so that two use the cores
of a machine with two.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.scale.scale_records import write_records
from benchmarks.shared.small_model import write_small_model

_SHARD = "512"
_ENGINES = ("one", "partitions", "ray")


def measure_engines(folder: Path, *, count: int = 24_000, layers: int = 10) -> dict[str, Any]:
    """Extract captions three times.

    Args:
        folder: for temporary files.
        count: records, of two captions each.
        layers: of the language model.

    Returns:
        Seconds of each way, the ratios to one process, and whether all bytes are the same.
    """
    write_small_model(folder / "model", layers=layers)
    write_records(folder / "records", count)
    seconds, digests = {}, {}
    for engine in _ENGINES:
        begin = time.perf_counter()
        _run(engine, folder)
        seconds[engine] = round(time.perf_counter() - begin, 1)
        digests[engine] = _hash_files(folder / engine)
    return {
        "captions": 2 * count,
        "layers": layers,
        "seconds": seconds,
        "partitions_time_ratio": round(seconds["partitions"] / seconds["one"], 3),
        "ray_time_ratio": round(seconds["ray"] / seconds["one"], 3),
        "same_bytes": len({json.dumps(files) for files in digests.values()}) == 1,
    }


def _run(engine: str, folder: Path) -> None:
    command = [
        sys.executable, "-m", "modeling_llm2clip", "extract", str(folder / "model"),
        str(folder / "records"), str(folder / engine), "--modality", "text", "--device", "cpu",
        "--rows-per-shard", _SHARD,
    ]  # fmt: skip
    flags = {
        "one": [[]],
        "ray": [["--engine", "ray"]],
        "partitions": [["--partition", f"{number}/2"] for number in (1, 2)],
    }
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    started = [subprocess.Popen([*command, *more], env=env) for more in flags[engine]]
    if any([process.wait() for process in started]):  # waits for all
        raise SystemExit(f"{engine} failed.")


def _hash_files(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".arrow"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
