"""Changes of one file: of its bytes in any format, of its fields where the format has any."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import re
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

_SHARE_OF_FIELDS = 0.5
_TIMES_OF_SAME_SIZE = 3  # as often as others: what a size shows needs no digest
_LONG = 100_000
# Written in place of these words: what the libraries refuse to write.
_DEEP, _DIGITS = "DEEPLYNESTED", "MANYDIGITS"
_NAN, _INFINITY = float("nan"), float("inf")
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 0.5, 2**31, 2**63, 10**30, 1e308, _NAN, _INFINITY, -_INFINITY,
    "", " ", "a", "\x1b[31m\r\n\0", "../../x", "/", "x" * _LONG, "é\u2028\ufeff", "\ud800", "=1+1",
    [], {}, [None], [[]], {"a": None}, [1, "a"], _DEEP, _DIGITS,
)  # fmt: skip


class _Codec(NamedTuple):
    load: Callable[[bytes], Any]
    dump: Callable[[Any, bytes], bytes]  # of changed fields, and the file as it was


def mutate(file: Path, rng: random.Random, ways: Sequence[str] = ("bytes", "fields")) -> str:
    """Change a file, and describe how."""
    content = file.read_bytes()
    codec = _CODECS.get(file.suffix.lower())
    if codec and "fields" in ways and (rng.random() < _SHARE_OF_FIELDS or "bytes" not in ways):
        # Some formats cannot hold each value; of a file without fields, its bytes are changed.
        for _ in range(5):
            with contextlib.suppress(Exception):
                described, tree = _mutate_tree(codec.load(content), rng)
                file.write_bytes(codec.dump(tree, content))
                return described
    return _mutate_bytes(file, content, rng)


def _mutate_bytes(file: Path, content: bytes, rng: random.Random) -> str:
    size = len(content)
    start, length = rng.randrange(size + 1), rng.choice((1, 2, 8, 64, 4096))
    start = rng.choice((start, start, min(size, rng.randrange(200))))  # headers are short
    part = content[start : start + length]
    others = sorted(f for f in file.parent.iterdir() if f.is_file() and f != file)
    bit = rng.randrange(8)
    flipped = f"bit {bit} of byte {start} flipped"
    ways: dict[str, Callable[[], bytes]] = {
        flipped: lambda: (
            content[:start] + bytes([content[start] ^ 1 << bit]) + content[start + 1 :]
        ),
        f"{len(part)} bytes at {start} zero": lambda: (
            content[:start] + bytes(len(part)) + content[start + len(part) :]
        ),
        f"cut at {start}": lambda: content[:start],
        f"{len(part)} bytes at {start} repeated": lambda: content[:start] + part + content[start:],
        f"{len(part)} bytes at {start} lost": lambda: content[:start] + content[start + length :],
        f"{length} bytes inserted at {start}": lambda: (
            content[:start] + rng.randbytes(length) + content[start:]
        ),
        "second half zero": lambda: content[: size // 2] + bytes(size - size // 2),
        "empty": lambda: b"",
    }
    if others:
        other = rng.choice(others)
        ways[f"content of {other.name}"] = other.read_bytes
    of_same_size = [*ways][:2] * (_TIMES_OF_SAME_SIZE - 1)
    way = rng.choice([*ways, *of_same_size, "missing", "a folder"])
    if way == flipped and start == size:
        way = "empty"
    file.unlink()
    if way == "a folder":
        file.mkdir()
    elif way != "missing":
        file.write_bytes(ways[way]())
    return way


def _mutate_tree(tree: Any, rng: random.Random) -> tuple[str, Any]:
    whole = {"": tree}
    places = list(_walk(whole))
    # Levels are chosen alike: a list of token ids has more entries than there are fields.
    depth = rng.choice(sorted({len(path) for _, path in places}))
    container, path = rng.choice([place for place in places if len(place[1]) == depth])
    key, old = path[-1], container[path[-1]]
    shown = f"field {'.'.join(map(str, path[1:]))}"[:200]
    way = rng.choice(("missing", "nested", "beside", "text", "scaled", *["other"] * 5))
    new = rng.choice(_VALUES)
    if way == "missing" and container is not whole:
        del container[key]
        return f"{shown} missing", whole[""]
    if way == "beside" and container is not whole:
        if isinstance(container, list):
            container.insert(key, new)
        else:
            container["unknown_field"] = new
        return f"{shown}: {new!r} beside it"[:400], whole[""]
    if way == "scaled" and isinstance(old, int | float) and not isinstance(old, bool):
        new = old * rng.choice((-1, 2, 1000, 10**9, 0.5))
    elif way == "nested":
        new = rng.choice(([old], {"a": old}))
    elif way == "text" and not isinstance(old, bytes):
        new = str(old)
    container[key] = new
    return f"{shown} is {new!r}"[:400], whole[""]


def _walk(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield tree, (*path, key)
        if isinstance(value, dict | list):
            yield from _walk(value, (*path, key))


def _write_marks(text: str) -> bytes:
    for mark, written in ((_DEEP, "[" * _LONG + "]" * _LONG), (_DIGITS, "9" * 5000)):
        text = re.sub(f"[\"']?{mark}[\"']?", written, text)
    return text.encode("utf-8", "surrogatepass")


def _dump_json(tree: Any, _: bytes) -> bytes:
    return _write_marks(json.dumps(tree, indent=1, ensure_ascii=False))


def _dump_lines(tree: Any, _: bytes) -> bytes:
    return _write_marks("\n".join(json.dumps(line, ensure_ascii=False) for line in tree) + "\n")


def _load_cells(content: bytes, delimiter: str = ",") -> list[list[str]]:
    return list(csv.reader(io.StringIO(content.decode(), newline=""), delimiter=delimiter))


def _dump_cells(tree: Any, _: bytes, delimiter: str = ",") -> bytes:
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter).writerows(tree)
    return _write_marks(stream.getvalue())


def _load_card(content: bytes) -> Any:
    return yaml.safe_load(content.decode().split("---\n")[1])


def _dump_card(tree: Any, content: bytes) -> bytes:
    before, _, *rest = content.decode().split("---\n")
    return _write_marks("---\n".join((before, yaml.safe_dump(tree), *rest)))


def _load_header(content: bytes) -> Any:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def _dump_header(tree: Any, content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = _dump_json(tree, b"")
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _load_tar(content: bytes) -> Any:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    return {n: json.loads(c) if n.endswith(".json") else c for n, c in members.items()}


def _dump_tar(tree: Any, _: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, value in tree.items():
            content = value if isinstance(value, bytes) else _dump_json(value, b"")
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def _load_parquet(content: bytes) -> Any:
    return pq.read_table(io.BytesIO(content)).to_pylist()


def _dump_parquet(tree: Any, _: bytes) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(tree), stream)
    return stream.getvalue()


def _load_pickle(content: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(content), weights_only=True)


def _dump_pickle(tree: Any, _: bytes) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save(tree, stream)
    return stream.getvalue()


_CODECS = {
    ".json": _Codec(json.loads, _dump_json),
    ".jsonl": _Codec(lambda content: [*map(json.loads, content.splitlines())], _dump_lines),
    ".yaml": _Codec(yaml.safe_load, lambda tree, _: _write_marks(yaml.safe_dump(tree))),
    ".csv": _Codec(_load_cells, _dump_cells),
    ".tsv": _Codec(
        lambda content: _load_cells(content, "\t"),
        lambda tree, content: _dump_cells(tree, content, "\t"),
    ),
    ".txt": _Codec(
        lambda content: content.decode().splitlines(),
        lambda tree, _: _write_marks("\n".join(map(str, tree))),
    ),
    ".md": _Codec(_load_card, _dump_card),
    ".safetensors": _Codec(_load_header, _dump_header),
    ".tar": _Codec(_load_tar, _dump_tar),
    ".parquet": _Codec(_load_parquet, _dump_parquet),
    ".pt": _Codec(_load_pickle, _dump_pickle),
}
