"""Everything that a GPU should do fast, and exactly, in at most nine minutes.

    python -m benchmarks.gpu.gpu
    python -m benchmarks.gpu.gpu --only captions align
    python -m benchmarks.gpu.gpu --device cpu --tiny

Weights are random, in the sizes of Llama-3.2-1B, Llama-3-8B and CLIP L/14-336; captions are made up
with typical lengths. Nothing is downloaded. Every section prints its rows, and the result is
written after each section. A section that fails, because memory runs out or otherwise, is recorded
under `failures`; the next one still runs. Training batches fit the free memory. The run fails where
results differ from those of a CPU, and where a speed is below 80 % of the recorded one on the same
device: such rows stay as an earlier run recorded them. A goal that is missed is said. Goals are
those of one H100. With `--tiny` there are none, and nothing is written unless `--output` says
where.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import gpu_checks, gpu_encoding, gpu_training
from benchmarks.gpu.bench import Bench
from benchmarks.shared.provenance import describe_run

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "ceilings": gpu_encoding.measure_ceilings,
    "parity": gpu_checks.compare,
    "syncs": gpu_checks.count_syncs,
    "ranks": gpu_checks.measure_ranks,
    "captions": gpu_encoding.measure_captions,
    "images": gpu_encoding.measure_images,
    "latency": gpu_encoding.measure_latency,
    "align": gpu_training.measure_align,
    "tower": gpu_training.measure_tower,
    "extract": gpu_encoding.measure_extract,
    "peer": gpu_encoding.measure_peer,
    "finetune": gpu_training.measure_finetune,
}
_MOST_SECONDS = 9 * 60
_RESULT = Path(__file__).parents[1] / "results" / "gpu.json"
_PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "peft")


def main() -> int:
    """Run the sections, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="small, to see that it works")
    parser.add_argument("--output", type=Path, help="default: results/gpu.json")
    parser.add_argument("--folder", type=Path, help="where models and stores go, 40 GB")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("There is no GPU here; --device cpu --tiny tries everything without one.")
    output = arguments.output or (None if arguments.tiny else _RESULT)
    frame = describe_run(*_PACKAGES) | describe_device(device)
    before = _read(output)
    recorded = before.get("rows", {}) if before.get("device") == frame["device"] else {}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        bench = Bench(device, arguments.tiny, Path(folder).resolve(), recorded)
        for name in arguments.only:
            begin = time.perf_counter()
            if begin - started > _MOST_SECONDS:
                bench.failures[name] = "no time was left"
            else:
                run_section(name, bench)
                print(f"[{name}: {time.perf_counter() - begin:.0f} s]", flush=True)
            if output is not None:
                record = {**frame, "seconds": round(time.perf_counter() - started)}
                record |= {"failures": bench.failures, "rows": bench.kept_rows}
                output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name, failure in bench.failures.items():
        print(f"FAILED: {name}: {failure}", file=sys.stderr)
    return 1 if bench.failures else 0


def run_section(name: str, bench: Bench) -> None:
    """Run a section; an error is noted as its failure, so the next ones still run.

    Args:
        name: Of the section.
        bench: The run.
    """
    try:
        SECTIONS[name](bench)
    except torch.OutOfMemoryError as error:
        bench.failures[name] = f"out of memory: {str(error)[:200]}"
    except Exception as error:
        traceback.print_exc()
        bench.failures[name] = f"{type(error).__name__}: {error}"
    gc.collect()  # the error's frames and a Trainer's cycles hold tensors
    if bench.on_gpu:
        torch.cuda.empty_cache()


def describe_device(device: torch.device) -> dict[str, Any]:
    """Describe what is measured: a GPU's name, memory and driver."""
    if device.type != "cuda":
        return {"device": device.type}
    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name,
        "memory_gb": round(found.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _read_driver(),
    }


def _read_driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    return file.read_text(encoding="utf-8").splitlines()[0] if file.is_file() else "unknown"


def _read(file: Path | None) -> dict[str, Any]:
    if file is None or not file.is_file():
        return {}
    recorded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return recorded


if __name__ == "__main__":
    raise SystemExit(main())
