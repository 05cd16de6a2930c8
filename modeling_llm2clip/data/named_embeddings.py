"""Embeddings that another program computed, with the names of their texts or images.

| file | names |
| --- | --- |
| `texts.safetensors` | the texts themselves |
| `images.safetensors` | the dataset's image names, such as paths relative to its folder |

Each file has a tensor `embeddings` (N, D) of any float dtype and, in its metadata, `names`: a JSON
list of N distinct names.
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
    """N finite embeddings, (N, D) of any float dtype, and their distinct names."""

    names: tuple[str, ...]
    embeddings: Tensor
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or len(self.embeddings) != len(self.names) or not self.names:
            raise ValueError(
                f"embeddings of shape {tuple(self.embeddings.shape)} must be 2-D, with one row for "
                f"each of the {len(self.names)} names, and at least one."
            )
        if not self.embeddings.is_floating_point():
            raise ValueError(f"embeddings are {self.embeddings.dtype}, not floating-point.")
        if twice := sorted(name for name, count in Counter(self.names).items() if count > 1):
            shown = f"{counted(len(twice), 'repeated name')}: {list_first(twice)}"
            raise ValueError(f"{shown}. Keep one row per name.")
        broken = (~self.embeddings.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if broken:
            named = list_first(self.names[row] for row in broken)
            raise ValueError(f"NaN or infinity in {counted(len(broken), 'embedding')}: {named}.")


def side_file(folder: Path, side: str) -> Path:
    return folder / f"{side}.safetensors"


def read_named_embeddings(file: Path) -> NamedEmbeddings:
    """Read and check a file of named embeddings."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist. Pass a safetensors file of named embeddings.")
    try:
        with open_safetensors(file) as opened:
            metadata = opened.metadata() or {}
            if "names" not in metadata or "embeddings" not in opened.keys():
                raise ValueError(
                    f"{file} must have a tensor 'embeddings' and the metadata 'names', a JSON "
                    f"list. It has the tensors {list_first(sorted(opened.keys())) or '(none)'} and "
                    f"the metadata {list_first(sorted(metadata)) or '(none)'}."
                )
            names = parse_json(metadata.pop("names"))
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("the names must be a JSON list of strings.")
            return NamedEmbeddings(tuple(names), opened.get_tensor("embeddings"), metadata)
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from error
