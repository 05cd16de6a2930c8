"""The module that is trained: a model without the towers that are not run.

B images and captions, D width of the LLM, D' of the vision tower, P `projection_dim`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...configuration_llm2clip import LLM2CLIPConfig
from ...model_folders.model_loading import PartialModel
from ..losses.loss import Loss, LossInputs

TOWERS = ("text_model", "vision_model")
LOSS = "loss"
"""Name of the loss as a part of the model; its parameters are in checkpoints, and in no folder."""


class AlignmentModel(PartialModel):
    """Both sides and the loss in one forward pass, as distributed training needs it.

    Gradients reach a tower where `trains_text` or `trains_vision` is set. If the loss is a module,
    its parameters are the model's, too.
    """

    loss: Loss

    packs_in_training = True

    def __init__(
        self, config: LLM2CLIPConfig, with_llm: bool = False, with_vision_tower: bool = True
    ) -> None:
        super().__init__(config, with_llm, with_vision_tower)
        self.trains_text = self.trains_vision = False

    def forward(
        self,
        pixel_values: Tensor | None = None,
        vision_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        caption_embeds: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        group_ids: Tensor | None = None,
        text_keys: Tensor | None = None,
    ) -> tuple[Tensor | None, LossInputs]:
        """Encode images and captions, or start from their stored embeddings.

        In training, and where the groups are given, it also computes the loss.
        """
        if vision_embeds is None:
            assert pixel_values is not None
            with torch.set_grad_enabled(self.trains_vision and torch.is_grad_enabled()):
                vision_embeds = self.get_vision_embeds(
                    pixel_values, pixel_attention_mask, spatial_shapes
                )
        if caption_embeds is None:
            assert input_ids is not None
            with torch.set_grad_enabled(self.trains_text and torch.is_grad_enabled()):
                caption_embeds = self.get_caption_embeds(input_ids, attention_mask)
        inputs = LossInputs(
            self.to_image_embeds(vision_embeds),
            self.to_text_embeds(caption_embeds),
            self.logit_head.rule(),
            group_ids,  # type: ignore[arg-type]  # None where nothing is compared
            text_keys,
            vision_embeds=vision_embeds.float(),
            caption_embeds=caption_embeds.float(),
        )
        if not self.training or group_ids is None:
            return None, inputs
        # An enclosing autocast would round the products of a loss; held-out images have none.
        with torch.autocast(inputs.image_embeds.device.type, enabled=False):
            return self.loss(inputs), inputs

    @property
    def head(self) -> dict[str, nn.Parameter]:
        """Parameters of text adapter, projections and temperature, by name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.split(".")[0] not in (*TOWERS, LOSS)
        }

    def train(self, mode: bool = True) -> AlignmentModel:
        """Switch to training; a tower that is not trained stays in evaluation mode.

        So does batch normalization. Statistics of the batch would come from each process's part of
        it, so that two processes would not train as one does, and an image's embedding would depend
        on its neighbors; and a tower's own come from far more images than it is aligned on.
        """
        super().train(mode)
        for tower, trains in (
            (self.text_model, self.trains_text),
            (self.vision_model, self.trains_vision),
        ):
            tower.train(mode and trains)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self
