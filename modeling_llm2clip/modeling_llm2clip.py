"""The models' forward passes: two towers, a text adapter, two projections and a temperature.

Uploaded with the weights. Shapes: B is the number of images or texts, L the number of tokens, D the
width of a tower, P `projection_dim`. Embeddings are float32, whatever the dtype of the weights. As
in transformers, methods that return an output object return a tuple of the object's fields with
`return_dict=False`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import can_return_tuple

from .attention_llm2clip import (
    VarlenKernel,
    check_options,
    copy_details,
    find_varlen_kernel,
    is_exported,
    is_traced,
    order_backends,
    takes_dtype,
)
from .base_llm2clip import LLM2CLIPPreTrainedModel, settle_frozen
from .configuration_llm2clip import LLM2CLIPConfig
from .heads_llm2clip import (
    LogitHead,
    build_pooling_mask,
    build_position_ids,
    check_rotary_positions,
    check_width,
    contrastive_loss,
    count_unpooled,
    mask_checked,
    mask_checked_in_graph,
    pool_tokens,
)
from .packing_llm2clip import (
    copy_to,
    find_first_position,
    pool_on_cpu,
    run_unpadded,
    runs_packs,
    splits_batches,
    text_forward_lock,
)
from .vision_llm2clip import check_pixels, choose_interpolation, pool_inside, pool_vision

if TYPE_CHECKING:
    # Some versions of transformers only copy the files that the loaded file itself imports. That
    # includes the processor: config.json names its code even if no processor is saved.
    from .image_cropping_llm2clip import LLM2CLIPImageProcessor  # noqa: F401
    from .image_loading_llm2clip import load_images  # noqa: F401
    from .loading_llm2clip import build_tower  # noqa: F401
    from .pooling_llm2clip import TEXT_POOLINGS  # noqa: F401
    from .processing_llm2clip import LLM2CLIPProcessor  # noqa: F401


@dataclass
class LLM2CLIPOutput(ModelOutput):
    """Output of `forward`; a field is None if the inputs it depends on were not passed.

    Attributes:
        loss: () float32, with `return_loss=True`.
        logits_per_image: (B images, B texts) float32, cosine times the inverse temperature.
        logits_per_text: (B texts, B images) float32, the transpose of `logits_per_image`.
        text_embeds: (B texts, P) float32, unit length.
        image_embeds: (B images, P) float32, unit length.
        pooler_output: The same tensor as `text_embeds` or `image_embeds`, if only texts or images
            were passed.
        text_model_output: Output of `get_text_features`, with features that are not normalized.
        vision_model_output: Output of `get_image_features`, with features that are not normalized.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    pooler_output: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, with the towers' outputs as tuples, as CLIP does."""
        return tuple(
            value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values()
        )


