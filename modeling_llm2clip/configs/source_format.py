"""Everything that affects an embedding but is not stored in another project's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from .build_config import Prompt, TextPooling
from .config_fields import Config


@dataclass(frozen=True, kw_only=True)
class SourceFormat(Config):
    """Everything that affects an embedding but is not stored in the checkpoint."""

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
    """Image size of a SigLIP2 in pixels. Default: number of patches per side times patch size.
    Required for 27 patches of 14 pixels, because both 378- and 384-pixel networks have them."""
    preprocessing: Literal["openai", "half"] | None = "openai"
    """Pixel mean and std: OpenAI's, or 0.5 (half)."""
    head_width: Annotated[int, Interval(ge=1)] = 64
    """Width of an attention head in the vision tower; EVA02 checkpoints store theirs."""

    def _list_conflicts(self) -> dict[str, object]:
        return {
            f"prompt={self.prompt} cannot be combined with prompt_prefix or prompt_suffix. "
            "Remove one of them.": (
                self.prompt is not None and (self.prompt_prefix, self.prompt_suffix) != (None, None)
            )
        }
