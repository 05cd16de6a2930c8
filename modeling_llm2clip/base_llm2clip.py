"""What all LLM2CLIP classes share: strict loading, saving with code, initialization.

Uploaded with the weights.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_llm2clip import LLM2CLIPConfig
from .heads_llm2clip import LogitScale, TextAdapter
from .loading_llm2clip import build_tower, refuse_unaccounted_keys
from .quantization_llm2clip import quantize_llm_only, require_restorable
from .training_modes_llm2clip import settle_frozen
from .vision_llm2clip import find_width, has_class_token

if TYPE_CHECKING:
    # transformers copies what this file imports, so a folder that a model alone is saved to has
    # the code of the processor that its config names.
    from .processing_llm2clip import LLM2CLIPProcessor  # noqa: F401

_CODE_OF_EVERY_FOLDER = {
    "AutoConfig": "configuration_llm2clip.LLM2CLIPConfig",
    "AutoProcessor": "processing_llm2clip.LLM2CLIPProcessor",
}


class LLM2CLIPPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation that all LLM2CLIP classes share."""

    config: LLM2CLIPConfig
    config_class = LLM2CLIPConfig
    base_model_prefix = "llm2clip"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules: set[str] | list[str] | None = ["AdapterBlock"]  # noqa: RUF012
    _auto_class = "AutoModel"  # makes save_pretrained copy the code
    _auto_classes: dict[str, str] = {}  # noqa: RUF012
    text_model: Any
    vision_model: Any
    text_adapter: Any
    text_projection: Any
    visual_projection: Any

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LogitScale):
            init.constant_(module.log_scale, module.initial_value)
        elif isinstance(module, nn.Linear):
            # Keeps the scale of its input at any width.
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Say no to vLLM, which would run the LLM causally and pool other tokens."""
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but strictly.

        A `quantization_config` of bitsandbytes reaches the LLM alone.

        Raises:
            ValueError: a weight is missing, unexpected or of another shape, or a weight file is
                cut. transformers would only warn, and leave the missing ones random. Or
                quantization is asked for, and the class has no LLM.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = quantize_llm_only(
                kwargs["quantization_config"],
                class_name=cls.__name__,
                has_llm="text" in cls.input_modalities,
            )
        wants_info = kwargs.pop("output_loading_info", False)
        allow_misshapen = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            loaded: Any = super().from_pretrained(
                *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            raise ValueError(
                f"{source}: a weight file is truncated or damaged ({error}). Download or save it "
                "again."
            ) from error
        model, info = loaded
        refuse_unaccounted_keys(cls, info, allow_misshapen=allow_misshapen)
        return (model, info) if wants_info else model

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """Save as transformers does, with code and every Auto class that can load the folder.

        Warns where the towers differ in dtype, because a loaded model has one dtype.

        Raises:
            ValueError: bitsandbytes would not give the same weights back.
        """
        require_restorable(self)
        towers = {n: m.dtype for n, m in self.named_children() if isinstance(m, PreTrainedModel)}
        if len(set(towers.values())) > 1:
            warnings.warn(
                f"The towers have different dtypes ({towers}), and all will be loaded as "
                f"{self.dtype}: the embeddings will differ by rounding. Cast the whole model "
                "first.",
                stacklevel=2,
            )
        self.config.auto_map = {**_CODE_OF_EVERY_FOLDER, **self._auto_classes}
        super().save_pretrained(save_directory, **kwargs)

    def post_init(self) -> None:
        """Finish as transformers does, and keep no name of a layer that is not there."""
        super().post_init()  # type: ignore[no-untyped-call]
        self.prune_no_split_modules()

    def prune_no_split_modules(self) -> None:
        """Name in `_no_split_modules` only what the model has; FSDP refuses any other name.

        Towers inherit from their families the layers of text encoders that are not part of them.
        """
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = set(self._no_split_modules or ()) & present

    def train(self, mode: bool = True) -> LLM2CLIPPreTrainedModel:
        """Switch to training; what is frozen of the towers keeps evaluating."""
        super().train(mode)
        if mode:
            for name in ("text_model", "vision_model"):
                if hasattr(self, name):
                    settle_frozen(getattr(self, name))
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings of the LLM."""
        return self.text_model.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the LLM."""
        self.text_model.set_input_embeddings(value)

    def _add_text_half(self, text_model: PreTrainedModel | None) -> None:
        config = self.config
        width = config.text_width
        self.text_model = text_model or build_tower(config.text_config)
        self.text_model.config = config.text_config  # one object, so that settings reach both
        set_attention_direction(self.text_model, bidirectional=config.bidirectional)
        self.text_adapter = TextAdapter(
            width,
            num_layers=config.text_adapter_layers,
            expansion=config.text_adapter_expansion,
            normalize=config.normalize_text_before_adapter,
        )
        self.text_projection = nn.Linear(width, config.projection_dim)

    def _add_vision_half(self, vision_model: PreTrainedModel | None) -> None:
        config = self.config
        self.vision_model = vision_model or build_tower(config.vision_config)
        self.vision_model.config = config.vision_config
        if config.vision_pooling == "cls" and not has_class_token(self.vision_model):
            raise ValueError(
                f"vision_pooling='cls', but this {config.vision_config.model_type!r} tower has no "
                "class token: its first token is a patch. Use 'pooler', 'mean' or 'patch_mean'."
            )
        self.visual_projection = nn.Linear(
            find_width(self.vision_model),
            config.projection_dim,
            bias=config.visual_projection_bias,
        )


def set_attention_direction(text_model: PreTrainedModel, *, bidirectional: bool) -> None:
    """Make every token of an LLM see every other one, or only those before it.

    The configuration alone leaves families causal that drop attention arguments on the way; the
    modules alone leave eager attention and padded batches causal. So both are set.
    """
    text_model.config.is_causal = not bidirectional
    for module in text_model.modules():
        if hasattr(module, "is_causal"):
            setattr(module, "is_causal", not bidirectional)  # noqa: B010 (mypy: not a Tensor)
