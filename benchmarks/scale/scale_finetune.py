"""Scale of stage 1: memory and time of its start, and of the search for hard negatives.

    python -m benchmarks.scale.scale_finetune start --records 10000 100000 1000000
    python -m benchmarks.scale.scale_finetune nearest --groups 50000 1000000

`start` plans a fine-tuning of records with two captions, made of the example captions with a number
in each, and counts the texts that are truncated. Memory is what the process holds beyond mapped
files, at its peak, less what it holds after a start with few records; the slope is that of the
line through the two largest numbers of records, which have several batches. `nearest` searches the
nearest groups of random embeddings around 2,000 centers, in a space of 48 dimensions with noise in
all others.

Every measurement is a process of its own, with `--threads` threads.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

_DIM = 384
_TOP_K = 14
_LATENT, _CENTERS = 48, 2000
_ROWS_AT_ONCE = 2**16


def measure_starts(numbers: list[int], folder: Path, *, threads: int = 2) -> dict[str, Any]:
    """Measure the start of stage 1 for several numbers of records.

    Args:
        numbers: numbers of records.
        folder: folder for temporary files.
        threads: number of threads.

    Returns:
        Seconds and bytes for each number, and bytes per record.
    """
    measured = {number: _run("one-start", number, folder, threads) for number in numbers}
    slope = None
    if len(measured) > 1:
        few, many = sorted(measured)[-2:]
        grown = measured[many]["peak_bytes"] - measured[few]["peak_bytes"]
        slope = round(grown / (many - few), 2)
    return {"records": measured, "peak_bytes_per_record": slope}


def measure_nearest(numbers: list[int], folder: Path, *, threads: int = 2) -> dict[str, Any]:
    """Measure the search for the nearest groups for several numbers of groups.

    Args:
        numbers: numbers of groups.
        folder: folder for temporary files.
        threads: number of threads.

    Returns:
        Seconds of the whole search, seconds of an exact one by the time of some groups, recall.
    """
    return {str(number): _run("one-nearest", number, folder, threads) for number in numbers}


def start_once(number: int, folder: Path) -> dict[str, Any]:
    """Plan the fine-tuning of some records in this process.

    Args:
        number: number of records.
        folder: folder for temporary files.
    """
    from modeling_llm2clip.building.pretrained_towers import SMOLLM2, fetch_tower
    from modeling_llm2clip.configs.finetune_config import FinetuneConfig
    from modeling_llm2clip.data.records.record_table import RecordTable
    from modeling_llm2clip.training.finetuning.finetune_data import count_truncated
    from modeling_llm2clip.training.finetuning.finetune_llm import _prepare

    _write_records(number, folder / "records.arrow")
    records = RecordTable.open(folder / "records.arrow")
    processor = _make_processor(fetch_tower(SMOLLM2))
    config = FinetuneConfig(per_device_train_batch_size=1024)
    # Once for a few: imports and arenas of memory that do not depend on the number.
    scratch = folder / "few"
    scratch.mkdir()
    count_truncated(processor, _prepare(records[:5000], config, scratch)[0])
    scratch = folder / "pairs"
    scratch.mkdir()
    with _PeakMemory() as memory:
        begin = time.perf_counter()
        prepared, _ = _prepare(records, config, scratch)
        planned = time.perf_counter()
        counts = count_truncated(processor, prepared)
        counted = time.perf_counter()
    return {
        "seconds_planned": round(planned - begin, 1),
        "seconds_counted": round(counted - planned, 1),
        "peak_bytes": memory.peak,
        "held_bytes": memory.held,
        "table_bytes": sum(file.stat().st_size for file in scratch.iterdir()),
        **counts,
    }


def search_once(number: int, folder: Path) -> dict[str, Any]:
    """Search the nearest groups of random embeddings in this process.

    Args:
        number: number of groups.
        folder: folder for temporary files.
    """
    from modeling_llm2clip.training.finetuning import nearest_groups

    embeddings = _make_embeddings(number, folder / "embeddings")
    sample = np.arange(0, number, max(1, number // 1024))[:1024]
    begin = time.perf_counter()
    for _ in nearest_groups._search_exactly(embeddings, sample, _TOP_K, "cpu"):
        pass
    exact = (time.perf_counter() - begin) / len(sample) * number
    with _PeakMemory() as memory:
        begin = time.perf_counter()
        _, report = nearest_groups.find_nearest_groups(embeddings, _TOP_K)
        seconds = time.perf_counter() - begin
    return {
        "seconds": round(seconds, 1),
        "seconds_exact": round(exact, 1),
        "peak_bytes": memory.peak,
        **report,
    }


class _PeakMemory:
    """The memory that this process gains beyond mapped files: `peak` and `held` bytes."""

    def __enter__(self) -> _PeakMemory:
        _give_memory_back()
        self._before = self.peak = _count_bytes()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        self.held = _count_bytes() - self._before
        self.peak -= self._before

    def _watch(self) -> None:
        while not self._ends.wait(0.005):
            self.peak = max(self.peak, _count_bytes())


def _give_memory_back() -> None:
    """Return freed memory to the system, which would hide what is taken next."""
    import pyarrow as pa

    gc.collect()
    pa.default_memory_pool().release_unused()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _count_bytes() -> int:
    """Count resident bytes that are not of a file."""
    status = Path("/proc/self/status").read_text()
    sizes = re.findall(r"^(?:RssAnon|RssShmem):\s+(\d+) kB", status, re.MULTILINE)
    return sum(map(int, sizes)) * 1024


def _write_records(number: int, file: Path) -> None:
    """Write an index of records with two captions each."""
    import pyarrow as pa

    from modeling_llm2clip.data.records.record_columns import SCHEMA, make_batches
    from modeling_llm2clip.data.records.record_loading import find_example_data, load_records
    from modeling_llm2clip.data.records.records import CaptionedImage

    examples = load_records(find_example_data() / "photographs", require_images=False)
    captions = [text for record in examples for text in record.captions]

    def make(n: int) -> CaptionedImage:
        texts = tuple(f"{captions[(2 * n + k) % len(captions)]} {n}" for k in range(2))
        return CaptionedImage(None, f"{n:09}.jpg", f"{n:09}.jpg", texts)

    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for batch in make_batches(map(make, range(number))):
            writer.write_batch(batch)


def _make_processor(llm: Path) -> Any:
    from transformers import AutoTokenizer, CLIPImageProcessor

    from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor

    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return LLM2CLIPProcessor(CLIPImageProcessor(), tokenizer)


def _make_embeddings(number: int, file: Path) -> np.ndarray:
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(_CENTERS, _LATENT)).astype(np.float32)
    basis = generator.normal(size=(_LATENT, _DIM)).astype(np.float32) / np.sqrt(_LATENT)
    embeddings = np.memmap(file, np.float16, "w+", shape=(number, _DIM))
    for start in range(0, number, _ROWS_AT_ONCE):
        size = min(_ROWS_AT_ONCE, number - start)
        latent = centers[generator.integers(0, _CENTERS, size)]
        latent += 0.7 * generator.standard_normal((size, _LATENT), np.float32)
        rows = latent @ basis + 0.3 * generator.standard_normal((size, _DIM), np.float32)
        embeddings[start : start + size] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return embeddings


def _run(part: str, number: int, folder: Path, threads: int) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="scale-finetune-", dir=folder) as scratch:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.scale.scale_finetune", part, str(number), scratch],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    if done.returncode:
        raise SystemExit(f"{part} {number} ended with {done.returncode}.")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    """Measure and print; or be one of the processes that measure."""
    if len(sys.argv) == 4 and sys.argv[1] in _PARTS:
        print(json.dumps(_PARTS[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=["start", "nearest"])
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--groups", type=int, nargs="+", default=[50_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.gettempdir())
    if arguments.what == "start":
        measured = measure_starts(arguments.records, folder, threads=arguments.threads)
    else:
        measured = measure_nearest(arguments.groups, folder, threads=arguments.threads)
    print(json.dumps(measured, indent=2))


_PARTS = {"one-start": start_once, "one-nearest": search_once}


if __name__ == "__main__":
    main()
