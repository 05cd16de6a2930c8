"""The whole forward pass: two towers, a text adapter, two projections, one temperature.

Travels to the Hub beside the weights. Shapes: B images or texts, L tokens, D width of a tower,
P `projection_dim`. Embeddings are float32 whatever the dtype of the weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .base_llm2clip import LLM2CLIPPreTrainedModel
from .batching_llm2clip import plan_token_batches
from .configuration_llm2clip import LLM2CLIPConfig
from .heads_llm2clip import LogitScale
from .outputs_llm2clip import LLM2CLIPOutput, find_requested_states, keep_states, name_requests
from .packing_llm2clip import (
    acquire_text_forward_lock,
    can_pack,
    is_traced,
    keep_freed_memory,
    packing_allowed,
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
from .training_modes_llm2clip import settle_frozen
from .vision_llm2clip import (
    check_pixels,
    choose_interpolation,
    pool_vision,
)

CPU_TOKEN_BUDGET = 2048


class _TextMixin(LLM2CLIPPreTrainedModel):
    """Text in, embeddings out; shared by the whole model and the text-only one."""

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
        Returns: (B, D) float32, neither projected nor normalized.
        Raises: ValueError when the ids do not carry the checkpoint's prompt, are too long or
            empty.
        """
        return self._encode_texts(input_ids, attention_mask, prompt_length).pooler_output  # type: ignore[return-value]

    def _encode_texts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_length: int | None,
        *,
        requested: tuple[str, ...] = (),
        keeps_tokens: bool = False,
    ) -> BaseModelOutputWithPooling:
        """Run the LLM and pool it; with `keeps_tokens` return its last hidden states too."""
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
        if input_ids.device.type != "cpu" or requested or not self._splits_batches():
            return self._pool_batch(input_ids, attention_mask, num_unpooled, requested)
        return self._pool_on_processor(
            input_ids, attention_mask, num_unpooled, keeps_tokens=keeps_tokens
        )

    def _splits_batches(self) -> bool:
        """Whether the CPU takes texts in packs or token batches, instead of as one padded batch.

        While the LLM is trained, a pass without gradients takes the same path as one with them:
        gradient caching runs both, and dropout must draw the same masks for both.
        """
        if is_traced():
            return False
        may_learn = torch.is_grad_enabled() or self.text_model.training
        return self._packs_with_gradients() if may_learn else True

    def project_caption_embeds(self, caption_embeds: Tensor) -> Tensor:
        """Map stored caption embeddings (B, D) to features (B, P) float32, not normalized.

        Raises: ValueError when they are token ids, or of another width than the LLM's.
        """
        _check_width(caption_embeds, self.config.text_width, name="caption_embeds")
        return self.text_projection(self.text_adapter(caption_embeds)).float()  # type: ignore[no-any-return]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_length: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode texts; arguments and errors as `get_caption_embeds`.

        Args:
            output_attentions, output_hidden_states: add the LLM's `attentions` and
                `hidden_states`. On a CPU the texts then run as one padded batch.
            return_dict: False for a tuple of the fields that are not None.

        Returns:
            `pooler_output` (B, P) float32, projected and not normalized, and `last_hidden_state`
            (B, L, D) of the LLM. At padding it holds nothing of meaning: zeros where the CPU ran
            the texts without padding.

        Raises:
            ValueError: also for states that the LLM does not return as it was loaded.
        """
        requested = find_requested_states(
            self.config,
            self.text_model,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        output = self._encode_texts(
            input_ids, attention_mask, prompt_length, requested=requested, keeps_tokens=True
        )
        output.pooler_output = self.project_caption_embeds(output.pooler_output)  # type: ignore[arg-type]
        return output

    @property
    def _padding_id(self) -> int | None:
        """The id of padding, unless a prompt has it too."""
        config = self.config
        pad = getattr(config.text_config, "pad_token_id", None)
        return None if pad in (*config.prompt_prefix_ids, *config.prompt_suffix_ids) else pad

    def text_forward_lock(self) -> AbstractContextManager[None]:
        """Let other threads' passes through the LLM wait, while its layers are not as they were."""
        return acquire_text_forward_lock()

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

    def _pool_batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_unpooled: int,
        requested: tuple[str, ...] = (),
    ) -> BaseModelOutputWithPooling:
        position_ids = build_position_ids(attention_mask)
        inputs = {"position_ids": position_ids} if self._takes_position_ids else {}
        with nullcontext() if is_traced() else acquire_text_forward_lock():
            output = self.text_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=False,
                **inputs,
                **name_requests(self.text_model, requested),
            )
        hidden_states = output.last_hidden_state  # (B, L, D)
        mask = build_pooling_mask(attention_mask, num_unpooled=num_unpooled)
        pooled = pool_tokens(
            hidden_states, mask.to(hidden_states.device), pooling=self.config.text_pooling
        )
        return keep_states(output, self.text_model, requested, pooled=pooled)

    def _pool_on_processor(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_unpooled: int,
        *,
        keeps_tokens: bool,
    ) -> BaseModelOutputWithPooling:
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
        width = self.config.text_width
        pooled = torch.empty(len(texts), width)
        tokens = torch.zeros(*input_ids.shape, width, dtype=self.text_model.dtype)
        for rows in plan(lengths, token_budget=CPU_TOKEN_BUDGET):
            embeds, of_texts = pool([texts[row] for row in rows], num_unpooled)
            pooled[rows] = embeds.to(pooled.device)
            if keeps_tokens:
                for row, states in zip(rows, of_texts, strict=True):
                    tokens[row, starts[row] : starts[row] + lengths[row]] = states.to(tokens)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens if keeps_tokens else None, pooler_output=pooled
        )

    def _packs_with_gradients(self) -> bool:
        # Recomputing a packed pass in the backward one would find the attention switched back.
        return self.packs_in_training and not any(
            getattr(module, "gradient_checkpointing", False) for module in self.text_model.modules()
        )

    def _packs(self, longest: int, device: torch.device) -> bool:
        window = getattr(self.config.text_config, "sliding_window", None)
        if (window is not None and longest > window) or not packing_allowed(self.text_model):
            return False
        if self._can_pack is None:
            self._can_pack = can_pack(self.text_model, device)
        return self._can_pack

    def _pool_pack(self, texts: list[Tensor], num_unpooled: int) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the pooled texts, and the hidden states (L_i, D) of each."""
        hidden_states = run_packed(self.text_model, texts)  # (sum of lengths, D)
        of_texts = hidden_states.split([len(text) for text in texts])
        if self.config.text_pooling == "mean":
            pooled = [states[num_unpooled:].float().mean(dim=0) for states in of_texts]
        else:
            pooled = [states[-1].float() for states in of_texts]
        return torch.stack(pooled), of_texts

    def _pool_padded(
        self, texts: list[Tensor], num_unpooled: int
    ) -> tuple[Tensor, Sequence[Tensor]]:
        input_ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths = torch.tensor([len(text) for text in texts])
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        output = self._pool_batch(input_ids, attention_mask, num_unpooled)
        assert output.pooler_output is not None and output.last_hidden_state is not None
        states = zip(output.last_hidden_state, texts, strict=True)
        return output.pooler_output, [of_text[: len(text)] for of_text, text in states]

    @property
    def _takes_position_ids(self) -> bool:
        return "position_ids" in inspect.signature(self.text_model.forward).parameters


class _VisionMixin(LLM2CLIPPreTrainedModel):
    """Images in, embeddings out; shared by the whole model and the image-only one."""

    def get_vision_embeds(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """Run the vision tower; what a store of image embeddings holds.

        Args:
            pixel_values: (B, 3, H, W) float, or (B, patches, values) for SigLIP2's own layout.
            pixel_attention_mask, spatial_shapes: SigLIP2's, as its image processor returns them.
            interpolate_pos_encoding: allow another image size than the tower's own. Towers that
                take any size by themselves (DINO, convolutional networks) need it not.
        Returns: (B, D) float32, neither projected nor normalized.
        Raises: ValueError for whole numbers, and for an image size that the tower has no
            positions for.
        """
        return self._encode_images(  # type: ignore[return-value]
            pixel_values, pixel_attention_mask, spatial_shapes, interpolate_pos_encoding
        ).pooler_output

    def _encode_images(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None,
        spatial_shapes: Tensor | None,
        interpolate_pos_encoding: bool,
        requested: tuple[str, ...] = (),
    ) -> BaseModelOutputWithPooling:
        check_pixels(pixel_values)
        if self.training and not is_traced():
            settle_frozen(self.vision_model)  # it may have been frozen since `train`
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
            **name_requests(self.vision_model, requested),
        )
        pooled = pool_vision(
            output,
            self.config.vision_pooling,
            vision_model=self.vision_model,
            pixel_values=pixel_values,
            patch_mask=pixel_attention_mask,
        )
        return keep_states(output, self.vision_model, requested, pooled=pooled.flatten(1).float())

    def project_vision_embeds(self, vision_embeds: Tensor) -> Tensor:
        """Map stored image embeddings (B, D) to features (B, P) float32, not normalized."""
        _check_width(vision_embeds, self.visual_projection.in_features, name="vision_embeds")
        dtype = self.visual_projection.weight.dtype
        if dtype.is_floating_point:  # a quantized layer casts by itself
            vision_embeds = vision_embeds.to(dtype)
        return self.visual_projection(vision_embeds).float()  # type: ignore[no-any-return]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def get_image_features(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode images; arguments as `get_vision_embeds`.

        Args:
            output_attentions, output_hidden_states: add the vision tower's `attentions` and
                `hidden_states`.
            return_dict: False for a tuple of the fields that are not None.

        Returns:
            `pooler_output` (B, P) float32, projected and not normalized, and the tower's
            `last_hidden_state`: (B, L, D), or (B, D, H, W) of a convolutional network.

        Raises:
            ValueError: also for states that the tower does not return as it was loaded.
        """
        requested = find_requested_states(
            self.config,
            self.vision_model,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        output = self._encode_images(
            pixel_values, pixel_attention_mask, spatial_shapes, interpolate_pos_encoding, requested
        )
        output.pooler_output = self.project_vision_embeds(output.pooler_output)  # type: ignore[arg-type]
        return output


class LLM2CLIPModel(_TextMixin, _VisionMixin):
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
    _keep_in_fp32_modules_strict = ["logit_scale"]  # noqa: RUF012

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

    @can_return_tuple  # type: ignore[untyped-decorator]
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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> LLM2CLIPOutput:
        """Encode images, texts, or both, in any numbers; with both, compare all with all.

        Args: as `get_text_features` and `get_image_features`.
            return_loss: add the symmetric contrastive loss; row i of the images belongs to
                row i of the texts. In training mode with gradients this also notes in the config
                that adapter and projections are trained; see `LLM2CLIPConfig`.
            return_dict: False for a tuple of the fields that are not None.
        Raises: ValueError when there is no input, or `return_loss` without equally many
            images and texts.
        """
        if return_loss and self.training and torch.is_grad_enabled():
            # A step of training; without a read, so that a compiled graph has no guard on it.
            self.config.text_adapter_trained = self.config.projections_trained = True
        states = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": True,
        }
        images = texts = image_embeds = text_embeds = None
        if pixel_values is not None:
            images = self.get_image_features(
                pixel_values,
                pixel_attention_mask,
                spatial_shapes,
                interpolate_pos_encoding,
                **states,
            )
            image_embeds = _normalize(images)
        if input_ids is not None:
            texts = self.get_text_features(input_ids, attention_mask, prompt_length, **states)
            text_embeds = _normalize(texts)
        output = self.compare(image_embeds, text_embeds, return_loss=bool(return_loss))
        output.text_model_output, output.vision_model_output = texts, images
        return output

    def compare(
        self, image_embeds: Tensor | None, text_embeds: Tensor | None, *, return_loss: bool = False
    ) -> LLM2CLIPOutput:
        """Compare unit-length image and text embeddings, (B, P) each; either may be None."""
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


