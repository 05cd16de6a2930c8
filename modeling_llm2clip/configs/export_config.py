"""Options for exporting and converting models, their model cards, and source formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from .build_config import Prompt, TextPooling
from .config_fields import Config, DeviceConfig, Matches, ShardSize, WeightDtype
from .encoding_config import TextWeights

License = Annotated[
    str,
    Matches(pattern=r"[a-z0-9][a-z0-9.+-]*", meaning="a Hub license id, like apache-2.0"),
]


@dataclass(frozen=True, kw_only=True)
class CardConfig(Config):
    """Entries of a model card; unset entries are taken from the source model's card."""

    license: License | None = None
    """Hub identifier of the weights' license, such as apache-2.0. Default: for export, the license
    on the source model's card; for convert, none."""
    license_name: str | None = None
    """With `license` other: name of the license. Default: none."""
    license_link: str | None = None
    """With `license` other: URL of the license. Default: none."""
    vision_license: str | None = None
    """License of the vision tower. Default: for export, as on the source model's card; for convert,
    the license on the checkpoint's card."""
    text_license: str | None = None
    """License of the language model. Default: for export, as on the source model's card; for
    convert, the license on the language model's card."""
    base_models: tuple[str, str] | None = None
    """Hub ids of the vision tower and the language model. Default: the ids in their
    configurations."""
    training_data: tuple[str, ...] = ()
    """Names or Hub ids of the training data. Default: for export, as on the source model's card;
    for convert, none."""

    def _list_conflicts(self) -> dict[str, object]:
        is_other = self.license == "other"
        return {
            **super()._list_conflicts(),
            "license=other needs license_name and license_link.": (
                is_other and not (self.license_name and self.license_link)
            ),
            "license_name and license_link need license=other.": (
                not is_other and (self.license_name or self.license_link)
            ),
        }


@dataclass(frozen=True, kw_only=True)
class ExportConfig(CardConfig, DeviceConfig):
    """Options for `export_model`."""

    results: tuple[Path, ...] = ()
    """JSON results of `llm2clip evaluate` for these weights. Default: the results on the source's
    card, if the weights are unchanged."""
    dtype: WeightDtype | None = None
    """Dtype of the weights. Default: unchanged."""
    max_shard_size: ShardSize = "50GB"
    """Maximum size of a weight file."""
    components: Literal["full", "text", "vision", "vision-tower"] = "full"
    """Part to export: the full model, the text-only or vision-only model, or the vision tower as a
    plain transformers model, for LLaVA and similar models."""
    handler: bool = False
    """Also write handler.py and requirements.txt, which Hugging Face's Inference Endpoints need to
    serve the folder."""
    onnx: bool = False
    """Write graphs for ONNX Runtime instead of PyTorch weights."""
    onnx_weights: tuple[TextWeights, ...] = ("float32",)
    """Weight formats of the language model's linear layers: float32, int8, int4. Each format is
    written to its own file."""
    onnx_data: str | None = None
    """Captioned images for checking the graphs. Default: the included emoji and photographs."""
    max_recall_loss: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Maximum drop in text-to-image R@1 with int4 weights, as a fraction: 0.02 is two percentage
    points."""

    def _list_conflicts(self) -> dict[str, object]:
        def name_given(*options: str, others: bool = False) -> str:
            names = [name for name in self.list_given() if (name in options) is not others]
            return ", ".join(f"`{name}`" for name in names)

        is_tower = self.components == "vision-tower"
        of_tower = name_given("components", "license", "device", others=True)
        for_onnx, not_for_onnx = name_given(*_FOR_ONNX), name_given(*_NOT_FOR_ONNX)
        return {
            **super()._list_conflicts(),
            f"{of_tower} cannot be combined with components=vision-tower.": is_tower and of_tower,
            f"{not_for_onnx} cannot be combined with onnx=True.": self.onnx and not_for_onnx,
            f"{for_onnx} cannot be used without onnx=True.": for_onnx and not self.onnx,
            "`onnx_weights` must list at least one weight format, without duplicates.": (
                len(set(self.onnx_weights)) != len(self.onnx_weights) or not self.onnx_weights
            ),
        }


@dataclass(frozen=True, kw_only=True)
class SourceFormat(Config):
    """Everything that affects embeddings but is not stored in an official checkpoint."""

    layout: str
    """Naming scheme of the weights, one of `modeling_llm2clip/conversion/layouts/`; must match the
    keys in the file. `convert_checkpoint` rejects other names, and options of other layouts, before
    reading a file."""
    prompt: Prompt | None = "llama-3"
    """Prompt template for every caption."""
    prompt_prefix: str | None = None
    """Text to put before every caption, instead of using `prompt`."""
    prompt_suffix: str | None = None
    """Text to put after every caption, instead of using `prompt`."""
    max_text_length: Annotated[int, Interval(ge=1)] = 512
    """Maximum number of tokens per text, prompt included."""
    text_pooling: TextPooling = "mean"
    """Pooling of a text's tokens: mean of the caption and the end-of-turn token, or last token."""
    normalize_text_before_adapter: bool = True
    """Scale the LLM's embeddings to unit length before the text adapter."""
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "quick_gelu"
    """Activation in the vision tower's MLPs; timm's SO400M networks with 16-pixel patches use
    gelu_tanh."""
    image_size: Annotated[int, Interval(ge=1)] | None = None
    """Image size of a SigLIP2 model in pixels. Default: number of patches per side times patch
    size. Required for 27 patches of 14 pixels, because both 378- and 384-pixel models have 27."""
    preprocessing: Literal["openai", "half"] | None = "openai"
    """Pixel mean and std: OpenAI's, or 0.5 (half)."""
    head_width: Annotated[int, Interval(ge=1)] = 64
    """Dimension of an attention head in the vision tower, for layouts whose checkpoints do not
    record it."""

    def _list_conflicts(self) -> dict[str, object]:
        return {
            f"prompt={self.prompt} cannot be combined with prompt_prefix or prompt_suffix. "
            "Remove one of them.": (
                self.prompt is not None and (self.prompt_prefix, self.prompt_suffix) != (None, None)
            )
        }


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(CardConfig, DeviceConfig):
    """Options for `convert_checkpoint`."""

    without_flags = ("base_models", "max_shard_size")

    dtype: WeightDtype = "float32"
    """Dtype of the weights; the temperature is always float32."""
    max_shard_size: ShardSize = "1GB"
    """Maximum size of a weight file; the conversion needs twice this much memory."""
    components: Literal["full", "text", "vision"] = "full"
    """Part to write: the full model, or the text-only or vision-only model."""


_FOR_ONNX = ("onnx_weights", "onnx_data", "max_recall_loss")
# Graphs are float32 and exported on the CPU, and their card is short.
_NOT_FOR_ONNX = (
    "handler", "dtype", "max_shard_size", "device", "results", "base_models",
    "vision_license", "text_license", "training_data",
)  # fmt: skip
