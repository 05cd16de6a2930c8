"""Options of joining two towers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from annotated_types import Interval

from .config_fields import DeviceConfig, Seed, WeightDtype

# Templates of the official text towers (upstream `llm2vec.py`, prepare_for_tokenization). The
# tokenizer's own beginning-of-text token comes in front, where it has one.
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
# The text tower is a released embedder, which is kept as it is.
OWN_PROMPT = "own"
# In the place of a tower or of data: the one that the package brings, which needs no Hub.
EMBEDDED = "embedded"
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
# Options that would change what texts get from it.
_OF_TEXT_SIDE = ("projection_dim", "keep_projection", "text_adapter_layers")


@dataclass(frozen=True, kw_only=True)
class BuildConfig(DeviceConfig):
    """Options of `build_model`, which joins a vision tower and a language model."""

    without_flags = (
        "seed", "text_adapter_layers", "normalize_text_before_adapter", "truncate_dim",
        "visual_projection_bias",
    )  # fmt: skip

    prompt: BuildPrompt | None = None
    """Prompt around every caption. No default: give this, or `prompt_prefix` and
    `prompt_suffix`. `own` keeps a sentence-transformers model as it is."""
    prompt_prefix: str | None = None
    """Text before every caption, instead of `prompt`. Default: none."""
    prompt_suffix: str | None = None
    """Text after every caption, instead of `prompt`. Default: none."""
    prompt_name: str | None = None
    """With prompt=own: name of one of the embedder's prompts, such as query or document. Default:
    `prompt_prefix`, or the one that the embedder uses by itself, mostly none."""
    max_text_length: Annotated[int, Interval(ge=1)] | None = None
    """Maximum number of tokens of a text, prompt included. Default: 512, or an embedder's own."""
    bidirectional: bool | None = None
    """Let every token attend to every other token; False keeps the LLM causal, as a baseline.
    Default: yes, or as an embedder does."""
    text_pooling: TextPooling | None = None
    """Embedding of a text: mean of its tokens, or last token. Default: mean, or an embedder's."""
    dtype: WeightDtype = "float32"
    """Dtype of the weights."""
    truncate_dim: Annotated[int, Interval(ge=1)] | None = None
    """With prompt=own: first dimensions of its embeddings to keep (Matryoshka). Default: the
    embedder's."""
    keep_embeddings: bool = False
    """With prompt=own: give texts the embedder's own embeddings, at unit length, without a text
    adapter, so that an index of them stays valid. Images learn them (align --lock-text)."""
    text_layers: Annotated[int, Interval(ge=1)] | None = None
    """Layers of the language model to keep, from the first. Default: all."""
    projection_dim: Annotated[int, Interval(ge=1)] | None = None
    """Width of the shared embedding space. Default: 512, or that of what is kept."""
    keep_projection: bool = False
    """Keep the image projection of a CLIP or SigLIP, so that images stay in the space that they
    share with its own text encoder, which the text side can inherit (align --inherit-from)."""
    vision_pooling: VisionPooling = "pooler"
    """Embedding of an image: the tower's pooler, its CLS token, the mean of all tokens (CLS and
    registers included), or the mean of the patches."""
    text_adapter_layers: Annotated[int, Interval(ge=0)] | None = None
    """Residual blocks of the text adapter. Default: 4."""
    normalize_text_before_adapter: bool = True
    """Scale the LLM's embeddings to unit length before the text adapter."""
    visual_projection_bias: bool = True
    """Give the image projection a bias, which the closed-form start of align needs. A projection
    that is kept has none."""
    image_size: Annotated[int, Interval(ge=1)] | None = None
    """Side of the images in pixels. Default: the tower's."""
    normalization: Normalization = "own"
    """Mean and std of the pixels: the tower's own, CLIP's (openai), 0.5 (half), or ImageNet's."""
    lora: str | Path | None = None
    """LoRA of a fine-tuned LLM to merge: Hub id or folder. Default: none."""
    seed: Seed = 0
    """Seed of the text adapter and the projections, which are initialized at random."""

    @property
    def has_affixes(self) -> bool:
        return self.prompt_prefix is not None or self.prompt_suffix is not None

    def require_prompt(self) -> None:
        """Raise ValueError where no prompt is chosen."""
        if self.prompt is None and not self.has_affixes:
            raise ValueError(
                f"Choose a prompt, one of {', '.join(PROMPT_NAMES)}, or give prompt_prefix and "
                "prompt_suffix. A prompt is never guessed, because the embeddings depend on it. "
                "prompt=own keeps a sentence-transformers model as it is."
            )

    def _list_conflicts(self) -> dict[str, object]:
        is_own = self.prompt == OWN_PROMPT
        of_llms, of_embedders, of_text_side = (
            ", ".join(name for name in self.list_given() if name in options)
            for options in (_OF_LLMS, _OF_EMBEDDERS, _OF_TEXT_SIDE)
        )
        return {
            **super()._list_conflicts(),
            f"prompt={self.prompt} excludes prompt_prefix and prompt_suffix. Give one choice.": (
                self.prompt is not None and not is_own and self.has_affixes
            ),
            f"prompt=own keeps the embedder as it is. Leave out {of_llms}.": is_own and of_llms,
            f"keep_embeddings leaves nothing to choose of these: {of_text_side}.": (
                is_own and self.keep_embeddings and of_text_side
            ),
            "prompt_name and prompt_prefix are two prompts. Give one.": (
                is_own and None not in (self.prompt_name, self.prompt_prefix)
            ),
            f"Only a sentence-transformers model (prompt=own) takes {of_embedders}.": (
                of_embedders and not is_own
            ),
            "keep_projection keeps what follows the tower's pooler, and "
            f"vision_pooling={self.vision_pooling} takes another embedding. Choose pooler.": (
                self.keep_projection and self.vision_pooling != "pooler"
            ),
            "keep_projection keeps images where the tower's CLIP puts them, and "
            f"normalization={self.normalization} moves them. Choose own.": (
                self.keep_projection and self.normalization != "own"
            ),
            # In float16, weights are not rounded as a teacher's are.
            "keep_projection takes dtype=float32 or bfloat16, not float16.": (
                self.keep_projection and self.dtype == "float16"
            ),
        }
