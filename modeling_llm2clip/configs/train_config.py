"""The whole method from one YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from .align_config import AlignConfig
from .build_config import EMBEDDED, OWN_PROMPT, BuildConfig
from .config_fields import Config, Device, Seed
from .data_config import DataConfig
from .encoding_config import ExtractConfig
from .evaluation_config import EvaluationConfig
from .export_config import ExportConfig
from .finetune_config import FinetuneConfig

_WITH_SEED = ("build", "finetune", "align")
_WITH_DEVICE = (*_WITH_SEED, "extract", "export", "evaluate")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig):
    """Options of `train`: build, fine-tune, extract, align, export, check and evaluate.

    `device` and `seed` apply to every stage.
    """

    vision_model: str
    """Vision tower: Hub id or folder; embedded for the package's own."""
    text_model: str
    """Language model: Hub id, folder or .gguf file; embedded for the package's own."""
    data: str
    """Captioned images: folder, *.parquet, *.tar, COCO *.json, or NAME or NAME=FOLDER of a known
    dataset; embedded for the package's own."""
    output: Path
    """Folder for everything that is written."""
    test_size: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """Share of the groups of images that is held out for evaluation; 0 for none."""
    build: BuildConfig = dataclasses.field(default_factory=BuildConfig)
    """Options of the untrained model."""
    finetune: FinetuneConfig | None = dataclasses.field(default_factory=FinetuneConfig)
    """Options of the LLM's fine-tuning; null skips it. An embedder as it is (build.prompt: own) is
    not fine-tuned."""
    inherit: bool = False
    """Let the text side first learn what the vision model's own text encoder, the teacher, gives to
    the captions (ProCLIP, arXiv:2510.18795). Give build.keep_projection, too."""
    extract: ExtractConfig = dataclasses.field(default_factory=ExtractConfig)
    """Options of the extraction."""
    align: AlignConfig = dataclasses.field(default_factory=AlignConfig)
    """Options of the alignment."""
    export: ExportConfig | None = dataclasses.field(default_factory=ExportConfig)
    """Options of the exported model; null to use the aligned model."""
    evaluate: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    """Options of the evaluation."""
    eval_datasets: tuple[str, ...] = ()
    """Datasets to evaluate on in addition to the held-out images, as for `evaluate`. Default:
    none."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks to evaluate. Default: the task of each dataset's type."""
    device: Device = "auto"
    """Device for all stages: auto, cpu, cuda, cuda:N or mps; auto is cuda, else mps, else cpu."""
    seed: Seed = 0
    """Seed of the split and of all stages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.build.prompt == OWN_PROMPT:
            object.__setattr__(self, "finetune", None)
        for name, stage, config in self._list_shared():
            shared = {name: getattr(self, name)}
            object.__setattr__(self, stage, dataclasses.replace(config, **shared))

    def _list_shared(self) -> Iterator[tuple[str, str, Config]]:
        """Yield each option that is given once, with the stages that have it and their options."""
        for name, stages in (("device", _WITH_DEVICE), ("seed", _WITH_SEED)):
            for stage in stages:
                if (config := getattr(self, stage)) is not None:
                    yield name, stage, config

    def _list_conflicts(self) -> dict[str, object]:
        build, export, align = self.build, self.export, self.align
        views = self.extract.sentence_views
        return {
            **super()._list_conflicts(),
            "build.prompt=own keeps the embedder as it is. Leave finetune out.": (
                build.prompt == OWN_PROMPT and self.finetune not in (None, FinetuneConfig())
            ),
            "inherit=True needs images in the space of the vision model's own text encoder. Give "
            "build.keep_projection=True, and leave build.image_size out.": (
                self.inherit and not (build.keep_projection and build.image_size is None)
            ),
            "align.keep_texts needs images in the space of the vision model's own text encoder. "
            "Give build.keep_projection=True, and leave build.image_size out.": (
                align.keep_texts and not (build.keep_projection and build.image_size is None)
            ),
            "inherit=True teaches stored captions: leave align.text_training out.": (
                self.inherit and align.text_training != "stored"
            ),
            "inherit=True extracts captions by a teacher, whose layers are not compiled. Leave "
            "extract.compile out.": self.inherit and self.extract.compile,
            "build.keep_embeddings=True keeps an embedder's own embeddings, and the alignment "
            "would change them. Give align.lock_text=True.": (
                build.keep_embeddings and not align.lock_text
            ),
            "align.lock_text=True keeps the text side, which is built anew. Give "
            "build.prompt=own and build.keep_embeddings=True, or leave it out.": (
                align.lock_text and not build.keep_embeddings
            ),
            "vision_model=embedded has no text encoder: leave build.keep_projection out.": (
                build.keep_projection and self.vision_model == EMBEDDED
            ),
            "finetune.merge=False leaves no model for the next stages. Leave it out.": (
                self.finetune is not None and not self.finetune.merge
            ),
            "export.components: a part cannot be evaluated. Export a part of the finished model "
            "with llm2clip export.": export is not None and export.components != "full",
            "export.onnx=True: export the finished model with llm2clip export --onnx.": (
                export is not None and export.onnx
            ),
            f"extract.sentence_views={views} is for stored captions, and "
            f"align.text_training={align.text_training}. Leave it out.": (
                views and align.text_training != "stored"
            ),
            f"evaluate.output={self.evaluate.output}: results are written under output.": (
                self.evaluate.output != EvaluationConfig().output
            ),
            **{
                f"{stage}.{name}={getattr(config, name)} differs from "
                f"{name}={getattr(self, name)}. Give it once.": (
                    getattr(config, name) != getattr(self, name) and name in config.list_given()
                )
                for name, stage, config in self._list_shared()
            },
        }
