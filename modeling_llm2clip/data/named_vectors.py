"""Vectors made elsewhere, each with the name of what it is of: one safetensors file a side.

| file | names |
| --- | --- |
| `texts.safetensors` | the texts themselves |
| `pictures.safetensors` | what the set calls its pictures, e.g. their paths within its folder |

Each holds a tensor `vectors` (N, D) of any float dtype, and in its metadata `names`: a JSON list of
N names, all different.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .vector_store_layout import write_durably

SIDES = ("texts", "pictures")
_SHOWN = 5


@dataclass(frozen=True)
class NamedVectors:
    """Vectors and their names.

    Attributes:
        names: N different names.
        vectors: (N, D) of any float dtype, finite.
        notes: what else the file says of itself.
    """

    names: tuple[str, ...]
    vectors: Tensor
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.names) or not self.names:
            raise ValueError(
                f"vectors {tuple(self.vectors.shape)} must have one row for each of the "
                f"{len(self.names)} names, and at least one."
            )
        if not self.vectors.is_floating_point():
            raise ValueError(f"vectors are {self.vectors.dtype}; give floating-point ones.")
        if twice := sorted(name for name, count in Counter(self.names).items() if count > 1):
            raise ValueError(f"{len(twice)} names repeat: {twice[:_SHOWN]}. Keep one row of each.")
        broken = (~self.vectors.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if broken:
            named = [self.names[row] for row in broken[:_SHOWN]]
            raise ValueError(f"{len(broken)} vectors have a NaN or an infinity: {named}.")


def side_file(folder: Path, side: str) -> Path:
    """The file of a side, `"texts"` or `"pictures"`."""
    return folder / f"{side}.safetensors"


def read_named_vectors(file: Path) -> NamedVectors:
    """Read and check one file.

    Raises: ValueError saying what is wrong with it.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no file. Give a safetensors file of named vectors.")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if "names" not in metadata or "vectors" not in opened.keys():
                raise ValueError(
                    f"{file} must hold a tensor 'vectors' and, as metadata, 'names': a JSON list. "
                    f"It holds {_shorten(opened.keys())} and, as metadata, {_shorten(metadata)}."
                )
            names = json.loads(metadata.pop("names"))
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("the names are no JSON list of texts. Write each name as a text.")
            return NamedVectors(tuple(names), opened.get_tensor("vectors"), metadata)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}).") from error
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from error


def _shorten(names: Iterable[str]) -> str:
    """Name a few of what a file holds: one with the weights of a model has hundreds."""
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return (", ".join(map(repr, listed[:_SHOWN])) or "nothing") + more


def write_named_vectors(
    file: Path, names: Sequence[str], vectors: Tensor, *, notes: Mapping[str, str] | None = None
) -> None:
    """Write one file, whole or not at all.

    Args:
        vectors: (N, D) of any float dtype, finite, one row a name.
        notes: more for its metadata.
    """
    checked = NamedVectors(tuple(names), vectors.detach().cpu().contiguous())
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {**(notes or {}), "names": json.dumps(list(names), ensure_ascii=False)}
    write_durably(file, save({"vectors": checked.vectors}, metadata=metadata))
