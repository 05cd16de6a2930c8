"""Shards of each format with the same samples, streams of them, and streams that are resumed."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from captioned_files import write_shard
from PIL import Image
from shard_server import ShardServer

from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.remote.remote_access import RetryPolicy
from modeling_llm2clip.data.streams.record_streams import RecordStream

FAST = RetryPolicy(first_wait=0.001)
SHARDS, SAMPLES = 8, 7


@cache
def encode_noise(number: int) -> bytes:
    """Encode an image of a few kilobytes that no other number has, so that a wrong one shows."""
    pixels = np.random.default_rng(number).integers(0, 255, (30, 30, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def describe(shard: int, sample: int) -> dict[str, Any]:
    number = shard * SAMPLES + sample
    return {"captions": [f"caption {number}", f"text {number}"], "group_id": f"g{number // 2}"}


def write_tars(folder: Path) -> Path:
    for shard in range(SHARDS):
        members = {}
        for sample in range(SAMPLES):
            members[f"{sample:04d}.png"] = encode_noise(shard * SAMPLES + sample)
            members[f"{sample:04d}.json"] = json.dumps(describe(shard, sample)).encode()
        write_shard(folder / f"{shard:05d}.tar", members)
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]], **options: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, **options)


def pack_image(number: int, path: str | None = None) -> dict[str, Any]:
    """Make an image of Parquet, as `datasets` has it."""
    return {"bytes": encode_noise(number), "path": path}


def write_parquets(folder: Path) -> Path:
    for shard in range(SHARDS):
        rows = [
            {"image": pack_image(shard * SAMPLES + sample), **describe(shard, sample)}
            for sample in range(SAMPLES)
        ]
        write_rows(folder / f"{shard:05d}.parquet", rows, row_group_size=3)
    return folder


def write_json_lines(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    for shard in range(SHARDS):
        lines = []
        for sample in range(SAMPLES):
            name = f"images/{shard}-{sample}.png"
            (folder / name).write_bytes(encode_noise(shard * SAMPLES + sample))
            lines.append(json.dumps({"image": name, **describe(shard, sample)}))
        (folder / f"{shard:05d}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "tar": write_tars,
    "parquet": write_parquets,
    "jsonl": write_json_lines,
}


def spell(server: ShardServer, suffix: str = "tar") -> str:
    return f"{server.url}/{{00000..{SHARDS - 1:05d}}}.{suffix}"


def read(record: CaptionedImage) -> tuple[CaptionedImage, bytes]:
    """Return a record without its address, and the bytes of its image."""
    assert record.image is not None
    return replace(record, image=None), record.image.read_bytes()


def list_names(stream: Any) -> list[str]:
    return [record.name for record in stream]


def flatten(batches: Any) -> list[str]:
    return [record.name for batch in batches for record in batch]


def stop_and_resume(make: Callable[[], Any], stop: int) -> tuple[list[Any], Any]:
    """Stop a stream or loader, and resume it from its saved state.

    Args:
        make: makes the stream or loader anew, as each process does.
        stop: how much it yields before its state is saved.

    Returns:
        What both yielded, and the resumed one.
    """
    stopped = make()
    iterator = iter(stopped)
    yielded = [next(iterator) for _ in range(stop)]
    if not isinstance(stopped, RecordStream):
        state = pickle.loads(pickle.dumps(stopped.state_dict()))
        del iterator  # with which the workers of a loader end
        resumed = make()
        resumed.load_state_dict(state)
        return [*yielded, *resumed], resumed
    for _ in range(2):  # the second one is resumed from one that has not read anything yet
        resumed = make()
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        stopped, rest = resumed, iter(resumed)
    return [*yielded, *rest], resumed
