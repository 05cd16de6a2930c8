"""Memory and speed of the store of embeddings: while it is filled, and when it is opened and read.

    python benchmarks/store_memory.py

1. Extracts 100,000 captions of made-up words, five per record and every twentieth a long one, with
   the tokenizer and the width of the embedded SmolLM2 but few random layers: what is held beside
   the model does not depend on their number. Resident memory beyond the model is the peak of the
   whole run less what is resident with the loaded model alone.
2. Writes a store of 1,000,000 rows of 4,096 random numbers in float16 (8 GB; no sparse file), opens
   it in a fresh process, and reads random rows, with the pages of the store in the memory of the
   system and without. It is in a temporary folder on the disk of `--folder` and is removed.

Each measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from provenance import describe_processor, read_commit
from small_model import write_small_model

_CAPTIONS_A_RECORD = 5
_LONG_EVERY = 20
_ROWS_READ = 4096
_MB = 1e6


def main() -> None:
    """Measure, print, and write the result; or be one of the processes that measure."""
    arguments = _parse()
    if arguments.part:
        print(json.dumps(_PARTS[arguments.part](arguments)))
        return
    with tempfile.TemporaryDirectory(prefix="store-memory-", dir=arguments.folder) as temporary:
        arguments.folder = Path(temporary)
        result = _describe(arguments)
        result["extraction"] = _measure_extraction(arguments)
        _require_room(arguments)
        result["store"] = {**_run("write", arguments), **_run("read", arguments)}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--layers", type=int, default=1, help="of the LLM, random")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--max-shard-size", default="512MB", help="of the captions' store")
    parser.add_argument("--batches", type=int, default=20, help="of 4,096 random rows")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "store_memory.json")
    parser.add_argument("--part", choices=sorted(_PARTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one measurement in a fresh process; returns what it measured."""
    passed = {k: v for k, v in vars(arguments).items() if k not in ("part", "output")}
    flags = [word for k, v in passed.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    done = subprocess.run(
        [sys.executable, __file__, "--part", part, *flags], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{part} failed with exit code {done.returncode}.")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(part, measured, flush=True)
    return measured


def _measure_extraction(arguments: argparse.Namespace) -> dict[str, Any]:
    prepared = _run("prepare", arguments)
    model_mb = _run("load", arguments)["rss_mb"]
    extracted = _run("extract", arguments)
    return {
        **prepared,
        "model_rss_mb": model_mb,
        **extracted,
        "rss_beyond_the_model_mb": round(extracted["peak_rss_mb"] - model_mb, 1),
    }


def _prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the model and the captions."""
    write_small_model(arguments.folder / "model", layers=arguments.layers)
    _write_captions(arguments.folder / "data", arguments.captions)
    described = f"SmolLM2's tokenizer and width, {arguments.layers} layers"
    return {"model": described, "captions": arguments.captions}


def _write_captions(folder: Path, count: int) -> None:
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(5000)]
    folder.mkdir()
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count // _CAPTIONS_A_RECORD):
            numbers = range(number * _CAPTIONS_A_RECORD, (number + 1) * _CAPTIONS_A_RECORD)
            sizes = [100 if n % _LONG_EVERY == 0 else generator.randint(4, 9) for n in numbers]
            captions = [" ".join(generator.choices(words, k=size)) for size in sizes]
            file.write(json.dumps({"image": f"{number}.png", "captions": captions}) + "\n")


def _load(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load what an extraction loads, and compute one caption."""
    import modeling_llm2clip.training.extraction.extract  # noqa: F401
    from modeling_llm2clip.data.record_loading import load_records  # noqa: F401
    from modeling_llm2clip.encoding.encode import encode_texts
    from modeling_llm2clip.modeling_llm2clip import LLM2CLIPTextModel
    from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor

    processor = LLM2CLIPProcessor.from_pretrained(arguments.folder / "model")
    model = LLM2CLIPTextModel.from_pretrained(arguments.folder / "model")
    encode_texts(model, processor, ["a dog"], project=False)
    return {"rss_mb": _read_memory("VmRSS")}


def _extract(arguments: argparse.Namespace) -> dict[str, Any]:
    from modeling_llm2clip.configs.extract_config import ExtractConfig
    from modeling_llm2clip.data.record_loading import load_records
    from modeling_llm2clip.data.store_manifest import read_manifest
    from modeling_llm2clip.training.extraction.extract import extract

    started = time.perf_counter()
    records = load_records(arguments.folder / "data", require_images=False)
    config = ExtractConfig(
        device="cpu", max_shard_size=arguments.max_shard_size, show_progress=False
    )
    folder = arguments.folder
    store = extract(folder / "model", records, folder / "captions", config, modality="text")
    seconds = time.perf_counter() - started
    return {
        "counts": read_manifest(store).counts,
        "peak_rss_mb": _read_memory("VmHWM"),
        "captions_per_second": round(arguments.captions / seconds, 1),
    }


def _write(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write random embeddings; an item has five rows."""
    from scale_store import write_store

    from modeling_llm2clip.data.store_manifest import read_manifest

    folder = arguments.folder / "store"
    started = time.perf_counter()
    write_store(folder, arguments.rows, arguments.dim)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {
        "rows": arguments.rows,
        "dim": arguments.dim,
        "dtype": "float16",
        "shards": read_manifest(folder).num_shards,
        "gigabytes": round(size / 1e9, 2),
        "write_megabytes_per_second": round(size / _MB / (time.perf_counter() - started), 1),
    }


def _read(arguments: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from modeling_llm2clip.data.embedding_store import EmbeddingStore

    folder = arguments.folder / "store"
    _forget_cached_pages(folder)
    before = _read_memory("VmRSS")
    started = time.perf_counter()
    store = EmbeddingStore.open(folder)
    open_seconds = time.perf_counter() - started
    opened = _read_memory("VmHWM")
    generator = np.random.default_rng(0)

    def read_batches() -> float:
        seconds = []
        for _ in range(arguments.batches):
            rows = generator.integers(0, arguments.rows, _ROWS_READ)
            started = time.perf_counter()
            store.read(rows)
            seconds.append(time.perf_counter() - started)
        return round(_ROWS_READ / statistics.median(seconds), 1)

    from_disk = read_batches()
    started = time.perf_counter()
    EmbeddingStore.open(
        folder, check="full"
    )  # leaves the store's pages with the system, if they fit
    full_seconds = time.perf_counter() - started
    from_memory = read_batches()
    return {
        "open_seconds": round(open_seconds, 3),
        "open_memory_mb": round(opened - before, 1),
        "random_rows_per_second_from_disk": from_disk,
        "random_rows_per_second_from_memory": from_memory,
        "memory_after_reading_mb": round(_read_memory("VmHWM") - before, 1),
        "full_check_seconds": round(full_seconds, 2),
    }


_PARTS = {"prepare": _prepare, "load": _load, "extract": _extract, "write": _write, "read": _read}


def _forget_cached_pages(folder: Path) -> None:
    """Let the system drop its copies of the files, so that the disk is measured."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read_memory(field: str) -> float:
    """Resident memory of this process in MB: `VmRSS` now, `VmHWM` at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) * 1024 / _MB, 1)
    raise SystemExit("Needs Linux: /proc/self/status reports the resident memory.")


def _require_room(arguments: argparse.Namespace) -> None:
    needed = 2 * arguments.rows * arguments.dim
    free = shutil.disk_usage(arguments.folder).free
    if free < 1.2 * needed:
        raise SystemExit(
            f"The store takes {needed / 1e9:.1f} GB, {arguments.folder} has {free / 1e9:.1f} GB "
            "free. Name a folder on a larger disk with --folder, or give --rows."
        )


def _describe(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    return {
        "command": f"python benchmarks/store_memory.py --captions {arguments.captions} "
        f"--layers {arguments.layers} --rows {arguments.rows} --dim {arguments.dim} "
        f"--max-shard-size {arguments.max_shard_size} --batches {arguments.batches}",
        "commit": read_commit(),
        "hardware": f"{describe_processor()}, {platform.machine()}, {torch.get_num_threads()} "
        "threads",
        "versions": {p: version(p) for p in ("torch", "transformers", "safetensors", "numpy")},
    }


if __name__ == "__main__":
    main()
