"""What is evaluated on what: checked when it is made, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .._suggestions import did_you_mean
from .datasets.dataset_registry import find_dataset
from .encoders.auto import KINDS
from .encoders.encoder import EncoderSettings
from .metrics.ranking import DEFAULT_MEMORY_MB
from .tasks.task_registry import find_task


@dataclass(frozen=True)
class EvaluatedModel:
    """One model to evaluate.

    Attributes:
        source: folder, Hub id, or weights file.
        name: in tables and as the folder of its results; default: the last part of the source.
        kind, revision, architecture, activation, head: as `load_encoder` takes them.
        extracted_from: the captioned data that stores were extracted from.
    """

    source: str
    name: str = ""
    kind: str | None = None
    revision: str | None = None
    architecture: str | None = None
    activation: str | None = None
    head: str | None = None
    extracted_from: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", Path(self.source).name)
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(
                f"{self.source!r} gives no name for tables and folders: {self.name!r}. Name it: "
                f"NAME={self.source}."
            )
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(
                f"No kind is called {self.kind!r}; known are {list(KINDS)}."
                f"{did_you_mean(self.kind, KINDS)}"
            )


@dataclass(frozen=True)
class EvaluatedDataset:
    """One set to evaluate on.

    Attributes:
        name: in the registry.
        folder: where its files are; None for an embedded one.
        image_dir: folder of the images where they lie apart.
    """

    name: str
    folder: str | None = None
    image_dir: str | None = None

    def __post_init__(self) -> None:
        find_dataset(self.name)


@dataclass(frozen=True)
class EvaluationArguments:
    """What is evaluated on what.

    Attributes:
        models: at least one, of different names.
        data: at least one set.
        tasks: names; empty for what suits each set.
        output: folder of the results; those of earlier runs are kept.
        languages: of sets in several languages; empty for all, which only `cross-lingual` takes.
        captions_only: read sets without their images, for text encoders alone.
        skip_invalid: leave invalid samples out and report how many, instead of raising.
        check_images: decode every image before a model is loaded.
        class_names, templates, allow_repeated_class_names: of a classification; see `load_dataset`.
        ignore_fields: of one's own data.
        encoder: how models are run.
        max_memory_mb: of the ranks, beyond the embeddings, in 10^6 bytes; moves no score.
    """

    models: tuple[EvaluatedModel, ...]
    data: tuple[EvaluatedDataset, ...]
    tasks: tuple[str, ...] = ()
    output: Path = Path("evaluation")
    languages: tuple[str, ...] = ()
    captions_only: bool = False
    skip_invalid: bool = False
    check_images: bool = True
    class_names: Mapping[str, str] | Sequence[str] | None = None
    templates: tuple[str, ...] | None = None
    allow_repeated_class_names: bool = False
    ignore_fields: tuple[str, ...] = ()
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    max_memory_mb: float = DEFAULT_MEMORY_MB

    def __post_init__(self) -> None:
        if not self.models or not self.data:
            raise ValueError("Evaluation needs at least one model and one set (--data).")
        for what, names in (
            ("models", [model.name for model in self.models]),
            ("sets", [data.name for data in self.data]),
        ):
            if len(set(names)) < len(names):
                raise ValueError(
                    f"Two {what} have one name, and their results would be one: {names}. Name "
                    "models as NAME=SOURCE; evaluate two folders of one set in two runs."
                )
        if not self.max_memory_mb > 0:
            raise ValueError(f"max_memory_mb={self.max_memory_mb:g} must be above 0.")
        for what, chosen in (("tasks", self.tasks), ("languages", self.languages)):
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"{what} has a name twice: {list(chosen)}. Give each once.")
        if self.skip_invalid and not (self.check_images or self.captions_only):
            raise ValueError(
                "skip_invalid (--skip-invalid) needs check_images (no --no-image-check): a "
                "broken image would be found when a model waits for it, too late to leave it out."
            )
        for task in self.tasks:
            find_task(task)
