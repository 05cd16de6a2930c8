"""How a model folder is written for others, and what its card states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from .config_fields import Config, DeviceConfig, Matches, ShardSize

License = Annotated[
    str,
    Matches(pattern=r"[a-z0-9][a-z0-9.+-]*", wanted="an identifier of the Hub, like apache-2.0"),
]


@dataclass(frozen=True, kw_only=True)
class CardConfig(Config):
    """What a model card states; what is not given is taken from the source's card."""

    license: License | None = None
    """License of the weights, an identifier of the Hub such as apache-2.0. Default: that of the
    source's card."""
    license_name: str | None = None
    """Name of the license, with `license` other. Default: none."""
    license_link: str | None = None
    """Address of the license, with `license` other. Default: none."""
    vision_license: str | None = None
    """License of the vision tower. Default: that of its card."""
    text_license: str | None = None
    """License of the language model. Default: that of its card."""
    base_models: tuple[str, str] | None = None
    """Hub ids of the vision tower and of the language model. Default: as in their configurations.
    """
    training_data: tuple[str, ...] = ()
    """Names or Hub ids of the training data. Default: those on the source's card."""
    results: tuple[Path, ...] = ()
    """JSON files of `llm2clip evaluate` on these weights. Default: those on the source's card,
    where the weights stay the same."""

    def find_conflicts(self) -> Iterator[str]:
        """Yield a sentence for a license without its name and address."""
        if self.license == "other" and not (self.license_name and self.license_link):
            yield "license=other needs license_name and license_link."


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(CardConfig, DeviceConfig):
    """Which weights are written, and in which dtype."""

    components: Literal["full", "text", "vision"] = "full"
    """The whole model, or the text-only or vision-only model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights. Default: as they are."""
    max_shard_size: ShardSize = "50GB"
    """Maximum size of a weight file."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(WeightsConfig):
    """What `export_model` writes of a model."""

    components: Literal["full", "text", "vision", "vision-tower"] = "full"  # type: ignore[assignment]
    """The whole model; the text-only or vision-only model; or the vision tower as a plain model of
    transformers, for LLaVA and the like."""
    handler: bool = False
    """Also write handler.py and requirements.txt, with which Inference Endpoints serve the folder.
    """
    space: bool = False
    """Also write space/: app.py, requirements.txt and README.md of a Gradio Space."""

    def find_conflicts(self) -> Iterator[str]:
        """Yield a sentence for files of a host that the written folder cannot serve."""
        yield from super().find_conflicts()
        if self.handler and self.components == "vision-tower":
            yield "handler=True serves models of this package, not components=vision-tower."
        if self.space and self.components != "full":
            yield "space=True needs both towers: components=full."


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(WeightsConfig):
    """What `convert_checkpoint` writes of a checkpoint."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of all weights but the temperature, which is float32."""
    max_shard_size: ShardSize = "1GB"
    """Maximum size of a weight file; the conversion takes twice as much memory."""
