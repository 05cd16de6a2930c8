"""The whole forward pass: two towers, a text adapter, two projections, one temperature.

Travels to the Hub beside the weights. Shapes: B pictures or texts, L tokens, D width of a tower,
P `projection_dim`. Vectors are float32 whatever the dtype of the weights.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from .batching_llm2clip import plan_token_batches
from .configuration_llm2clip import LLM2CLIPConfig
from .loading_llm2clip import build_tower, refuse_unaccounted_keys
from .packing_llm2clip import (
    can_pack,
    hold_passes,
    is_traced,
    keep_freed_memory,
    may_pack,
    plan_packs,
    run_packed,
)
from .pooling_llm2clip import (
    build_pooling_mask,
    build_position_ids,
    check_token_rows,
    mask_unpadded,
    pool_tokens,
)
from .vision_llm2clip import (
    check_pixels,
    choose_interpolation,
    find_width,
    has_class_token,
    pool_pictures,
)

MAX_LOG_SCALE = math.log(100)  # arXiv:2103.00020, section 2.5
CPU_TOKEN_BUDGET = 2048
_CODE_OF_EVERY_FOLDER = {
    "AutoConfig": "configuration_llm2clip.LLM2CLIPConfig",
    "AutoProcessor": "processing_llm2clip.LLM2CLIPProcessor",
}


@dataclass
class LLM2CLIPOutput(ModelOutput):
    """What `forward` returns; a field is None where its input was not given.

    Attributes:
        loss: () float32, with `return_loss=True`.
        logits_per_image: (B pictures, B texts) float32, cosine times the inverse temperature.
        logits_per_text: its transpose.
        text_embeds, image_embeds: (B, P) float32, unit length.
        pooler_output: the only embeds there are, in a call with one kind of input.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    pooler_output: Tensor | None = None


class LogitScale(nn.Module):
    """The learned inverse temperature, kept as its logarithm between 0 and ln 100.

    A module of its own and of shape (1,): FSDP2 refuses parameters without dimensions, and a
    float32 parameter directly on the model would change the dtype that is saved. `half()` and its
    like leave it float32 too: a step of float16 at ln 100 is half a per cent of every logit.
    """

    def __init__(self, initial_value: float) -> None:
        super().__init__()
        self.initial_value = initial_value
        self.log_scale = nn.Parameter(torch.full((1,), initial_value, dtype=torch.float32))

    def forward(self) -> Tensor:
        """Return the inverse temperature, (1,) float32."""
        return self.log_scale.float().clamp(0.0, MAX_LOG_SCALE).exp()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogitScale:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        applied: LogitScale = super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return applied


class AdapterBlock(nn.Module):
    """`x + Linear(GELU(Linear(LayerNorm(x))))` (upstream `eva_clip/model.py`, LinearBlock)."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, D) to (B, D)."""
        return hidden + self.down(F.gelu(self.up(self.norm(hidden))))  # type: ignore[no-any-return]


class TextAdapter(nn.Module):
    """Residual blocks and a final LayerNorm over a caption's vector."""

    def __init__(self, width: int, *, num_layers: int, expansion: int, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        self.blocks = nn.ModuleList(AdapterBlock(width, expansion) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, caption_embeds: Tensor) -> Tensor:
        """Map (B, D) of any float dtype to (B, D) of the weights' dtype."""
        if self.normalize:
            caption_embeds = F.normalize(caption_embeds.float(), dim=-1)
        # The norm is never quantised, so its dtype is the dtype of the computation.
        hidden = caption_embeds.to(self.norm.weight.dtype)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)  # type: ignore[no-any-return]


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
    _keep_in_fp32_modules_strict = ["logit_scale"]  # noqa: RUF012
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

        Raises:
            ValueError: a weight is missing, unexpected or of another shape, or a weight file is
                cut. transformers would only warn, and leave the missing ones random.
        """
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
        """
        towers = {n: m.dtype for n, m in self.named_children() if isinstance(m, PreTrainedModel)}
        if len(set(towers.values())) > 1:
            warnings.warn(
                f"The towers have different dtypes ({towers}), and all will be loaded as "
                f"{self.dtype}: the vectors will differ by rounding. Cast the whole model first.",
                stacklevel=2,
            )
        self.config.auto_map = {**_CODE_OF_EVERY_FOLDER, **self._auto_classes}
        super().save_pretrained(save_directory, **kwargs)

    def post_init(self) -> None:
        """Finish as transformers does, and keep no name of a layer that is not there."""
        super().post_init()  # type: ignore[no-untyped-call]
        self.forget_absent_layers()

    def forget_absent_layers(self) -> None:
        """Name in `_no_split_modules` only what the model has; FSDP refuses any other name.

        Towers inherit from their families the layers of text encoders that are not part of them.
        """
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = set(self._no_split_modules or ()) & present

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
                "class token: its first token is a patch. Use 'pooler' or 'mean'."
            )
        self.visual_projection = nn.Linear(
            find_width(self.vision_model),
            config.projection_dim,
            bias=config.visual_projection_bias,
        )


