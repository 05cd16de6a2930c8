"""Options for evaluations, including the models and datasets."""

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
    """Folder or Hub id of the model."""
    name: str = ""
    """Name of the model in tables and of its results folder. Default: the last part of the source.
    """
    model_type: ModelType | None = None
    """Type of the model. Default: detected from its files."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repository. Default: the main branch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name:
            object.__setattr__(self, "name", Path(self.source).name)
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(
                f"{self.source!r}: {self.name!r} cannot be a name for tables and folders. Choose "
                f"one with NAME={self.source}."
            )


@dataclass(frozen=True, kw_only=True)
class EvaluatedDataset(Config):
    """One dataset to evaluate on."""

    name: str
    """Name of a known dataset, or any name for your own captioned images."""
    folder: str | None = None
    """Folder of the dataset's files. Default: none, for a dataset that is included in the package.
    """
    image_dir: str | None = None
    """Folder of the dataset's images. Default: the folder of its files."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(BatchConfig):
    """Options for encoding with any model type; in float32 none of them affects the scores."""

    dtype: Literal["auto", "saved", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights. saved keeps the stored dtype. auto also keeps it, except that the
    towers of an LLM2CLIP model may run in bfloat16, as with `precision` in other commands.
    """


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(EncoderConfig):
    """Options for `evaluate`: reading datasets, running models, scoring."""

    without_flags = ("caption_fields",)

    output: Path = Path("evaluation")
    """Folder for the results; earlier results in it are kept."""
    languages: tuple[str, ...] = ()
    """Languages of multilingual datasets. Default: all; only the cross-lingual task accepts more
    than one."""
    captions_only: bool = False
    """Read no images, for text-only encoders."""
    skip_invalid: bool = False
    """Skip invalid samples and report their number instead of stopping."""
    class_names: Path | tuple[str, ...] | Mapping[str, str] | None = None
    """Class names: FILE with one per line, in class order; in Python, names or a mapping from class
    to name are also accepted. Default: the dataset's own."""
    templates: Path | tuple[str, ...] | None = None
    """Prompt templates: FILE with one per line, with {} for the class name; in Python, templates
    themselves are also accepted. Default: the dataset's own."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of the records to ignore; any other unknown field is an error. Default: none."""
    caption_fields: tuple[str, ...] | None = None
    """For folders of your own data, fields of the captions to read, short and long, which every
    record must have; other captions are ignored. Default: every field of captions."""

    def _list_conflicts(self) -> dict[str, object]:
        return {
            **super()._list_conflicts(),
            f"languages has duplicates: {', '.join(self.languages)}. List each once.": (
                len(set(self.languages)) < len(self.languages)
            ),
        }
