"""Embeddings that were made elsewhere, with the names of their texts or images.

| file | names |
| --- | --- |
| `texts.safetensors` | the texts themselves |
| `images.safetensors` | the dataset's names of its images, such as their paths in its folder |

Each file has a tensor `embeddings` (N, D) of any float dtype and, in its metadata, `names`: a JSON
list of N different names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .._suggestions import counted, list_first
from ..loading_llm2clip import open_safetensors
from .sources.json_files import parse_json

SIDES = ("texts", "images")


@dataclass(frozen=True)
class NamedEmbeddings:
    """N embeddings, (N, D) of any float dtype and finite, and their names, all different."""

    names: tuple[str, ...]
    embeddings: Tensor
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or len(self.embeddings) != len(self.names) or not self.names:
            raise ValueError(
                f"embeddings of shape {tuple(self.embeddings.shape)} must have one row for each of "
                f"the {len(self.names)} names, and at least one."
            )
        if not self.embeddings.is_floating_point():
            raise ValueError(f"embeddings are {self.embeddings.dtype}; give floating-point ones.")
        if twice := sorted(name for name, count in Counter(self.names).items() if count > 1):
            shown = f"{counted(len(twice), 'repeated name')}: {list_first(twice)}"
            raise ValueError(f"{shown}. Keep one row of each.")
        broken = (~self.embeddings.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if broken:
            named = list_first(self.names[row] for row in broken)
            raise ValueError(f"NaN or infinity in {counted(len(broken), 'embedding')}: {named}.")


def side_file(folder: Path, side: str) -> Path:
    """Return the file of one side."""
    return folder / f"{side}.safetensors"


def read_named_embeddings(file: Path) -> NamedEmbeddings:
    """Read and check one file."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist. Give a safetensors file of named embeddings.")
    try:
        with open_safetensors(file) as opened:
            metadata = opened.metadata() or {}
            if "names" not in metadata or "embeddings" not in opened.keys():
                raise ValueError(
                    f"{file} must hold a tensor 'embeddings' and, as metadata, 'names': a JSON "
                    f"list. It holds {list_first(sorted(opened.keys())) or 'nothing'} and, as "
                    f"metadata, {list_first(sorted(metadata)) or 'nothing'}."
                )
            names = parse_json(metadata.pop("names"))
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError(
                    "the names are not a JSON list of texts. Write each name as a text."
                )
            return NamedEmbeddings(tuple(names), opened.get_tensor("embeddings"), metadata)
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from error
