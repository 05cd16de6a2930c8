"""Weight names of transformers' CLIP, as in the official Hub repositories of the OpenAI towers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...configs.export_config import SourceFormat
from .layout import Drop, Layout, rename

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .layout import Tensors


def _make_vision_config(
    _tensors: Tensors, source_format: SourceFormat, stated: PreTrainedConfig | None
) -> PreTrainedConfig:
    """Return the repository's own configuration; raise if the source format contradicts it."""
    from transformers import CLIPVisionConfig

    vision: PreTrainedConfig | None = getattr(stated, "vision_config", None)
    if vision is None:
        raise ValueError(
            "Weights with transformers' CLIP names need the config.json that came with them. Pass "
            "the folder or Hub id instead of the weight file."
        )
    if vision.hidden_act != source_format.activation:
        raise ValueError(
            f"activation={source_format.activation!r} contradicts the repository's config.json, "
            f"which has hidden_act={vision.hidden_act!r}. Use the activation that the checkpoint "
            "was trained with."
        )
    if not isinstance(vision.image_size, int):
        raise ValueError(
            f"The repository's config.json has image_size={vision.image_size!r}, but official "
            "towers take square images. Set image_size to a single number."
        )
    # transformers' own class, without additions from the repository's code.
    return CLIPVisionConfig.from_dict(vision.to_dict())


LAYOUT = Layout(
    choice="openai-hub",
    source_options={"layout": "hub_clip"},
    marks=("vision_model.embeddings.class_embedding", "visual_projection.weight"),
    adapter_prefix="text_adapter.adaptor.",
    rules=(
        rename(
            r"vision_model\.((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..*)",
            r"vision_model.\1",
        ),
        rename(r"visual_projection\.weight", "visual_projection.weight"),
    ),
    drops=(
        Drop(
            r"vision_model\.embeddings\.position_ids",
            "position numbers 0, 1, 2, …, which the model computes",
        ),
    ),
    make_vision_config=_make_vision_config,
)