class _TextHalf(LLM2CLIPPreTrainedModel):
    """Text in, vectors out; shared by the whole model and the text-only one."""

    # Set by a training on a processor, which gains the time of the padding. Otherwise a batch with
    # gradients stays whole, as on other devices.
    packs_in_training = False
    _can_pack: bool | None = None  # found out when it first matters

    def get_caption_embeds(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_length: int | None = None,
    ) -> Tensor:
        """Pool the LLM's last hidden states over each caption; what a caption store holds.

        Args:
            input_ids: (B, L) from the checkpoint's own tokenizer, padded on either side.
            attention_mask: (B, L); needed where there is padding.
            prompt_length: tokens of the tokenized instruction alone, as sentence-transformers
                counts them; the instruction is attended to and not pooled.
        Returns: (B, D) float32, neither projected nor normalised.
        Raises: ValueError when the ids do not carry the checkpoint's prompt, are too long or
            empty.
        """
        config = self.config
        if attention_mask is None:
            pad_token_id = None if is_traced() else self._padding_id
            attention_mask = mask_unpadded(input_ids, pad_token_id=pad_token_id)
        num_unpooled = len(config.prompt_prefix_ids) + self._count_instruction(prompt_length)
        if not is_traced():
            check_token_rows(
                input_ids,
                attention_mask,
                prefix_ids=config.prompt_prefix_ids,
                suffix_ids=config.prompt_suffix_ids,
                max_length=config.max_text_length,
                vocabulary_size=config.text_config.vocab_size,
                num_unpooled=num_unpooled,
            )
        is_plain = is_traced() or (torch.is_grad_enabled() and not self._packs_with_gradients())
        if input_ids.device.type != "cpu" or is_plain:
            return self._pool_batch(input_ids, attention_mask, num_unpooled)
        return self._pool_on_processor(input_ids, attention_mask, num_unpooled)

    def project_caption_embeds(self, caption_embeds: Tensor) -> Tensor:
        """Map stored caption vectors (B, D) to features (B, P) float32, not normalised.

        Raises: ValueError when they are token ids, or of another width than the LLM's.
        """
        _check_width(caption_embeds, self.config.text_width, name="caption_embeds")
        return self.text_projection(self.text_adapter(caption_embeds)).float()  # type: ignore[no-any-return]

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_length: int | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode texts; arguments and errors as `get_caption_embeds`.

        Returns: `pooler_output` (B, P) float32, projected and not normalised. Token states are
            not kept: call `text_model` for them; inside `hold_text_passes` where other threads
            encode, which set the LLM for their passes.
        """
        caption_embeds = self.get_caption_embeds(input_ids, attention_mask, prompt_length)
        return BaseModelOutputWithPooling(pooler_output=self.project_caption_embeds(caption_embeds))

    @property
    def _padding_id(self) -> int | None:
        """The id of padding, unless a prompt has it too."""
        config = self.config
        pad = getattr(config.text_config, "pad_token_id", None)
        return None if pad in (*config.prompt_prefix_ids, *config.prompt_suffix_ids) else pad

    def hold_text_passes(self) -> AbstractContextManager[None]:
        """Let other threads' passes through the LLM wait, while its layers are not as they were."""
        return hold_passes()

    def _count_instruction(self, prompt_length: int | None) -> int:
        """Tokens of the instruction itself, from the length of the enclosed instruction."""
        if not prompt_length:
            return 0
        config = self.config
        enclosing = len(config.prompt_prefix_ids) + len(config.prompt_suffix_ids)
        count = int(prompt_length) - enclosing + bool(config.prompt_suffix_ends_special)
        if count < 0:
            raise ValueError(
                f"prompt_length={prompt_length} is shorter than the checkpoint's own prompt "
                f"({enclosing} tokens): it must be the length of the tokenized instruction, "
                "prefix and suffix included."
            )
        return count

    def _pool_batch(self, input_ids: Tensor, attention_mask: Tensor, num_unpooled: int) -> Tensor:
        position_ids = build_position_ids(attention_mask)
        inputs = {"position_ids": position_ids} if self._takes_position_ids else {}
        with nullcontext() if is_traced() else hold_passes():
            hidden_states = self.text_model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs
            ).last_hidden_state  # (B, L, D)
        mask = build_pooling_mask(attention_mask, num_unpooled=num_unpooled)
        return pool_tokens(
            hidden_states, mask.to(hidden_states.device), pooling=self.config.text_pooling
        )

    def _pool_on_processor(
        self, input_ids: Tensor, attention_mask: Tensor, num_unpooled: int
    ) -> Tensor:
        """Give the processor small pieces without padding, which its caches like best."""
        keep_freed_memory()
        starts = attention_mask.long().argmax(dim=1).tolist()
        lengths = attention_mask.long().sum(dim=1).tolist()
        texts = [
            ids[start : start + length]
            for ids, start, length in zip(input_ids, starts, lengths, strict=True)
        ]
        packs = self._packs(max(lengths), input_ids.device)
        plan = plan_packs if packs else plan_token_batches
        pool = self._pool_pack if packs else self._pool_padded
        pooled = torch.empty(len(texts), self.config.text_width)
        for rows in plan(lengths, token_budget=CPU_TOKEN_BUDGET):
            pooled[rows] = pool([texts[row] for row in rows], num_unpooled).to(pooled.device)
        return pooled

    def _packs_with_gradients(self) -> bool:
        # Recomputing a packed pass in the backward one would find the attention switched back.
        return self.packs_in_training and not any(
            getattr(module, "gradient_checkpointing", False) for module in self.text_model.modules()
        )

    def _packs(self, longest: int, device: torch.device) -> bool:
        window = getattr(self.config.text_config, "sliding_window", None)
        if (window is not None and longest > window) or not may_pack(self.text_model):
            return False
        if self._can_pack is None:
            self._can_pack = can_pack(self.text_model, device)
        return self._can_pack

    def _pool_pack(self, texts: list[Tensor], num_unpooled: int) -> Tensor:
        hidden_states = run_packed(self.text_model, texts)  # (sum of lengths, D)
        of_texts = hidden_states.split([len(text) for text in texts])
        if self.config.text_pooling == "mean":
            return torch.stack([states[num_unpooled:].float().mean(dim=0) for states in of_texts])
        return torch.stack([states[-1] for states in of_texts]).float()

    def _pool_padded(self, texts: list[Tensor], num_unpooled: int) -> Tensor:
        input_ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths = torch.tensor([len(text) for text in texts])
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        return self._pool_batch(input_ids, attention_mask, num_unpooled)

    @property
    def _takes_position_ids(self) -> bool:
        return "position_ids" in inspect.signature(self.text_model.forward).parameters


