"""The embedding store at scale, beside what else reads rows from disk.

    python -m benchmarks.scale.scale_store

1. Writes the same random rows (200,000 of 4,096 numbers in float16, 1.6 GB) as a store of shards of
   512 MB, as one file for `numpy.memmap`, as an Arrow file, and as a Lance dataset, and reads
   batches of 4,096 rows: at random places, and rows that follow each other. All formats take turns
   in one process, so that they see the same machine. The files are in the memory of the system,
   read into it from the disk one after the other: how they were written makes no difference.
   `rows_vs_numpy` is the rate of the store beside that of numpy. What a process reads for the first
   time the store also checks; that is measured apart.
2. Measures how fast bytes are checked, and other hashes beside.
3. Completes and opens a store of 100 million rows, whose files are sparse: only their heads and
   sizes are looked at.

`benchmarks/scale/scale.py` calls the functions of this file.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch

from benchmarks.shared.provenance import describe_run, write_result
from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.data.records.record_columns import ROWS_PER_BATCH
from modeling_llm2clip.data.sealed_manifest import write_sealed
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.data.store.store_index import SCHEMA
from modeling_llm2clip.data.store.store_manifest import RECORD_NAME, ShardRecord, StoreManifest
from modeling_llm2clip.embedding.store_writer import StoreWriter, begin_store

Array: TypeAlias = np.ndarray[Any, Any]
Read: TypeAlias = Callable[[Array], Array]
_BATCH = 4096
_WRITTEN_AT_ONCE = 8192
_CAPTIONS_PER_ITEM = 5


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--synthetic-rows", type=int, default=100_000_000)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "scale_store.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scale-store-", dir=arguments.folder) as folder:
        result = {
            "command": f"python -m benchmarks.scale.scale_store --rows {arguments.rows} "
            f"--dim {arguments.dim} --rounds {arguments.rounds} "
            f"--synthetic-rows {arguments.synthetic_rows}",
            **describe_run("numpy", "pyarrow", "torch"),
            "reading": measure_reading(
                Path(folder) / "rows", num_rows=arguments.rows, dim=arguments.dim,
                rounds=arguments.rounds,
            ),
            "checking": measure_checking(dim=arguments.dim),
            "opening": measure_opening(
                Path(folder) / "synthetic", num_rows=arguments.synthetic_rows, dim=arguments.dim
            ),
        }  # fmt: skip
    write_result(arguments.output, result)


def measure_reading(
    folder: Path, *, num_rows: int = 200_000, dim: int = 4096, rounds: int = 30
) -> dict[str, Any]:
    """Measure rows per second of the store and of other formats, in turn.

    Args:
        folder: new folder for 2 bytes per number and format.
        num_rows: rows to write.
        dim: numbers per row.
        rounds: batches that each format reads of each kind.
    """
    folder.mkdir(parents=True)
    write_store(folder / "store", num_rows, dim)
    readers = dict(_open_readers(folder, num_rows, dim))
    generator = np.random.default_rng(0)
    kinds: dict[str, Callable[[], Array]] = {
        "random": lambda: generator.integers(0, num_rows, _BATCH),
        "sequential": lambda: np.arange(_BATCH) + generator.integers(0, num_rows - _BATCH + 1),
    }
    store = EmbeddingStore.open(folder / "store")
    started = time.perf_counter()
    for rows in np.array_split(generator.permutation(num_rows), -(-num_rows // _BATCH)):
        store.read(rows, dtype=None)
    result: dict[str, Any] = {
        "batch": _BATCH,
        "rows_per_second_while_checking": round(num_rows / (time.perf_counter() - started)),
    }
    _reload(folder)
    for reader in readers.values():  # maps all pages, and checks all rows of the store
        for start in range(0, num_rows, _BATCH):
            reader(np.arange(start, min(start + _BATCH, num_rows)))
    for kind, draw in kinds.items():
        times: dict[str, list[float]] = {name: [] for name in readers}
        names = list(readers)
        for _ in range(rounds):
            rows = draw()
            for name in names:
                times[name].append(_time(readers[name], rows))
            names = [*names[1:], names[0]]  # whoever comes first has no advantage over the rounds
        rates = {
            name: round(_BATCH / statistics.median(seconds)) for name, seconds in times.items()
        }
        # The formats of a round read the same rows, one after the other.
        ratios = [a / b for a, b in zip(times["numpy"], times["store"], strict=True)]
        result[kind] = {
            "rows_per_second": rates,
            "rows_vs_numpy": round(statistics.median(ratios), 3),
            "rows_vs_numpy_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return result


def measure_checking(*, dim: int = 4096, num_rows: int = 8192) -> dict[str, float]:
    """Measure how many GB per second SHA-256 checks, and what other hashes would take.

    Args:
        dim: numbers of two bytes per row.
        num_rows: rows that are hashed.
    """
    rows = np.random.default_rng(0).integers(0, 2**16, (num_rows, dim), dtype=np.uint16)
    pieces = [row.tobytes() for row in rows]
    hashes: dict[str, Callable[[], object]] = {
        "sha256": lambda: [hashlib.sha256(piece).digest() for piece in pieces],
        "blake2b": lambda: [hashlib.blake2b(piece, digest_size=8).digest() for piece in pieces],
        "crc32": lambda: [zlib.crc32(piece) for piece in pieces],
    }
    if find_spec("xxhash"):
        from xxhash import xxh3_64_digest

        hashes["xxh3_64"] = lambda: [xxh3_64_digest(piece) for piece in pieces]
    if find_spec("blake3"):
        from blake3 import blake3

        hashes["blake3"] = lambda: [blake3(piece).digest() for piece in pieces]
    rates = {}
    for name, compute in hashes.items():
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            compute()
            seconds.append(time.perf_counter() - started)
        rates[f"{name}_gigabytes_per_second"] = round(rows.nbytes / min(seconds) / 1e9, 2)
    return rates


def measure_opening(
    folder: Path, *, num_rows: int = 100_000_000, dim: int = 4096
) -> dict[str, Any]:
    """Measure how long a store of many rows takes to be completed and opened.

    Args:
        folder: new folder; takes about 1 GB, most of it for the index.
        num_rows: rows of the store; five of them per item.
        dim: numbers per row.
    """
    writer = _begin(folder, num_rows, dim)
    for shard in range(writer.manifest.num_shards):
        write_sparse_shard(writer, shard)
    started = time.perf_counter()
    writer.finish()
    finished = time.perf_counter()
    store = EmbeddingStore.open(folder)
    opened = time.perf_counter()
    keys = store.keys
    read = time.perf_counter()
    return {
        "rows": num_rows,
        "items": len(keys),
        "shards": writer.manifest.num_shards,
        "finish_seconds": round(finished - started, 2),
        "open_seconds": round(opened - finished, 2),
        "check_index_seconds": round(read - opened, 2),
        "index_gigabytes": round(writer.manifest.index.bytes / 1e9, 2),
    }


def write_store(folder: Path, num_rows: int, dim: int) -> None:
    """Write a store of random rows in float16.

    Args:
        folder: new folder.
        num_rows: rows of the store.
        dim: numbers per row.
    """
    writer = _begin(folder, num_rows, dim)
    for shard in range(writer.manifest.num_shards):
        rows = writer.manifest.inputs_of_shard(shard)
        generator = torch.Generator().manual_seed(shard)
        writer.write(shard, torch.rand(len(rows), dim, generator=generator))
    writer.finish()


def _begin(folder: Path, num_rows: int, dim: int) -> StoreWriter:
    planned = StoreManifest(
        content="caption_embeds", fingerprint={}, dtype="float16", dim=dim,
        rows_per_shard=ExtractConfig().rows_per_shard, plan={},
    )  # fmt: skip
    num_items = -(-num_rows // _CAPTIONS_PER_ITEM)
    begin_store(folder, planned, _make_items(num_items, num_rows))
    return StoreWriter(folder, StoreManifest.read(folder))


def _make_items(num_items: int, num_rows: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, num_items, ROWS_PER_BATCH):
        items = np.arange(start, min(start + ROWS_PER_BATCH, num_items))
        names = pa.array(items).cast(pa.string())
        ends = np.minimum(np.arange(len(items) + 1) * _CAPTIONS_PER_ITEM,
                          num_rows - start * _CAPTIONS_PER_ITEM)  # fmt: skip
        rows = pa.array(np.arange(ends[-1]) + start * _CAPTIONS_PER_ITEM)
        lists = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), rows)
        langs = pa.array(["en"]).take(pa.array(np.zeros(len(items), np.int64)))
        counts = pa.array(np.diff(ends), pa.int32())
        keys = pa.array(items)
        columns = [names, names, langs, keys, keys, keys, counts, lists, lists]
        yield pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def write_sparse_shard(writer: StoreWriter, shard: int) -> None:
    """Write a shard that has its header and its size, and no embeddings.

    Args:
        writer: writer of a store that is begun.
        shard: number of the shard.
    """
    manifest = writer.manifest
    rows = len(manifest.inputs_of_shard(shard))
    file = writer.folder / manifest.name_shard(shard)
    tensor = torch.zeros(rows, manifest.dim, dtype=writer.stored_dtype)
    content, _ = writer.encode(shard, tensor)
    with file.open("wb") as opened:
        opened.write(content[: len(content) - rows * manifest.row_bytes])
        opened.truncate(len(content))
    record = ShardRecord(file.name, len(content), "", rows)
    noted = writer.folder / RECORD_NAME.format(shard)
    sealed = write_sealed({"of": manifest.hash_causes(), **asdict(record)})
    noted.write_text(sealed, encoding="utf-8")


def _open_readers(folder: Path, num_rows: int, dim: int) -> Iterator[tuple[str, Read]]:
    """Write the rows of the store in each other format, and yield what reads them."""
    store = EmbeddingStore.open(folder / "store")
    yield "store", _read_store(store)
    with (folder / "rows.bin").open("wb") as opened:
        for batch in _iterate_batches(store, num_rows):
            opened.write(batch.tobytes())
    mapped = np.memmap(folder / "rows.bin", np.float16, "r", shape=(num_rows, dim))
    yield "numpy", lambda rows: _read_mapped(mapped, rows)
    schema = pa.schema([("embeds", pa.list_(pa.float16(), dim))])
    with pa.ipc.new_file(folder / "rows.arrow", schema) as writer:
        for batch in _iterate_batches(store, num_rows):
            writer.write_batch(_to_arrow(batch, schema))
    table = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
    yield "arrow", lambda rows: _from_arrow(table.take(pa.array(rows)), dim)
    if find_spec("lance"):
        import lance

        batches = (_to_arrow(batch, schema) for batch in _iterate_batches(store, num_rows))
        lance.write_dataset(batches, folder / "rows.lance", schema=schema)
        dataset = lance.dataset(folder / "rows.lance")
        yield "lance", lambda rows: _from_arrow(dataset.take(rows), dim)


def _read_store(store: EmbeddingStore) -> Read:
    return lambda rows: store.read(rows, dtype=None).numpy()


def _read_mapped(mapped: Array, rows: Array) -> Array:
    """Read as numpy does it best: rows that follow each other as a slice."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return np.array(mapped[rows[0] : rows[-1] + 1])
    return np.asarray(mapped[rows])


def _iterate_batches(store: EmbeddingStore, num_rows: int) -> Iterator[Array]:
    for start in range(0, num_rows, _WRITTEN_AT_ONCE):
        rows = range(start, min(start + _WRITTEN_AT_ONCE, num_rows))
        yield store.read(rows, dtype=None).numpy()


def _to_arrow(batch: Array, schema: pa.Schema) -> pa.RecordBatch:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(batch.reshape(-1)), batch.shape[1])
    return pa.RecordBatch.from_arrays([lists], schema=schema)


def _from_arrow(table: pa.Table, dim: int) -> Array:
    column = table.column(0).combine_chunks()
    return np.asarray(column.flatten()).reshape(-1, dim)


def _reload(folder: Path) -> None:
    """Let the system drop its copies of all files, and read them from the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while opened.read(2**24):
                    pass


def _time(read: Read, rows: Array) -> float:
    started = time.perf_counter()
    embeddings = read(rows)
    seconds = time.perf_counter() - started
    assert len(embeddings) == len(rows)
    return seconds


if __name__ == "__main__":
    main()
