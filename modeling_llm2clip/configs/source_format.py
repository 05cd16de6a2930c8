"""Everything that affects an embedding and that the weights of another project do not record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from .build_config import Prompt, TextPooling
from .config_fields import Config


@dataclass(frozen=True, kw_only=True)
class SourceFormat(Config):
    """Everything that affects an embedding and that a checkpoint does not record."""

    layout: str
    """Naming of the weights, one of `modeling_llm2clip/conversion/layouts/`; must match the keys in
    the file. `convert_checkpoint` refuses others, and options of others, before it reads a file."""
    prompt: Prompt | None = "llama-3"
    """Prompt around every caption."""
    prompt_prefix: str | None = None
    """Text before every caption, instead of `prompt`."""
    prompt_suffix: str | None = None
    """Text after every caption, instead of `prompt`."""
    max_text_length: Annotated[int, Interval(ge=1)] = 512
    """Maximum number of tokens of a text, prompt included."""
    text_pooling: TextPooling = "mean"
    """Embedding of a text: the mean of caption and end-of-turn token, or the last token."""
    normalize_text_before_adapter: bool = True
    """Scale the LLM's embeddings to unit length before the text adapter."""
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "quick_gelu"
    """Activation of the vision tower's inner layers; gelu_tanh is for timm's SO400M networks with
    patches of 16."""
    image_size: Annotated[int, Interval(ge=1)] | None = None
    """Side of SigLIP2's images in pixels. Default: the size of its patches together; required for
    27 patches of 14 pixels, because networks for 378 and for 384 pixels have them."""
    preprocessing: Literal["openai", "half"] | None = "openai"
    """Mean and std of the pixels: OpenAI's, or 0.5."""
    head_width: Annotated[int, Interval(ge=1)] = 64
    """Width of one attention head of the vision tower; EVA02's is in its checkpoint."""

    def _list_conflicts(self) -> dict[str, object]:
        return {
            f"prompt={self.prompt} excludes prompt_prefix and prompt_suffix. Give one choice.": (
                self.prompt is not None and (self.prompt_prefix, self.prompt_suffix) != (None, None)
            )
        }