class _TextMixin(LLM2CLIPPreTrainedModel):
    """Encodes texts; shared by the two-tower and the text-only model."""

    packs_in_training = False  # set when training on a CPU; otherwise batches are not split
    varlen_kernel: VarlenKernel | None = None  # None: the device's kernel, if it has one

    @can_return_tuple  # type: ignore[untyped-decorator]
    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_length: int | Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode texts and project them, without normalizing the result.

        Args:
            input_ids: (B, L) int64 from the model's own tokenizer, padded on either side. If the
                model is on a GPU, the ids may stay on the CPU, which avoids a synchronization.
            attention_mask: (B, L), 1 at real tokens; required if there is padding.
            prompt_length: Number of tokens in the instruction when tokenized by itself, including
                the model's prompt, as sentence-transformers counts them; the same for all texts.
                The instruction is attended to, but not pooled unless the pooling includes the
                prompt.
            **kwargs: Further arguments of the LLM, such as `output_hidden_states`; with any of
                them, texts run padded. `output_attentions` needs `attn_implementation="eager"`.

        Returns:
            `pooler_output` (B, P) float32, projected but not normalized, and the LLM's
            `last_hidden_state` (B, L, D). Hidden states at padding are meaningless; they are zero
            if the texts ran without padding.

        Raises:
            TypeError: The LLM has no argument with this name.
            ValueError: The ids lack the model's prompt, a text is too long or empty, or padding has
                no mask. A compiled model makes the same checks; an exported graph makes none.
        """
        output = self._encode_texts(
            input_ids, attention_mask, prompt_length, keep_tokens=True, **kwargs
        )
        output.pooler_output = self.project_caption_embeds(output.pooler_output)  # type: ignore[arg-type]
        return output

    def get_caption_embeds(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_length: int | Tensor | None = None,
    ) -> Tensor:
        """Pool the LLM's last hidden states over each caption, for an embedding store.

        Args:
            input_ids: As in `get_text_features`.
            attention_mask: As in `get_text_features`.
            prompt_length: As in `get_text_features`.

        Returns:
            (B, D) float32, neither projected nor normalized.

        Raises:
            ValueError: The ids lack the model's prompt, or a text is too long or empty.
        """
        return self._encode_texts(input_ids, attention_mask, prompt_length).pooler_output  # type: ignore[return-value]

    def project_caption_embeds(self, caption_embeds: Tensor) -> Tensor:
        """Apply text adapter and projection to caption embeddings, without normalizing the result.

        Args:
            caption_embeds: (B, D) floating point, from `get_caption_embeds`.

        Returns:
            (B, P) float32, differentiable.

        Raises:
            ValueError: `caption_embeds` are token ids, or their width is not `text_width`.
        """
        check_width(caption_embeds, self.config.text_width, name="caption_embeds")
        adapted = self.text_adapter(caption_embeds).to(self.text_projection.weight.dtype)
        return self.text_projection(adapted).float()  # type: ignore[no-any-return]

    def to_text_embeds(self, caption_embeds: Tensor) -> Tensor:
        """Map caption embeddings into the shared space of texts and images.

        Args:
            caption_embeds: (B, D) floating point, from `get_caption_embeds`.

        Returns:
            (B, P) float32 of unit length, differentiable.

        Raises:
            ValueError: `caption_embeds` are token ids, or their width is not `text_width`.
        """
        return _to_unit_length(self.project_caption_embeds(caption_embeds))

    def text_forward_lock(self) -> AbstractContextManager[Any]:
        """Return a context manager that keeps other threads from running the LLM.

        Hold this lock while replacing layers of the LLM.
        """
        return text_forward_lock

    def _encode_texts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_length: int | Tensor | None,
        *,
        keep_tokens: bool = False,
        **options: Any,
    ) -> BaseModelOutputWithPooling:
        """Run the LLM and pool its output; with `keep_tokens`, keep its last hidden states."""
        config = self.config
        check_options(self.text_model, options)
        check_rotary_positions(config.text_config, max_length=config.max_text_length)
        num_unpooled = count_unpooled(
            prompt_length,
            num_prefix=len(config.prompt_prefix_ids),
            pools_prompt=config.pools_prompt,
            num_suffix=len(config.prompt_suffix_ids),
            suffix_ends_special=config.prompt_suffix_ends_special,
        )
        device = self._find_text_device(input_ids)
        if device.type == "cuda" and not is_traced():  # one synchronization, not one per check
            input_ids = input_ids.cpu()
            attention_mask = None if attention_mask is None else attention_mask.cpu()
        if is_exported():  # a graph for other runtimes has no checks
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        else:
            check = mask_checked_in_graph if is_traced() else mask_checked
            mask = check(
                input_ids,
                attention_mask,
                getattr(config.text_config, "pad_token_id", None),
                config.prompt_prefix_ids,
                config.prompt_suffix_ids,
                config.max_text_length,
                config.text_config.vocab_size,
                num_unpooled,
            )
        output = self._pool_texts(
            input_ids, mask, num_unpooled, device, keep_tokens=keep_tokens, **options
        )
        output.pooler_output = self._apply_dense(output.pooler_output)  # type: ignore[arg-type]
        return output

    def _find_text_device(self, input_ids: Tensor) -> torch.device:
        """Return the device to run the LLM on; `input_ids` may still be on the CPU."""
        is_here = is_traced() or input_ids.device.type != "cpu"
        if is_here or self.text_model.device.type == "meta":  # an offloaded LLM
            return input_ids.device
        return self.text_model.device  # type: ignore[no-any-return]

    def _pool_texts(
        self,
        input_ids: Tensor,
        mask: Tensor,
        num_unpooled: int,
        device: torch.device,
        *,
        keep_tokens: bool,
        **options: Any,
    ) -> BaseModelOutputWithPooling:
        """Run the LLM, packed or padded, whichever is faster on the device; pool its output."""
        kernel = None if is_traced() or options else self._find_kernel(mask, device)
        if kernel is not None:
            states = run_unpadded(self.text_model, input_ids, mask, device, kernel)
            return self._pool_states(states, mask, num_unpooled)
        pool_padded: Any = partial(self._pool_batch, num_unpooled=num_unpooled, **options)
        if (
            device.type == "cpu"
            and not options
            and splits_batches(self.text_model, packs_in_training=self.packs_in_training)
        ):
            config = self.config
            return pool_on_cpu(
                self.text_model,
                input_ids,
                mask,
                num_unpooled=num_unpooled,
                pooling=config.text_pooling,
                width=config.text_dense_width or config.text_width,
                pool_padded=pool_padded,
                keep_tokens=keep_tokens,
            )
        return pool_padded(copy_to(input_ids, device), copy_to(mask, device))  # type: ignore[no-any-return]

    def _find_kernel(self, mask: Tensor, device: torch.device) -> VarlenKernel | None:
        """Return the kernel for packed texts; None if the texts must run padded."""
        kernel = self.varlen_kernel or find_varlen_kernel(device)
        if kernel is None or not takes_dtype(kernel, self.text_model, device):
            return None
        longest = int(mask.sum(dim=1).max())
        return kernel if runs_packs(self.text_model, longest, device, kernel) else None

    def _apply_dense(self, pooled: Tensor) -> Tensor:
        """Apply an embedder's dense layer, if any, to get caption embeddings, (B, D) float32."""
        return (
            pooled if self.config.text_dense_width is None else self.text_model.pooled_dense(pooled)
        )

    def _pool_batch(
        self, input_ids: Tensor, attention_mask: Tensor, *, num_unpooled: int, **options: Any
    ) -> BaseModelOutputWithPooling:
        takes_positions = "position_ids" in inspect.signature(self.text_model.forward).parameters
        first = find_first_position(self.text_model)
        positions = build_position_ids(attention_mask, first=first)
        inputs = {"position_ids": positions} if takes_positions else {}
        with nullcontext() if is_traced() else self._alone(input_ids.device.type):
            output = self.text_model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs,
                **options,
            )  # fmt: skip
        pooled = self._pool_states(output.last_hidden_state, attention_mask, num_unpooled)
        return copy_details(output, pooled)

    @contextmanager
    def _alone(self, device_type: str) -> Iterator[None]:
        """Keep other threads from running an LLM: the backend order is global to the process."""
        with text_forward_lock, order_backends(device_type, self.text_model):
            yield

    def _pool_states(
        self, hidden_states: Tensor, attention_mask: Tensor, num_unpooled: int
    ) -> BaseModelOutputWithPooling:
        mask = build_pooling_mask(attention_mask, num_unpooled=num_unpooled)
        mask = copy_to(mask, hidden_states.device)
        pooled = pool_tokens(hidden_states, mask, pooling=self.config.text_pooling)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class _VisionMixin(LLM2CLIPPreTrainedModel):
    """Encodes images; shared by the two-tower and the vision-only model."""

    @can_return_tuple  # type: ignore[untyped-decorator]
    def get_image_features(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode images and project them, without normalizing the result.

        Args:
            pixel_values: (B, 3, H, W) float, or (B, patches, values) for SigLIP2's own layout.
            pixel_attention_mask: (B, patches), 0 at padding; from SigLIP2's image processor.
            spatial_shapes: (B, 2), height and width in patches; from SigLIP2's image processor.
            interpolate_pos_encoding: Whether to allow image sizes other than the tower's own.
                Towers that take any size (DINO, convolutional networks) do not need this option.
            **kwargs: Further arguments of the vision tower, such as `output_hidden_states`.
                `output_attentions` needs `attn_implementation="eager"`.

        Returns:
            `pooler_output` (B, P) float32, projected but not normalized, and the tower's
            `last_hidden_state`: (B, L, D), (B, D, H, W) for a convolutional network, or None for
            joined towers.

        Raises:
            TypeError: The tower has no argument with this name.
            ValueError: The pixels are integers, or the tower has no positions for the image size.
        """
        output = self._encode_images(
            pixel_values, pixel_attention_mask, spatial_shapes, interpolate_pos_encoding, **kwargs
        )
        output.pooler_output = self.project_vision_embeds(output.pooler_output)  # type: ignore[arg-type]
        return output

    def get_vision_embeds(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """Run the vision tower and pool its output, for an embedding store.

        Args:
            pixel_values: As in `get_image_features`.
            pixel_attention_mask: As in `get_image_features`.
            spatial_shapes: As in `get_image_features`.
            interpolate_pos_encoding: As in `get_image_features`.

        Returns:
            (B, D) float32, neither projected nor normalized.

        Raises:
            ValueError: The pixels are integers, or the tower has no positions for the image size.
        """
        return self._encode_images(  # type: ignore[return-value]
            pixel_values, pixel_attention_mask, spatial_shapes, interpolate_pos_encoding
        ).pooler_output

    def project_vision_embeds(self, vision_embeds: Tensor) -> Tensor:
        """Apply the projection to vision embeddings, without normalizing the result.

        Args:
            vision_embeds: (B, D) floating point, from `get_vision_embeds`.

        Returns:
            (B, P) float32, differentiable.

        Raises:
            ValueError: `vision_embeds` are integers, or their width is not the tower's.
        """
        check_width(vision_embeds, self.visual_projection.in_features, name="vision_embeds")
        dtype = self.visual_projection.weight.dtype
        if dtype.is_floating_point:  # a quantized layer does its own casting
            vision_embeds = vision_embeds.to(dtype)
        return self.visual_projection(vision_embeds).float()  # type: ignore[no-any-return]

    def to_image_embeds(self, vision_embeds: Tensor) -> Tensor:
        """Map vision embeddings into the shared space of texts and images.

        Args:
            vision_embeds: (B, D) floating point, from `get_vision_embeds`.

        Returns:
            (B, P) float32 of unit length, differentiable.

        Raises:
            ValueError: `vision_embeds` are integers, or their width is not the tower's.
        """
        return _to_unit_length(self.project_vision_embeds(vision_embeds))

    def _encode_images(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None,
        spatial_shapes: Tensor | None,
        interpolate_pos_encoding: bool,
        **options: Any,
    ) -> BaseModelOutputWithPooling:
        check_pixels(self.vision_model, pixel_values)
        passed = check_options(self.vision_model, options)
        if self.training and not is_traced():
            settle_frozen(self.vision_model)  # may have been frozen after `train()`
        extra: dict[str, Any] = {
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            **pool_inside(self.vision_model, self.config.vision_pooling),
            **choose_interpolation(
                self.vision_model, pixel_values, interpolate=interpolate_pos_encoding
            ),
        }
        pixel_values = pixel_values.to(self.vision_model.dtype)
        if pixel_values.ndim == 4 and pixel_values.device.type == "cpu":
            # On a CPU, convolutions run two to three times faster in this layout.
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        inputs = {name: value for name, value in extra.items() if value is not None}
        output = self.vision_model(pixel_values=pixel_values, **inputs, **passed)
        pooled = pool_vision(
            output,
            self.config.vision_pooling,
            vision_model=self.vision_model,
            pixel_values=pixel_values,
            patch_mask=pixel_attention_mask,
        )
        return copy_details(
            output, BaseModelOutputWithPooling(output.last_hidden_state, pooled.float())
        )


class LLM2CLIPModel(_TextMixin, _VisionMixin):
    """CLIP with a language model as its text encoder (arXiv:2411.04997).

    Args:
        config: Configuration of the model.
        vision_model: A pretrained vision tower. If omitted, a tower with random weights is built
            from the configuration. The tower must not be wrapped by peft; wrap the LLM2CLIPModel
            instead.
        text_model: A pretrained LLM. The same rules apply.

    Examples:
        >>> model = LLM2CLIPModel.from_pretrained("my-model")
        >>> processor = LLM2CLIPProcessor.from_pretrained("my-model")
        >>> batch = processor(text=["a dog", "two red apples"], images=["dog.png"])
        >>> output = model(**batch)
        >>> output.logits_per_image.shape  # (images, texts)
        torch.Size([1, 2])
        >>> output.text_embeds.shape == (2, model.config.projection_dim)
        True
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
        self._add_vision_tower(vision_model)
        self._add_text_tower(text_model)
        self.logit_scale = LogitHead(config.logit_scale_init_value)  # last: see LogitHead
        self.post_init()

    @property
    def logit_head(self) -> LogitHead:
        """Head that turns embeddings into logits; its saved weights are named `logit_scale`."""
        return self.logit_scale

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        prompt_length: int | Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> LLM2CLIPOutput:
        """Encode images, texts, or both; with both, compare every image with every text.

        Args:
            input_ids: As in `get_text_features`.
            pixel_values: As in `get_image_features`.
            attention_mask: As in `get_text_features`.
            return_loss: Whether to compute the symmetric contrastive loss. Image i must match text
                i.
            prompt_length: As in `get_text_features`.
            pixel_attention_mask: As in `get_image_features`.
            spatial_shapes: As in `get_image_features`.
            interpolate_pos_encoding: As in `get_image_features`.
            **kwargs: Further arguments, which are passed to every tower that runs.

        Returns:
            Embeddings of unit length, `logits_per_image`, and the towers' outputs.

        Raises:
            ValueError: There is no input, or `return_loss` is set but the numbers of images and
                texts differ.
        """
        images = texts = image_embeds = text_embeds = None
        if pixel_values is not None:
            images = self.get_image_features(
                pixel_values,
                pixel_attention_mask,
                spatial_shapes,
                interpolate_pos_encoding,
                return_dict=True,
                **kwargs,
            )
            image_embeds = _to_unit_length(images.pooler_output)
        if input_ids is not None:
            texts = self.get_text_features(
                input_ids, attention_mask, prompt_length, return_dict=True, **kwargs
            )
            text_embeds = _to_unit_length(texts.pooler_output)
        output = self.compare(image_embeds, text_embeds, return_loss=bool(return_loss))
        output.text_model_output, output.vision_model_output = texts, images
        return output

    def compare(
        self, image_embeds: Tensor | None, text_embeds: Tensor | None, *, return_loss: bool = False
    ) -> LLM2CLIPOutput:
        """Compare every image with every text, given their embeddings of unit length.

        Args:
            image_embeds: (B images, P) float32, or None.
            text_embeds: (B texts, P) float32, or None. At least one of the two is required.
            return_loss: Whether to compute the symmetric contrastive loss.

        Returns:
            The embeddings, and `logits_per_image` if neither is None.

        Raises:
            ValueError: Both are None, or `return_loss` is set but the numbers of images and texts
                differ.
        """
        if image_embeds is None and text_embeds is None:
            raise ValueError("Got neither pixel_values nor input_ids. Pass at least one of them.")
        if image_embeds is None or text_embeds is None:
            if return_loss:
                raise ValueError("return_loss=True needs both pixel_values and input_ids.")
            only = image_embeds if text_embeds is None else text_embeds
            return LLM2CLIPOutput(
                image_embeds=image_embeds, text_embeds=text_embeds, pooler_output=only
            )
        text_embeds = text_embeds.to(image_embeds.device)
        logits = self.logit_head.rule().to(image_embeds.device)(image_embeds, text_embeds)
        return LLM2CLIPOutput(
            loss=contrastive_loss(logits) if return_loss else None,
            logits_per_image=logits,
            logits_per_text=logits.T,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
        )


class LLM2CLIPTextModel(_TextMixin):
    """Text-only model: LLM, adapter, projection. Also loads from a two-tower model's folder."""

    _auto_classes = {  # noqa: RUF012
        "AutoModel": "modeling_llm2clip.LLM2CLIPTextModel",
        "AutoModelForTextEncoding": "modeling_llm2clip.LLM2CLIPTextModel",
    }
    input_modalities = ["text"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^(vision_model|visual_projection|logit_scale)\."
    ]

    def __init__(self, config: LLM2CLIPConfig, text_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self._add_text_tower(text_model)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_length: int | Tensor | None = None,
        **kwargs: Any,
    ) -> LLM2CLIPOutput:
        """Encode texts.

        Args:
            input_ids: As in `get_text_features`.
            attention_mask: As in `get_text_features`.
            prompt_length: As in `get_text_features`.
            **kwargs: As in `get_text_features`.

        Returns:
            `text_embeds` (B, P) float32 of unit length; `pooler_output` is the same tensor.
        """
        features = self.get_text_features(
            input_ids, attention_mask, prompt_length, return_dict=True, **kwargs
        )
        text_embeds = _to_unit_length(features.pooler_output)
        return LLM2CLIPOutput(
            text_embeds=text_embeds, pooler_output=text_embeds, text_model_output=features
        )


class LLM2CLIPVisionModel(_VisionMixin):
    """Vision-only model: a tower and its projection. Also loads from a two-tower model's folder."""

    _auto_classes = {"AutoModel": "modeling_llm2clip.LLM2CLIPVisionModel"}  # noqa: RUF012
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^(text_model|text_adapter|text_projection|logit_scale)\."
    ]

    def __init__(self, config: LLM2CLIPConfig, vision_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self._add_vision_tower(vision_model)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> LLM2CLIPOutput:
        """Encode images.

        Args:
            pixel_values: As in `get_image_features`.
            pixel_attention_mask: As in `get_image_features`.
            spatial_shapes: As in `get_image_features`.
            interpolate_pos_encoding: As in `get_image_features`.
            **kwargs: As in `get_image_features`.

        Returns:
            `image_embeds` (B, P) float32 of unit length; `pooler_output` is the same tensor.
        """
        features = self.get_image_features(
            pixel_values,
            pixel_attention_mask,
            spatial_shapes,
            interpolate_pos_encoding,
            return_dict=True,
            **kwargs,
        )
        image_embeds = _to_unit_length(features.pooler_output)
        return LLM2CLIPOutput(
            image_embeds=image_embeds, pooler_output=image_embeds, vision_model_output=features
        )


def _to_unit_length(embeds: Tensor) -> Tensor:
    """Normalize projected embeddings, (B, P); every output of unit length comes from here."""
    return F.normalize(embeds, dim=-1)
