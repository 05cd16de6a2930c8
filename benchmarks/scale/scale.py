"""What millions of records cost: to index, to open, and in every stage before its first step.

    python -m benchmarks.scale.scale records --counts 10000 100000 1000000 10000000
    python -m benchmarks.scale.scale stages --counts 10000 100000 1000000
    python -m benchmarks.scale.scale recipes | store | finetune | streams | engines | plan

Records are captions of the embedded emoji, made different by a number, with the emoji's images.
Each measurement is a process of its own. A part adds its figures to `results/scale.json` and leaves
those of the others.

Memory is reported in two ways. `resident` counts pages of mapped files too, which the processes of
a machine share and the system takes back at need; `private` is what a process has for itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale import scale_finetune, scale_store, scale_streams
from benchmarks.scale.scale_engines import measure_engines
from benchmarks.scale.scale_plan import plan
from benchmarks.scale.scale_records import write_records
from benchmarks.scale.scale_stages import (
    STAGES,
    measure_stage,
    plan_recipes,
    prepare_recipes,
    prepare_stage,
)
from benchmarks.shared.provenance import describe_processor, read_commit

_OUTPUT = Path(__file__).parents[1] / "results" / "scale.json"
_OPENED = 5  # times
_MB = 1e6


def main() -> None:
    """Measure, print, and write the result; or be one of the processes that measure."""
    arguments = _parse()
    if arguments.measure:
        print(json.dumps(_MEASUREMENTS[arguments.measure](arguments)))
        return
    recorded = json.loads(_OUTPUT.read_text()) if _OUTPUT.is_file() else {}
    if arguments.part == "plan":
        recorded["plan"] = plan(recorded)
    else:
        with tempfile.TemporaryDirectory(prefix="scale-", dir=arguments.folder) as temporary:
            arguments.folder = Path(temporary)
            figures = _PARTS[arguments.part](arguments)
        recorded[arguments.part] = {**_describe(), **figures}
    parts = {part: recorded[part] for part in (*_PARTS, "plan") if part in recorded}
    recorded = {**_summarize(recorded), **parts}
    _OUTPUT.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(recorded[arguments.part], indent=2))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("part", choices=[*sorted(_PARTS), "plan"])
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--measure", choices=sorted(_MEASUREMENTS), help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    return parser.parse_args()


def _describe() -> dict[str, Any]:
    return {
        "processor": describe_processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("pyarrow", "numpy", "torch")},
        "commit": read_commit(),
    }


def _summarize(recorded: dict[str, Any]) -> dict[str, Any]:
    """Choose the figures that bars are set for; they stand first in the file."""
    places = {
        "open_seconds": ("records", "open_seconds"),
        "open_mb": ("records", "open_mb"),
        "index_records_per_second": ("records", "index_records_per_second"),
        "bytes_per_record": ("stages", "bytes_per_record"),
        "rows_vs_numpy": ("store", "random", "rows_vs_numpy"),
        "ray_time_ratio": ("engines", "ray_time_ratio"),
        "stream_images_per_second": ("streams", "stream_bytes_per_s"),
    }
    figures = {}
    for name, path in places.items():
        value: Any = recorded
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            figures[name] = value
    if "finetune" in recorded:
        slope = recorded["finetune"]["peak_bytes_per_record"]
        stages = figures.get("bytes_per_record", {})
        figures["bytes_per_record"] = {**stages, "finetune-llm": {"private_mb": slope}}
    return figures


def _run(measure: str, arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Run one measurement in a fresh process; returns what it measured."""
    flags = [w for k, v in more.items() for w in (f"--{k}", str(v))]
    command = [sys.executable, "-m", "benchmarks.scale.scale", arguments.part, "--measure", measure]
    done = subprocess.run(
        [*command, "--folder", str(arguments.folder), *flags],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(arguments.folder / "cache")},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{measure} {more} failed with exit code {done.returncode}.")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(measure, more, measured, flush=True)
    return measured


def _measure_records(arguments: argparse.Namespace) -> dict[str, Any]:
    """Index and open records of several counts."""
    rows = []
    for count in arguments.counts:
        write_records(arguments.folder / str(count), count)
        built = _run("index", arguments, count=count)
        rows.append({"records": count, **built, **_run("open", arguments, count=count)})
    largest = rows[-1]
    return {
        "counts": rows,
        "index_records_per_second": largest["records_per_second"],
        "open_seconds": largest["open_seconds"],
        "open_mb": largest["open_resident_mb"],
        "file_bytes_per_record": round(largest["file_mb"] * _MB / largest["records"]),
    }


