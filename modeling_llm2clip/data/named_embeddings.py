"""Embeddings made elsewhere, each with the name of what it is of: one safetensors file a side.

| file | names |
| --- | --- |
| `texts.safetensors` | the texts themselves |
| `images.safetensors` | what the set calls its images, e.g. their paths within its folder |

Each holds a tensor `embeddings` (N, D) of any float dtype, and in its metadata `names`: a JSON list
of N names, all different.
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

from .atomic_files import write_atomically

SIDES = ("texts", "images")
_SHOWN = 5


@dataclass(frozen=True)
class NamedEmbeddings:
    """Embeddings and their names.

    Attributes:
        names: N different names.
        embeddings: (N, D) of any float dtype, finite.
        notes: what else the file says of itself.
    """

    names: tuple[str, ...]
    embeddings: Tensor
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or len(self.embeddings) != len(self.names) or not self.names:
            raise ValueError(
                f"embeddings {tuple(self.embeddings.shape)} must have one row for each of the "
                f"{len(self.names)} names, and at least one."
            )
        if not self.embeddings.is_floating_point():
            raise ValueError(f"embeddings are {self.embeddings.dtype}; give floating-point ones.")
        if twice := sorted(name for name, count in Counter(self.names).items() if count > 1):
            raise ValueError(f"{len(twice)} names repeat: {twice[:_SHOWN]}. Keep one row of each.")
        broken = (~self.embeddings.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if broken:
            named = [self.names[row] for row in broken[:_SHOWN]]
            raise ValueError(f"{len(broken)} embeddings have a NaN or an infinity: {named}.")


def side_file(folder: Path, side: str) -> Path:
    """The file of a side, `"texts"` or `"images"`."""
    return folder / f"{side}.safetensors"


def read_named_embeddings(file: Path) -> NamedEmbeddings:
    """Read and check one file.

    Raises: ValueError saying what is wrong with it.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no file. Give a safetensors file of named embeddings.")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if "names" not in metadata or "embeddings" not in opened.keys():
                raise ValueError(
                    f"{file} must hold a tensor 'embeddings' and, as metadata, 'names': a JSON "
                    "list. "
                    f"It holds {_shorten(opened.keys())} and, as metadata, {_shorten(metadata)}."
                )
            names = json.loads(metadata.pop("names"))
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("the names are no JSON list of texts. Write each name as a text.")
            return NamedEmbeddings(tuple(names), opened.get_tensor("embeddings"), metadata)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}).") from error
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from error


def _shorten(names: Iterable[str]) -> str:
    """Name a few of what a file holds: one with the weights of a model has hundreds."""
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return (", ".join(map(repr, listed[:_SHOWN])) or "nothing") + more


def write_named_embeddings(
    file: Path, names: Sequence[str], embeddings: Tensor, *, notes: Mapping[str, str] | None = None
) -> None:
    """Write one file, whole or not at all.

    Args:
        embeddings: (N, D) of any float dtype, finite, one row a name.
        notes: more for its metadata.
    """
    checked = NamedEmbeddings(tuple(names), embeddings.detach().cpu().contiguous())
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {**(notes or {}), "names": json.dumps(list(names), ensure_ascii=False)}
    write_atomically(file, save({"embeddings": checked.embeddings}, metadata=metadata))