class _VisionHalf(LLM2CLIPPreTrainedModel):
    """Pictures in, vectors out; shared by the whole model and the picture-only one."""

    def get_vision_embeds(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """Run the vision tower; what a store of picture vectors holds.

        Args:
            pixel_values: (B, 3, H, W) float, or (B, patches, values) for SigLIP2's own layout.
            pixel_attention_mask, spatial_shapes: SigLIP2's, as its image processor returns them.
            interpolate_pos_encoding: allow another picture size than the tower's own. Towers that
                take any size by themselves (DINO, convolutional networks) need it not.
        Returns: (B, D) float32, neither projected nor normalised.
        Raises: ValueError for whole numbers, and for a picture size that the tower has no
            positions for.
        """
        check_pixels(pixel_values)
        extra: dict[str, Any] = {
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            **choose_interpolation(
                self.vision_model, pixel_values, wanted=interpolate_pos_encoding
            ),
        }
        pixel_values = pixel_values.to(self.vision_model.dtype)
        if pixel_values.ndim == 4 and pixel_values.device.type == "cpu":
            # Convolutions on a processor are two to three times faster in this layout.
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        output = self.vision_model(
            pixel_values=pixel_values,
            **{name: value for name, value in extra.items() if value is not None},
        )
        pooled = pool_pictures(output, self.config.vision_pooling, patch_mask=pixel_attention_mask)
        return pooled.flatten(1).float()

    def project_vision_embeds(self, vision_embeds: Tensor) -> Tensor:
        """Map stored picture vectors (B, D) to features (B, P) float32, not normalised."""
        _check_width(vision_embeds, self.visual_projection.in_features, name="vision_embeds")
        return self.visual_projection(vision_embeds.to(self.visual_projection.weight.dtype)).float()  # type: ignore[no-any-return]

    def get_image_features(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> BaseModelOutputWithPooling:
        """Encode pictures; arguments as `get_vision_embeds`.

        Returns: `pooler_output` (B, P) float32, projected and not normalised.
        """
        vision_embeds = self.get_vision_embeds(
            pixel_values, pixel_attention_mask, spatial_shapes, interpolate_pos_encoding
        )
        return BaseModelOutputWithPooling(pooler_output=self.project_vision_embeds(vision_embeds))


class LLM2CLIPModel(_TextHalf, _VisionHalf):
    """CLIP with a language model as its text encoder (arXiv:2411.04997).

    Args:
        config: the whole configuration.
        vision_model, text_model: towers with trained weights; built from the configuration
            where they are not given. Not a peft-wrapped one: wrap the whole model instead.
    """

    _auto_classes = {  # noqa: RUF012
        "AutoModel": "modeling_llm2clip.LLM2CLIPModel",
        "AutoModelForZeroShotImageClassification": "modeling_llm2clip.LLM2CLIPModel",
        "AutoModelForTextEncoding": "modeling_llm2clip.LLM2CLIPTextModel",
    }

    def __init__(
        self,
        config: LLM2CLIPConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self._add_vision_half(vision_model)
        self._add_text_half(text_model)
        self.logit_scale = LogitScale(config.logit_scale_init_value)  # last: see LogitScale
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        prompt_length: int | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
    ) -> LLM2CLIPOutput:
        """Encode pictures, texts, or both, in any numbers; with both, compare all with all.

        Args: as `get_text_features` and `get_image_features`.
            return_loss: add the symmetric contrastive loss; row i of the pictures belongs to
                row i of the texts. In training mode with gradients this also notes in the config
                that adapter and projections are trained; see `LLM2CLIPConfig`.
            return_dict: False for a tuple of the fields that are not None.
        Raises: ValueError when there is no input, or `return_loss` without equally many
            pictures and texts.
        """
        if return_loss and self.training and torch.is_grad_enabled():
            # A step of training; without a read, so that a compiled graph has no guard on it.
            self.config.text_adapter_trained = self.config.projections_trained = True
        image_embeds = text_embeds = None
        if pixel_values is not None:
            features = self.get_image_features(
                pixel_values, pixel_attention_mask, spatial_shapes, interpolate_pos_encoding
            )
            image_embeds = _normalize(features)
        if input_ids is not None:
            features = self.get_text_features(input_ids, attention_mask, prompt_length)
            text_embeds = _normalize(features)
        output = self.compare(image_embeds, text_embeds, return_loss=bool(return_loss))
        return output if return_dict is not False else output.to_tuple()  # type: ignore[return-value]

    def compare(
        self, image_embeds: Tensor | None, text_embeds: Tensor | None, *, return_loss: bool = False
    ) -> LLM2CLIPOutput:
        """Compare unit-length picture and text vectors, (B, P) each; either may be None."""
        if image_embeds is None and text_embeds is None:
            raise ValueError("Got neither pixel_values nor input_ids; give one of them, or both.")
        if image_embeds is None or text_embeds is None:
            if return_loss:
                raise ValueError("return_loss=True needs pixel_values and input_ids; got only one.")
            only = image_embeds if text_embeds is None else text_embeds
            return LLM2CLIPOutput(
                image_embeds=image_embeds, text_embeds=text_embeds, pooler_output=only
            )
        text_embeds = text_embeds.to(image_embeds.device)
        # An autocast around it would round cosines times a hundred to eight bits.
        with torch.autocast(image_embeds.device.type, enabled=False):
            scaled = self.logit_scale().float().to(image_embeds.device) * image_embeds.float()
            logits = scaled @ text_embeds.float().T
        return LLM2CLIPOutput(
            loss=contrastive_loss(logits) if return_loss else None,
            logits_per_image=logits,
            logits_per_text=logits.T,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
        )


class LLM2CLIPTextModel(_TextHalf):
    """The text half alone; loads from the folder of a whole model without reading its pictures."""

    _auto_classes = {  # noqa: RUF012
        "AutoModel": "modeling_llm2clip.LLM2CLIPTextModel",
        "AutoModelForTextEncoding": "modeling_llm2clip.LLM2CLIPTextModel",
    }
    input_modalities = ["text"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^vision_model\.",
        r"^visual_projection\.",
        r"^logit_scale\.",
    ]

    def __init__(self, config: LLM2CLIPConfig, text_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self._add_text_half(text_model)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_length: int | None = None,
    ) -> LLM2CLIPOutput:
        """Encode texts; see `LLM2CLIPModel.get_text_features`. Returns unit-length embeds."""
        features = self.get_text_features(input_ids, attention_mask, prompt_length)
        text_embeds = _normalize(features)
        return LLM2CLIPOutput(text_embeds=text_embeds, pooler_output=text_embeds)


class LLM2CLIPVisionModel(_VisionHalf):
    """The picture half alone; loads from the folder of a whole model without reading its LLM."""

    _auto_classes = {"AutoModel": "modeling_llm2clip.LLM2CLIPVisionModel"}  # noqa: RUF012
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^text_model\.",
        r"^text_adapter\.",
        r"^text_projection\.",
        r"^logit_scale\.",
    ]

    def __init__(self, config: LLM2CLIPConfig, vision_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self._add_vision_half(vision_model)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> LLM2CLIPOutput:
        """Encode pictures; see `LLM2CLIPModel.get_image_features`. Returns unit-length embeds."""
        features = self.get_image_features(
            pixel_values, pixel_attention_mask, spatial_shapes, interpolate_pos_encoding
        )
        image_embeds = _normalize(features)
        return LLM2CLIPOutput(image_embeds=image_embeds, pooler_output=image_embeds)


def contrastive_loss(logits_per_image: Tensor) -> Tensor:
    """Symmetric cross-entropy over every picture-text pair (arXiv:2103.00020, figure 3).

    Args:
        logits_per_image: (B, B) float32; row i and column i belong together.
    Returns: () float32; ln(B) when no pair stands out.
    Raises: ValueError when pictures and texts are not equally many.
    """
    num_images, num_texts = logits_per_image.shape
    if num_images != num_texts:
        raise ValueError(
            f"The loss pairs picture i with text i, but got {num_images} pictures and "
            f"{num_texts} texts. Give equally many, or leave return_loss out."
        )
    labels = torch.arange(num_images, device=logits_per_image.device)
    per_image = F.cross_entropy(logits_per_image, labels)
    return (per_image + F.cross_entropy(logits_per_image.T, labels)) / 2


def set_attention_direction(text_model: PreTrainedModel, *, bidirectional: bool) -> None:
    """Make every token of an LLM see every other one, or only those before it.

    The configuration alone leaves families causal that drop attention arguments on the way; the
    modules alone leave eager attention and padded batches causal. So both are set.
    """
    text_model.config.is_causal = not bidirectional
    for module in text_model.modules():
        if hasattr(module, "is_causal"):
            setattr(module, "is_causal", not bidirectional)  # noqa: B010 (mypy: not a Tensor)


def _normalize(features: BaseModelOutputWithPooling) -> Tensor:
    assert features.pooler_output is not None
    return F.normalize(features.pooler_output, dim=-1)


def _check_width(embeds: Tensor, width: int, *, name: str) -> None:
    if embeds.ndim != 2 or embeds.shape[1] != width or not embeds.is_floating_point():
        raise ValueError(
            f"{name} must be floating point of shape (B, {width}); got {embeds.dtype} "
            f"{tuple(embeds.shape)}. Token ids go into get_text_features, pictures into "
            "get_image_features; vectors of another tower do not fit this checkpoint."
        )
