"""Models and datasets of an evaluation, and its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .config_fields import Config
from .encoding_config import BatchConfig

ModelType = Literal["llm2clip", "sentence-transformers", "transformers", "open_clip", "embeddings"]


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel(Config):
    """One model to evaluate."""

    source: str
    """Folder or Hub id."""
    name: str = ""
    """Name in tables and of the results folder. Default: the last part of the source."""
    model_type: ModelType | None = None
    """Type of the model. Default: detected from its files."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository. Default: its main branch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name:
            object.__setattr__(self, "name", Path(self.source).name)
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(
                f"{self.source!r} gives no name for tables and folders: {self.name!r}. Name it: "
                f"NAME={self.source}."
            )


@dataclass(frozen=True, kw_only=True)
class EvaluatedDataset(Config):
    """One dataset to evaluate on."""

    name: str
    """Name of a known dataset, or your own name for your captioned images."""
    folder: str | None = None
    """Folder of its files. Default: the embedded files."""
    image_dir: str | None = None
    """Folder of its images. Default: the folder of the data."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(BatchConfig):
    """Options of encoding with a model of any type; in float32 none of them moves a score."""

    dtype: Literal["auto", "saved", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; saved keeps the stored one, and so does auto, except that a GPU may run
    the towers of an LLM2CLIP model in bfloat16, as `precision` of other commands does."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(EncoderConfig):
    """Options of `evaluate`: reading datasets, running models, scoring."""

    output: Path = Path("evaluation")
    """Folder of the results; results of earlier runs are kept."""
    languages: tuple[str, ...] = ()
    """Languages of multilingual datasets. Default: all, which only cross-lingual accepts."""
    captions_only: bool = False
    """Read no images, for text-only encoders."""
    skip_invalid: bool = False
    """Skip invalid samples and report their number, instead of stopping."""
    class_names: Path | tuple[str, ...] | Mapping[str, str] | None = None
    """Class names: FILE with one per line in the order of the classes; in Python also names, or a
    mapping from class to name. Default: the dataset's own."""
    templates: Path | tuple[str, ...] | None = None
    """Prompts of classes: FILE with one per line and {} for the name; in Python also the prompts.
    Default: the dataset's own."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of the data that are not read, known or not. Default: none."""

    def _list_conflicts(self) -> dict[str, object]:
        return {
            **super()._list_conflicts(),
            f"languages has a name twice: {', '.join(self.languages)}. Give each once.": (
                len(set(self.languages)) < len(self.languages)
            ),
        }