def _index(arguments: argparse.Namespace) -> dict[str, Any]:
    """Index the records, with all processes that the index starts."""
    from modeling_llm2clip.data.records.record_loading import load_records

    begin = time.perf_counter()
    records = load_records(arguments.folder / str(arguments.count))
    seconds = time.perf_counter() - begin
    file = records.file
    return {
        "index_seconds": round(seconds, 2),
        "records_per_second": round(len(records) / seconds),
        "index_private_mb": round(read_memory()["peak_mb"], 1),
        "file_mb": 0.0 if file is None else round(file.stat().st_size / _MB, 1),
    }


def _open(arguments: argparse.Namespace) -> dict[str, Any]:
    """Open the index, and read the first, the last and a random record."""
    from modeling_llm2clip.data.records.record_loading import load_records

    before = read_memory()
    times = []
    for _ in range(_OPENED):
        begin = time.perf_counter()
        records = load_records(arguments.folder / str(arguments.count))
        read = [records[0], records[len(records) // 3], records[-1]]
        times.append(time.perf_counter() - begin)
        assert len(read) == 3
    after = read_memory()
    return {
        "open_seconds": round(max(times), 4),
        "open_resident_mb": round(after["resident_mb"] - before["resident_mb"], 1),
        "open_private_mb": round(after["private_mb"] - before["private_mb"], 1),
    }


def _measure_stages(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start every stage on records of several counts, and fit how its memory grows."""
    rows: list[dict[str, Any]] = []
    for count in arguments.counts:
        write_records(arguments.folder / str(count), count)
        for stage in STAGES:
            _run("prepare", arguments, count=count, stage=stage)
            measured = _run("stage", arguments, count=count, stage=stage)
            rows.append({"stage": stage, "records": count, **measured})
    slopes = {
        stage: {
            name: round(_fit_slope([row for row in rows if row["stage"] == stage], name), 2)
            for name in ("resident_mb", "private_mb")
        }
        for stage in STAGES
    }
    return {"counts": rows, "bytes_per_record": slopes}


def _measure_recipes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the dry runs of the paper's recipes on several counts, and fit how they grow."""
    rows: list[dict[str, Any]] = []
    for count in arguments.counts:
        _run("prepare-recipes", arguments, count=count)
        rows.append({"records": count, **_run("recipes", arguments, count=count)})
    slopes = {n: round(_fit_slope(rows, n), 2) for n in ("resident_mb", "private_mb")}
    seconds = _fit_slope(rows, "cpu_seconds") / _MB
    return {
        "counts": rows,
        "bytes_per_record": slopes,
        "cpu_microseconds_per_record": round(seconds * 1e6, 2),
    }


def _measure_store(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read rows beside numpy, Arrow and Lance; complete and open a store of 100 million rows."""
    reading = scale_store.measure_reading(arguments.folder / "rows")
    return {
        **reading,
        "checking": scale_store.measure_checking(),
        "opening": scale_store.measure_opening(arguments.folder / "opened"),
    }


def _measure_finetuning(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start `finetune-llm`, and search for hard negatives."""
    starts = scale_finetune.measure_starts(arguments.counts, arguments.folder)
    return {
        **starts,
        "nearest_groups": scale_finetune.measure_nearest([50_000, 1_000_000], arguments.folder),
    }


def _measure_streaming(arguments: argparse.Namespace) -> dict[str, Any]:
    """Stream 200 tar shards over HTTP, and read images of 1,200 Parquet files at random."""
    return {
        **scale_streams.measure_streams(arguments.folder),
        "parquet": scale_streams.measure_parquet_images(arguments.folder),
    }


def _fit_slope(rows: list[dict[str, Any]], name: str) -> float:
    """Fit bytes per record by least squares."""
    counts = np.array([row["records"] for row in rows], float)
    return float(np.polyfit(counts, [row[name] * _MB for row in rows], 1)[0])


def read_memory() -> dict[str, float]:
    """Read the memory of this process in MB: resident, private, and the peak of resident."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {name: int(value.split()[0]) for name, value in status.items() if " kB" in value}
    return {
        "resident_mb": kilobytes["VmRSS"] * 1024 / _MB,
        "private_mb": kilobytes["RssAnon"] * 1024 / _MB,
        "peak_mb": kilobytes["VmHWM"] * 1024 / _MB,
    }


_PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "records": _measure_records,
    "stages": _measure_stages,
    "recipes": _measure_recipes,
    "store": _measure_store,
    "finetune": _measure_finetuning,
    "streams": _measure_streaming,
    "engines": lambda arguments: measure_engines(arguments.folder / "engines"),
}
_MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "index": _index,
    "open": _open,
    "prepare": lambda a: prepare_stage(a.stage, a.folder, a.count),
    "stage": lambda a: measure_stage(a.stage, a.folder, a.count),
    "prepare-recipes": lambda a: prepare_recipes(a.folder, a.count),
    "recipes": lambda a: plan_recipes(a.folder, a.count),
}

if __name__ == "__main__":
    main()
