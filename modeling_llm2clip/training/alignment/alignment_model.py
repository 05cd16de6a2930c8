"""Define the module to train, without unused towers, and its trained parts and learning rates.

Shapes: B images and captions, D width of the LLM, D' width of the vision tower, P `projection_dim`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ...configs.align_config import AlignConfig
from ...configuration_llm2clip import LLM2CLIPConfig
from ...encoding.layer_compilation import find_layers
from ...encoding.pixel_normalization import PixelNormalization
from ...model_folders.model_loading import PartialModel
from ...modeling_llm2clip import LLM2CLIPVisionModel
from ...processing_llm2clip import LLM2CLIPProcessor
from ...vision_llm2clip import list_towers
from ..losses.loss import Loss, LossInputs
from ..run_folder import list_trained
from ..trainer_mixins import (
    add_lora,
    find_pooler,
    find_without_gradient,
    is_sharded,
    recompute_activations,
    require_gradients,
)

TOWERS = ("text_model", "vision_model")
_ATTENTION_NAMES = {"attention", "attn", "self_attention", "self_attn"}
TEACHER = "teacher_model"
"""Name of the frozen vision tower that runs next to the trained one if there is no image store."""
_VISION_LORA_RANK, _TEXT_LORA_RANK = 32, 16
LOSS = "loss"
"""Name of the loss submodule; checkpoints hold its parameters, but saved models do not."""


class AlignmentModel(PartialModel):
    """Runs both sides and the loss in one forward pass, as distributed training requires.

    Gradients reach a tower if `trains_text` or `trains_vision` is set. If the loss is a module, its
    parameters are also parameters of this model. `teacher_model` is the vision side before
    training; it is set if the loss needs a teacher and there is no image store. `normalization` is
    set if the data has images as uint8 pixels. Towers encode `mini_batch_size` rows at a time, or
    all rows if it is None.
    """

    loss: Loss
    teacher_model: LLM2CLIPVisionModel | None

    packs_in_training = True

    def __init__(
        self, config: LLM2CLIPConfig, with_llm: bool = False, with_vision_tower: bool = True
    ) -> None:
        super().__init__(config, with_llm, with_vision_tower)
        self.trains_text = self.trains_vision = False
        self.teacher_model = None
        self.normalization: PixelNormalization | None = None
        self.mini_batch_size: int | None = None

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor | None, LossInputs]:
        """Encode images and captions, or start from their stored embeddings.

        In training mode, if the batch has group ids, also compute the loss.

        Args:
            batch: For the images, outputs of the processor or `vision_embeds`, (B, D'), optionally
                with `vision_noise`, which is added before the projection but not to the embeddings
                in `LossInputs`. For the captions, outputs of the processor or `caption_embeds`, (B,
                D), with or without `caption_noise`. Also other fields of `LossInputs`, except that
                `kept_embeds` is (K, D), before the projection.
        """
        teacher_embeds = batch.get("teacher_embeds")
        vision_embeds, caption_embeds = batch.get("vision_embeds"), batch.get("caption_embeds")
        if vision_embeds is None:
            images = (
                batch["pixel_values"],
                batch.get("pixel_attention_mask"),
                batch.get("spatial_shapes"),
            )
            with torch.set_grad_enabled(self.trains_vision and torch.is_grad_enabled()):
                vision_embeds = self._encode(self._encode_pixels, *images)
            if self.teacher_model is not None:
                with torch.no_grad():
                    teacher_embeds = self._encode(
                        partial(self._encode_pixels, tower=self.teacher_model), *images
                    )
        if caption_embeds is None:
            with torch.set_grad_enabled(self.trains_text and torch.is_grad_enabled()):
                ids = (batch["input_ids"], batch.get("attention_mask"))
                caption_embeds = self._encode(self.get_caption_embeds, *ids)
        kept_embeds, group_ids = batch.get("kept_embeds"), batch.get("group_ids")
        inputs = LossInputs(
            self.to_image_embeds(_add(vision_embeds, batch.get("vision_noise"))),
            self.to_text_embeds(_add(caption_embeds, batch.get("caption_noise"))),
            self.logit_head.rule(),
            group_ids,  # type: ignore[arg-type]  # None if no loss is computed
            batch.get("text_keys"),
            vision_embeds=vision_embeds.float(),
            caption_embeds=caption_embeds.float(),
            teacher_embeds=teacher_embeds,
            kept_embeds=None if kept_embeds is None else self.to_text_embeds(kept_embeds),
            kept_targets=batch.get("kept_targets"),
        )
        if not self.training or group_ids is None:
            return None, inputs
        # An enclosing autocast would round the matrix products of the loss; evaluation uses no
        # autocast.
        with torch.autocast(inputs.image_embeds.device.type, enabled=False):
            # DDP needs a gradient for every weight, such as the temperature, even if the loss does
            # not use it.
            outputs = (inputs.image_embeds, inputs.text_embeds, *inputs.logits)
            return self.loss(inputs) + 0 * sum(output.sum() for output in outputs), inputs

    def _encode_pixels(
        self,
        pixels: Tensor,
        mask: Tensor | None,
        shapes: Tensor | None,
        tower: LLM2CLIPVisionModel | None = None,
    ) -> Tensor:
        pixels = pixels if self.normalization is None else self.normalization.apply(pixels)
        return (tower or self).get_vision_embeds(pixels, mask, shapes)

    def _encode(self, encode: Callable[..., Tensor], *parts: Tensor | None) -> Tensor:
        """Encode a batch in mini-batches, and have the backward pass run each of them again.

        All embeddings exist before the loss, but activations of only one mini-batch at a time
        (gradient caching). It is a single backward pass, so processes add their gradients once.
        """
        rows = range(0, len(parts[0]), self.mini_batch_size or len(parts[0]))  # type: ignore[arg-type]
        if len(rows) == 1:
            return encode(*parts)
        # Token ids are on the CPU; this makes dropout repeat on the device, too.
        marker = torch.empty(0, device=self.device)
        embeds = [
            checkpoint(
                lambda _, *some: encode(*some),
                marker,
                *(part if part is None else part[row : row + rows.step] for part in parts),
                use_reentrant=False,
            )
            for row in rows
        ]
        return torch.cat(embeds)

    @property
    def head(self) -> dict[str, nn.Parameter]:
        """Parameters of text adapter, projections and temperature, by name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.split(".")[0] not in (*TOWERS, TEACHER, LOSS)
        }

    def train(self, mode: bool = True) -> AlignmentModel:
        """Switch to training mode, except for frozen towers and batch normalization.

        Batch statistics would come from each process's share of the batch, so training on two
        processes would differ from training on one, and an image's embedding would depend on the
        other images. A tower's stored statistics also come from far more images than the tower is
        aligned on.
        """
        super().train(mode)
        for tower, trains in (
            (self.text_model, self.trains_text),
            (self.vision_model, self.trains_vision),
        ):
            tower.train(mode and trains)
        if self.teacher_model is not None:
            self.teacher_model.train(False)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


