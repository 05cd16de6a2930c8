"""What images cost where they lie: rows of Parquet files, members of local tars, streamed shards.

    python -m benchmarks.scale.scale_streams --output benchmarks/results/scale_streams.json

Shards are served over HTTP on loopback by a process of its own. Everything is in the page cache, so
that the numbers are those of reading and not of a disk or a network.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.shared.provenance import describe_run
from modeling_llm2clip.data.images.image_sources import ParquetImage, open_image
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.streams.record_streams import make_loader, stream_records

_DISTINCT_FILES = 8
# Row groups and options of Parquet writers; `datasets` writes without compression.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "uncompressed, groups of 100": (100, {"compression": "none", "use_dictionary": False}),
    "uncompressed, groups of 1000": (1000, {"compression": "none", "use_dictionary": False}),
    "Arrow's default (snappy), groups of 100": (100, {}),
    "Arrow's default (snappy), groups of 1000": (1000, {}),
}


def measure_parquet_images(
    folder: Path, *, num_files: int = 1200, image_bytes: int = 20_000, num_reads: int = 1000
) -> dict[str, dict[str, float]]:
    """Read random images out of many Parquet files, each with one row group.

    Args:
        folder: to write the files into.
        num_files: how many; most are hard links of a few, which differ for whoever opens them.
        image_bytes: of an image.
        num_reads: how many images.

    Returns:
        Layout to milliseconds an image: of the first reads, of later ones, and in order.
    """
    rng = np.random.default_rng(0)
    milliseconds = {}
    for name, (group, options) in LAYOUTS.items():
        place = Path(tempfile.mkdtemp(dir=folder))
        files = []
        images = [{"bytes": rng.bytes(image_bytes), "path": "a.jpg"} for _ in range(group)]
        for number in range(num_files):
            file = place / f"{number}.parquet"
            if number < _DISTINCT_FILES:
                pq.write_table(pa.table({"image": images}), file, row_group_size=group, **options)
            else:
                os.link(files[number % _DISTINCT_FILES], file)
            files.append(file)

        def read_at_random(files: list[Path] = files, group: int = group) -> None:
            for file in rng.integers(num_files, size=num_reads).tolist():
                ParquetImage(files[file], "image", int(rng.integers(group))).read_bytes()

        def read_in_order(files: list[Path] = files, group: int = group) -> None:
            for row in range(group):
                ParquetImage(files[0], "image", row).read_bytes()

        milliseconds[name] = {
            "first_ms": 1000 * _time(read_at_random) / num_reads,
            "later_ms": 1000 * _time(read_at_random) / num_reads,
            "in_order_ms": 1000 * _time(read_in_order) / group,
        }
    return milliseconds


def measure_streams(
    folder: Path, *, num_shards: int = 200, shard_size: int = 50, num_workers: int = 0
) -> dict[str, float]:
    """Read the same tar shards at random from files, and as a stream over HTTP.

    Args:
        folder: to write the shards into.
        num_shards: how many.
        shard_size: images of a shard.
        num_workers: processes that read; 0 for this one.

    Returns:
        Images a second: of both, without and with decoding.
    """
    shards = folder / "shards"
    write_shards(shards, num_shards, shard_size)
    records = load_records(shards)
    order = np.random.default_rng(0).permutation(len(records)).tolist()
    rates: dict[str, float] = {"images": len(records)}

    def read_files(read: Callable[[CaptionedImage], None]) -> None:
        for row in order:
            read(records[row])

    def read_stream(source: str, read: Callable[[CaptionedImage], None]) -> None:
        stream = stream_records(source, buffer_size=1000)
        collate = partial(_read_all, read=read)
        loader = make_loader(stream, batch_size=64, collate=collate, num_workers=num_workers)
        assert sum(loader) == len(records)

    with serve(shards) as url:
        source = f"{url}/{{00000..{num_shards - 1:05d}}}.tar"
        for name, read in (("bytes", _read_bytes), ("decoded", _decode)):
            rates[f"files_{name}_per_s"] = len(records) / _time(partial(read_files, read))
            rates[f"stream_{name}_per_s"] = len(records) / _time(partial(read_stream, source, read))
    return rates


def write_shards(folder: Path, num_shards: int, shard_size: int) -> None:
    """Write tar shards of JPEGs of about 20 kB, with captions.

    Args:
        folder: to make.
        num_shards: how many.
        shard_size: images of a shard.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = []
    for _ in range(20):
        coarse = Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8))
        stream = io.BytesIO()
        coarse.resize((256, 256)).save(stream, "JPEG", quality=90)
        images.append(stream.getvalue())
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for sample in range(shard_size):
                for suffix, content in (("jpg", images[sample % 20]), ("txt", b"a caption")):
                    member = tarfile.TarInfo(f"{shard:05d}{sample:04d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder by a process of its own, with ranges.

    Args:
        folder: to serve.

    Yields:
        The URL.
    """
    command = [sys.executable, "-m", "benchmarks.scale.scale_streams", "--serve", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


class _RangeHandler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        file = Path(self.translate_path(self.path))
        content = file.read_bytes()
        status, size = 200, len(content)
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if requested:
            start, stop = int(requested[1]), min(size, int(requested[2] or size) + 1)
            content, status = content[start:stop], 206
        self.send_response(status)
        if requested:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _serve_for_ever(folder: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_RangeHandler, directory=folder))
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


def _read_bytes(record: CaptionedImage) -> None:
    assert record.image is not None
    record.image.read_bytes()


def _decode(record: CaptionedImage) -> None:
    open_image(record.image).convert("RGB")


def _read_all(records: list[CaptionedImage], read: Callable[[CaptionedImage], None]) -> int:
    for record in records:
        read(record)
    return len(records)


def _time(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Measure, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--serve", help="serve this folder; the script calls itself with it")
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.serve:
        _serve_for_ever(arguments.serve)
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "parquet_images_in_1200_files": measure_parquet_images(Path(folder)),
            "streams_of_200_shards": measure_streams(
                Path(folder), num_workers=arguments.num_workers
            ),
            **describe_run(),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
