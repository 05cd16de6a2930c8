"""What the weights of other projects do not say, stated for each official family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Interval

from .build_config import Prompt, TextPooling
from .config_fields import Config

# Mean and standard deviation by which pixels are normalized: those of the official factory, which
# gives every tower OpenAI's, and those that SigLIP's own weights were trained with.
PREPROCESSINGS = {
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True, kw_only=True)
class SourceFormat(Config):
    """Everything that changes a number and is in no key of a checkpoint."""

    layout: Literal["hub_clip", "openai", "eva02", "siglip2"]
    """How the weights are named; the keys of the file must agree."""
    prompt: Prompt | None = "llama-3"
    """Prompt around every caption."""
    prompt_prefix: str | None = None
    """Text in front of every caption, in place of `prompt`."""
    prompt_suffix: str | None = None
    """Text after every caption, in place of `prompt`."""
    max_text_length: Annotated[int, Interval(ge=1)] = 512
    """Maximum number of tokens of a text, prompt included."""
    text_pooling: TextPooling = "mean"
    """What represents a text: the mean of caption and end-of-turn token, or the last token."""
    normalize_text_before_adapter: bool = True
    """Scale the LLM's embeddings to unit length before the text adapter."""
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "quick_gelu"
    """Activation of the vision tower's inner layers; gelu_tanh is that of timm's SO400M networks in
    patches of 16."""
    image_size: Annotated[int, Interval(ge=1)] | None = None
    """Side of SigLIP2's images in pixels. Default: that of its patches together; 27 patches of 14
    pixels need it, because networks for 378 and for 384 pixels have them."""
    preprocessing: Literal["openai", "half"] | None = "openai"
    """Mean and std of the pixels: OpenAI's, or 0.5."""
    head_width: Annotated[int, Interval(ge=1)] = 64
    """Width of one attention head of the vision tower."""
    rope_reference_size: Annotated[int, Interval(ge=1)] = 16
    """Side, in patches, that EVA02's rotary positions are scaled to."""

    def find_conflicts(self) -> Iterator[str]:
        """Yield a sentence where a prompt is chosen twice, or an option is of another layout."""
        if self.prompt is not None and (self.prompt_prefix, self.prompt_suffix) != (None, None):
            yield f"prompt={self.prompt} excludes prompt_prefix and prompt_suffix. Give one choice."
        if self.layout != "siglip2":
            if self.activation == "gelu_tanh":
                yield f"activation=gelu_tanh is of layout siglip2 alone, not of {self.layout}."
            if self.image_size is not None:
                yield f"image_size={self.image_size} is of layout siglip2 alone. Leave it out."


# Named after the vision tower. The text side is that of the official code: prompt, mean over
# caption and end-of-turn token, 512 tokens. EVA02's activation is the gate of its SwiGLU.
_OPTIONS: dict[str, dict[str, Any]] = {
    "openai-hub": {"layout": "hub_clip"},
    "openai": {"layout": "openai"},
    "eva02": {"layout": "eva02", "activation": "silu"},
    # The official factory normalized with OpenAI's numbers, the tower's own are 0.5: the checkpoint
    # does not say which it was trained with, so neither is a default.
    "siglip2": {
        "layout": "siglip2",
        "normalize_text_before_adapter": False,
        "activation": "gelu",
        "preprocessing": None,
        "head_width": 72,
    },
}


def __getattr__(name: str) -> dict[str, SourceFormat]:
    """Make `SOURCE_FORMATS` when it is imported, not for `llm2clip --help`."""
    if name != "SOURCE_FORMATS":
        raise AttributeError(f"{__name__} has no {name}.")
    return {name: SourceFormat(**options) for name, options in _OPTIONS.items()}