class LLM2CLIPTextModel(_TextMixin):
    """The text half alone; loads from the folder of a whole model without reading its images."""

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

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_length: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> LLM2CLIPOutput:
        """Encode texts; see `LLM2CLIPModel.get_text_features`. Returns unit-length embeds."""
        features = self.get_text_features(
            input_ids,
            attention_mask,
            prompt_length,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        text_embeds = _normalize(features)
        return LLM2CLIPOutput(
            text_embeds=text_embeds, pooler_output=text_embeds, text_model_output=features
        )


class LLM2CLIPVisionModel(_VisionMixin):
    """The image half alone; loads from the folder of a whole model without reading its LLM."""

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

    def get_input_embeddings(self) -> nn.Module:
        """Return the vision tower's embeddings of patches; gradient checkpointing asks for them."""
        return self.vision_model.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the vision tower's embeddings of patches."""
        self.vision_model.set_input_embeddings(value)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> LLM2CLIPOutput:
        """Encode images; see `LLM2CLIPModel.get_image_features`. Returns unit-length embeds."""
        features = self.get_image_features(
            pixel_values,
            pixel_attention_mask,
            spatial_shapes,
            interpolate_pos_encoding,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        image_embeds = _normalize(features)
        return LLM2CLIPOutput(
            image_embeds=image_embeds, pooler_output=image_embeds, vision_model_output=features
        )


def contrastive_loss(logits_per_image: Tensor) -> Tensor:
    """Symmetric cross-entropy over every image-text pair (arXiv:2103.00020, figure 3).

    Args:
        logits_per_image: (B, B) float32; row i and column i belong together.
    Returns: () float32; ln(B) when no pair stands out.
    Raises: ValueError when images and texts are not equally many.
    """
    num_images, num_texts = logits_per_image.shape
    if num_images != num_texts:
        raise ValueError(
            f"The loss pairs image i with text i, but got {num_images} images and "
            f"{num_texts} texts. Give equally many, or leave return_loss out."
        )
    labels = torch.arange(num_images, device=logits_per_image.device)
    per_image = F.cross_entropy(logits_per_image, labels)
    return (per_image + F.cross_entropy(logits_per_image.T, labels)) / 2


def _normalize(features: BaseModelOutputWithPooling) -> Tensor:
    assert features.pooler_output is not None
    return F.normalize(features.pooler_output, dim=-1)


def _check_width(embeds: Tensor, width: int, *, name: str) -> None:
    if embeds.ndim != 2 or embeds.shape[1] != width or not embeds.is_floating_point():
        raise ValueError(
            f"{name} must be floating point of shape (B, {width}); got {embeds.dtype} "
            f"{tuple(embeds.shape)}. Token ids go into get_text_features, images into "
            "get_image_features; embeddings of another tower do not fit this checkpoint."
        )
