"""Models and datasets of an evaluation, and its options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from .config_fields import Config
from .encoding_config import EncodingConfig

ModelType = Literal["llm2clip", "sentence-transformers", "transformers", "open_clip", "embeddings"]


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel(Config):
    """One model to evaluate."""

    source: str
    """Folder, Hub id, or weights file of open_clip."""
    name: str = ""
    """Name in tables, and folder of its results. Default: the last part of the source."""
    model_type: ModelType | None = None
    """Type of the model. Default: detected from its files."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository. Default: its main branch."""
    architecture: str | None = None
    """open_clip's name of the architecture in a weights file. No default, and needed for one."""
    activation: Literal["gelu", "quick_gelu"] | None = None
    """Activation in a weights file whose architecture is published with both. Default: the one
    that it is published with."""
    head: str | None = None
    """Model whose projections stored embeddings go through. Default: none."""
    extracted_from: str | None = None
    """Captioned data that stores were extracted from. No default, and needed for stores."""

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
    """Name of a known dataset, or one of your own for your own captioned images."""
    folder: str | None = None
    """Folder of its files. Default: the embedded ones."""
    image_dir: str | None = None
    """Folder of its images. Default: beside the data."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(EncodingConfig):
    """Options of encoding with a model of any type; in float32 none of them moves a score."""

    dtype: Literal["saved", "float32", "bfloat16", "float16"] = "saved"
    """Dtype of the weights; saved leaves them as they are."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(EncoderConfig):
    """Options of `evaluate`: reading datasets, running models, scoring."""

    output: Path = Path("evaluation")
    """Folder of the results; those of earlier runs stay."""
    languages: tuple[str, ...] = ()
    """Languages of multilingual datasets. Default: all, which only cross-lingual takes."""
    captions_only: bool = False
    """Read no images, for text encoders alone."""
    skip_invalid: bool = False
    """Leave out invalid samples and report how many, instead of stopping at them."""
    check_images: bool = True
    """Decode every image before a model is loaded."""
    class_names: Path | tuple[str, ...] | Mapping[str, str] | None = None
    """Class names: FILE with one per line in the order of the classes; in Python also names, or
    class to name. Default: those of the dataset."""
    templates: Path | tuple[str, ...] | None = None
    """Prompts of classes: FILE with one per line, {} for the name; in Python also the prompts.
    Default: those of the dataset."""
    allow_repeated_class_names: bool = False
    """Keep classes that share a name, as ImageNet has some; their images count as wrong."""
    allow_distractors: bool = False
    """In data of your own, take images without captions and captions without images as candidates
    that no query asks for, instead of stopping at them; they are counted."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of your own in the data that are not read. Default: none."""
    cache: bool = True
    """Keep the index of large data of your own in the user's cache, and find it there."""
    max_memory_mb: Annotated[float, Interval(gt=0)] = 256.0
    """Working memory of the ranking beyond the embeddings, in 10^6 bytes; changes no score."""

    def _find_conflicts(self) -> Iterator[str]:
        if self.skip_invalid and not (self.check_images or self.captions_only):
            yield (
                "skip_invalid=True needs check_images=True: a broken image would be found while a "
                "model waits for it, too late to leave it out."
            )
        if self.allow_distractors and self.captions_only:
            yield "allow_distractors=True needs images. Leave captions_only=True out."
        if len(set(self.languages)) < len(self.languages):
            yield f"languages has a name twice: {', '.join(self.languages)}. Give each once."
