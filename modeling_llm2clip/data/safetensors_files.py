"""safetensors files: where a tensor is in one, reading and writing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

# What safetensors itself refuses to read as a header.
_MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor is in a safetensors file, so that numpy can map it without reading it.

    Attributes:
        dtype: As safetensors names it, such as `F32`.
        shape: Shape of the tensor.
        offset: First byte in the file.
        bytes: Number of bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int

    def require_size(self, file: Path, item_bytes: int) -> None:
        """Check that the tensor has as many bytes as its shape needs."""
        wanted = math.prod(self.shape) * item_bytes
        if self.bytes != wanted:
            raise ValueError(
                f"{file.name}: a tensor of shape {self.shape} needs {wanted} bytes, the file has "
                f"{self.bytes}"
            )


def read_header(file: Path) -> dict[str, TensorPlace]:
    """Read the header of a safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= min(size - 8, _MOST_HEADER_BYTES):
            raise ValueError(f"{file}: not a safetensors file.")
        try:
            header = json.loads(opened.read(length))
            places = {
                name: TensorPlace(
                    entry["dtype"],
                    tuple(entry["shape"]),
                    8 + length + entry["data_offsets"][0],
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: its safetensors header is damaged.") from error
    end = max((place.offset + place.bytes for place in places.values()), default=0)
    if end != size:
        raise ValueError(f"{file}: it has {size} bytes, its header says {end}.")
    return places


def serialize_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Serialize tensors so that the same content gives the same bytes in every process.

    safetensors itself writes several entries of metadata in a random order.
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
    """Yield the tensors of safetensors files by name; one is in memory at a time."""
    places: dict[str, tuple[Path, str]] = {}
    for file in files:
        folder = Path() if base is None else file.parent.relative_to(base)
        for name in _read_names(file):
            full_name = str(folder / name)
            if full_name in places:
                raise ValueError(
                    f"{full_name} is in two files, {places[full_name][0]} and {file}. Keep one."
                )
            if full_name.startswith(prefix):
                places[full_name] = (file, name)
    for full_name, (file, name) in sorted(places.items()):
        # Opened anew for each tensor, so that the memory of those before is given back.
        with safe_open(file, framework="pt") as opened:
            yield full_name, opened.get_tensor(name)


def _read_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or damaged ({error}). Save or download it again."
        ) from error
