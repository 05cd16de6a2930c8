"""What a checkpoint's weights do not say, stated for each official kind; imports nothing costly."""

from __future__ import annotations

from dataclasses import dataclass

# Mean and standard deviation by which pixels are normalized: those of the official factory, which
# gives every tower OpenAI's, and those that SigLIP's own weights were trained with.
PREPROCESSINGS = {
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
ACTIVATIONS = ("quick_gelu", "gelu", "silu")
LAYOUTS = ("hub_clip", "openai", "eva02", "siglip2")
COMPONENTS = ("full", "vision", "text")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SourceFormat:
    """Everything that changes a number and stands in no key of the checkpoint.

    Attributes:
        layout: how the weights are named, one of `LAYOUTS`; the file's keys must agree.
        prompt, prefix, suffix: as in `BuildArguments`; official models: `"llama-3"`.
        max_text_length: most tokens of a text, prompt included.
        text_pooling: over caption and end-of-turn token: `"mean"`, or the `"last_token"`.
        normalize_text_before_adapter: unit length before the adapter.
        activation: of the vision tower's inner layers, one of `ACTIVATIONS`.
        preprocessing: a name of `PREPROCESSINGS`; it must be chosen where it is None.
        head_width: width of one attention head of the vision tower.
        rope_reference_size: side, in patches, that EVA02's rotary positions are scaled to.
    """

    layout: str
    prompt: str | None = "llama-3"
    prefix: str | None = None
    suffix: str | None = None
    max_text_length: int = 512
    text_pooling: str = "mean"
    normalize_text_before_adapter: bool = True
    activation: str = "quick_gelu"
    preprocessing: str | None = "openai"
    head_width: int = 64
    rope_reference_size: int = 16

    def __post_init__(self) -> None:
        known = {
            "layout": LAYOUTS,
            "activation": ACTIVATIONS,
            "preprocessing": (*PREPROCESSINGS, None),
            "text_pooling": ("mean", "last_token"),
        }
        errors = [
            f"{name}={getattr(self, name)!r} must be one of {allowed}"
            for name, allowed in known.items()
            if getattr(self, name) not in allowed
        ]
        least = ("max_text_length", "head_width", "rope_reference_size")
        errors += [f"{name} must be at least 1" for name in least if getattr(self, name) < 1]
        if errors:
            raise ValueError("Recipe: " + "; ".join(errors))


# Named after the vision tower. The text side is that of the official code: prompt, mean over
# caption and end-of-turn token, 512 tokens. EVA02's activation is the gate of its SwiGLU.
SOURCE_FORMATS = {
    "openai-hub": SourceFormat("hub_clip"),
    "openai": SourceFormat("openai"),
    "eva02": SourceFormat("eva02", activation="silu"),
    # The official factory normalized with OpenAI's numbers, the tower's own are 0.5: the
    # checkpoint does not say which it was trained with, so neither is a default.
    "siglip2": SourceFormat(
        "siglip2",
        normalize_text_before_adapter=False,
        activation="gelu",
        preprocessing=None,
        head_width=72,
    ),
}


@dataclass(frozen=True)
class OutputArguments:
    """What is written, and how.

    Attributes:
        components: `"full"`, or one half: `"vision"` without the LLM's weights, `"text"` without
            the vision tower's.
        dtype: of all weights but the temperature, which is float32.
        shard_size_mb: most megabytes of one weight file; twice as much memory is taken by it.
        base_models: Hub ids of the vision tower and of the LLM, for the card; None for the names
            of the sources.
        name: what the card calls the model; None for the folder's last name.
        requires_license: refuse, before anything is opened, what could not be published.
    """

    components: str = "full"
    dtype: str = "float32"
    shard_size_mb: int = 1000
    base_models: tuple[str, str] | None = None
    name: str | None = None
    requires_license: bool = False

    def __post_init__(self) -> None:
        errors = [
            f"{name}={getattr(self, name)!r} must be one of {allowed}"
            for name, allowed in (("components", COMPONENTS), ("dtype", DTYPES))
            if getattr(self, name) not in allowed
        ]
        if self.shard_size_mb < 1:
            errors.append("shard_size_mb must be at least 1")
        if errors:
            raise ValueError("OutputArguments: " + "; ".join(errors))