def _add(embeds: Tensor, noise: Tensor | None) -> Tensor:
    return embeds if noise is None else embeds + noise


@contextmanager
def skip_identity_blocks(model: nn.Module) -> Iterator[None]:
    """Skip the blocks of a text adapter that add nothing, such as the blocks of a new adapter.

    Embeddings stay bit-identical, except that zeros may lose their sign.
    """
    adapter = getattr(model, "text_adapter", None)
    if adapter is None or is_sharded():  # FSDP manages the blocks
        yield
        return
    blocks = adapter.blocks
    adapter.blocks = nn.ModuleList(
        block for block in blocks if block.down.weight.any() or block.down.bias.any()
    )
    try:
        yield
    finally:
        adapter.blocks = blocks


def choose_trained_parts(model: AlignmentModel, config: AlignConfig) -> dict[str, Any]:
    """Freeze and unfreeze the model's parts in place, and add LoRAs to its towers.

    Text adapter, projections and temperature are trained in float32; with `lock_text`, only the
    image projection and the temperature are trained. Return peft's wrapper of each tower that has a
    LoRA, by tower name, for `merge_loras`.
    """
    for name, part in model.named_children():
        if name in (*TOWERS, TEACHER):
            part.requires_grad_(False)
        elif name != LOSS:
            part.float().requires_grad_(True)
    if config.lock_text:
        model.text_adapter.requires_grad_(False)
        model.text_projection.requires_grad_(False)
    adapted: dict[str, Any] = {}
    if config.vision_training == "full":
        model.vision_model.float().requires_grad_(True)
        if config.layer_decay < 1:
            for tower in list_towers(model.vision_model):
                find_layers(tower)  # or raise before training
    elif config.vision_training == "lora":
        adapted["vision_model"] = _add_lora(
            model.vision_model,
            target_modules=find_attention_linears(model.vision_model),
            r=(rank := config.lora_rank or _VISION_LORA_RANK),
            lora_alpha=rank,
        )
    if config.text_training == "lora":
        adapted["text_model"] = _add_lora(
            model.text_model,
            target_modules="all-linear",
            exclude_modules=find_pooler(model.text_model),
            r=(rank := config.lora_rank or _TEXT_LORA_RANK),
            lora_alpha=2 * rank,
        )
    model.trains_vision = config.vision_training != "frozen"
    model.trains_text = config.text_training == "lora"
    if config.gradient_checkpointing:
        for tower, trains in (
            (model.vision_model, model.trains_vision),
            (model.text_model, model.trains_text),
        ):
            if trains:
                recompute_activations(tower)
    return adapted


