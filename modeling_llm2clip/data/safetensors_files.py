"""Reads and writes safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..loading_llm2clip import naming_damage, open_safetensors

# Small next to a layer of an LLM, and large next to the header that is parsed at each opening.
_MOST_MAPPED_BYTES = 2**26


class SafetensorsReader:
    """Reads the tensors of a safetensors file one by one, with at most 64 MB and a tensor mapped.

    A file that is truncated while it is mapped ends the process with SIGBUS, as any mapped file.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._mapped_bytes = file, 0
        self._opened: Any = None

    def read(self, name: str) -> Tensor:
        """Read a tensor. Do not change it in place: another read may return the same memory."""
        if self._opened is None or self._mapped_bytes > _MOST_MAPPED_BYTES:
            with naming_damage(self._file):
                self._opened, self._mapped_bytes = safe_open(self._file, framework="pt"), 0
        tensor = self._opened.get_tensor(name)
        self._mapped_bytes += tensor.nbytes
        return tensor  # type: ignore[no-any-return]


def read_metadata(file: Path) -> dict[str, str]:
    with open_safetensors(file) as opened:
        return opened.metadata() or {}


def serialize_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Serialize tensors so that equal content gives equal bytes in every process.

    By itself, safetensors writes metadata entries in random order.
    """
    content = save(dict(tensors), metadata=dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    ordered += b" " * (-len(ordered) % 8)  # safetensors aligns the tensors
    return b"".join((len(ordered).to_bytes(8, "little"), ordered, content[end:]))


def iterate_tensors(
    files: Iterable[Path], *, prefix: str = "", base: Path | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of safetensors files in order of name, with one file mapped at a time."""
    files_of: dict[str, tuple[Path, str]] = {}
    for file in files:
        folder = Path() if base is None else file.parent.relative_to(base)
        with open_safetensors(file) as opened:
            names = list(opened.keys())
        for name in names:
            full_name = str(folder / name)
            if full_name in files_of:
                raise ValueError(
                    f"{full_name} is in two files, {files_of[full_name][0]} and {file}. Keep one "
                    "copy."
                )
            if full_name.startswith(prefix):
                files_of[full_name] = (file, name)
    for file, entries in groupby(sorted(files_of.items()), key=lambda entry: entry[1][0]):
        reader = SafetensorsReader(file)
        for full_name, (_, name) in entries:
            yield full_name, reader.read(name)