def freeze_unused(model: AlignmentModel, processor: LLM2CLIPProcessor, config: AlignConfig) -> None:
    """Freeze weights that receive no gradient in a forward and backward pass.

    Pooling may bypass some weights of a tower; these weights then do not count as trained.
    """
    without = [
        name
        for name in find_without_gradient(model, lambda: _sum_outputs(model, processor))
        if not name.startswith(f"{LOSS}.")
    ]
    for tower, training, remedy in (
        ("vision_model", config.vision_training, "vision_training=frozen or vision_training=full"),
        ("text_model", config.text_training, "text_training=stored or text_training=frozen-online"),
    ):
        if training == "lora":
            require_gradients(
                [name for name in without if name.startswith(f"{tower}.")],
                cause=f"{tower.removesuffix('_model')}_training=lora",
                remedy=f"Choose {remedy}.",
            )
    for name in without:
        model.get_parameter(name).requires_grad_(False)


def _sum_outputs(model: AlignmentModel, processor: LLM2CLIPProcessor) -> Tensor:
    """Sum the outputs for two pairs, with random embeddings in place of untrained towers."""
    inputs: dict[str, Any] = {}
    if model.trains_vision:
        colors = [(200, 120, 40), (20, 90, 160)]
        inputs |= processor(images=[Image.new("RGB", (64, 48), color) for color in colors])
    else:
        inputs["vision_embeds"] = torch.rand(2, model.visual_projection.in_features)
    if model.trains_text:
        inputs |= processor(text=["a dog", "two red apples on a wooden table"])
    else:
        inputs["caption_embeds"] = torch.rand(2, model.text_projection.in_features)
    _, outputs = model({name: value.to(model.device) for name, value in inputs.items()})
    summed = (outputs.image_embeds, outputs.text_embeds, *outputs.logits)
    return torch.stack([output.float().sum() for output in summed]).sum()


def merge_loras(model: AlignmentModel, adapted: dict[str, Any]) -> dict[str, Tensor]:
    """Merge the LoRAs in place, and return all weights that training changed."""
    names = {name for name in list_trained(model) if ".lora_" not in name}
    for tower, wrapper in adapted.items():
        layers = [n for n, m in getattr(model, tower).named_modules() if hasattr(m, "base_layer")]
        setattr(model, tower, wrapper.merge_and_unload())
        names |= {f"{tower}.{layer}.weight" for layer in layers}
    return {name: value for name, value in model.state_dict().items() if name in names}


def find_attention_linears(tower: nn.Module) -> list[str]:
    """List the names of the linear layers in a vision transformer's attention, or in several's."""
    if len(towers := list_towers(tower)) > 1:
        return [
            f"towers.{i}.{name}"
            for i, each in enumerate(towers)
            for name in find_attention_linears(each)
        ]
    modules = dict(tower.named_modules())
    # torch's own attention uses its weights directly, so a LoRA layer in it would never run.
    fused = tuple(f"{n}." for n, m in modules.items() if isinstance(m, nn.MultiheadAttention))
    names = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and _ATTENTION_NAMES & set(name.split(".")[:-1])
        and not (fused and name.startswith(fused))
    ]
    if not names:
        raise ValueError(
            f"{type(tower).__name__} has no linear layers in its attention to add a LoRA to. "
            "Choose vision_training=frozen or vision_training=full."
        )
    return names


def scale_by_layer(tower: nn.Module, decay: float) -> dict[str, float]:
    """Compute a learning rate factor for each parameter of a tower.

    Parameters before the layers (patch and position embeddings) learn slowest, and parameters after
    the layers learn at the full rate. Of L layers, layer i (from 0) gets `decay ** (L - i)`.
    """
    if len(towers := list_towers(tower)) > 1:
        joined = enumerate(scale_by_layer(each, decay) for each in towers)
        return {f"towers.{i}.{name}": factor for i, each in joined for name, factor in each.items()}
    names = [name for name, _ in tower.named_parameters()]
    if decay == 1:
        return dict.fromkeys(names, 1.0)
    prefix, layers = find_layers(tower)
    num_layers = sum(1 for _ in layers.children())
    numbers = {name: number for number, (name, _) in enumerate(layers.named_children())}
    depths, depth = {}, 0
    for name in names:
        if name.startswith(f"{prefix}."):
            depth = numbers[name[len(prefix) + 1 :].split(".")[0]] + 1
        elif depth:  # after the layers, because parameters are listed in definition order
            depth = num_layers + 1
        depths[name] = depth
    return {name: decay ** (num_layers + 1 - depth) for name, depth in depths.items()}


def find_learning_rates(
    model: AlignmentModel, config: AlignConfig, *, learning_rate: float
) -> dict[str, float]:
    rates = {name: learning_rate for name, p in model.named_parameters() if p.requires_grad}
    if config.vision_training == "full":
        factors = scale_by_layer(model.vision_model, config.layer_decay)
        rate = config.vision_learning_rate or learning_rate
        rates |= {f"vision_model.{name}": rate * factor for name, factor in factors.items()}
    return rates


def _add_lora(tower: nn.Module, **settings: Any) -> Any:
    from peft import LoraConfig  # only needed for LoRA

    return add_lora(tower, LoraConfig(**settings))
