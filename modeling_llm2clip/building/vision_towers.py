"""Loads the vision tower that a new model is built from, and its image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import PILImageResampling

from ..image_cropping_llm2clip import LLM2CLIPImageProcessor
from ..loading_llm2clip import build_tower, load_without_code
from .tower_checks import require_pixels_alone
from .tower_loading import (
    forget_code,
    load_with_account,
    name_without_path,
    naming,
    refuse_unread_weights,
)

# What a model with two towers calls its vision part.
_VISION_PART = {"clip": "vision_config", "siglip": "vision_config", "siglip2": "vision_config"}
_CROP_MODES = ("center", "squash")
_NAMES_SHOWN = 8


def load_vision_tower(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    allow_missing_pooler: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a vision tower and its image processor.

    Args:
        source: Hub id or folder of CLIP, SigLIP, SigLIP2, DINOv2, DINOv3, ViT, or a timm network
            in transformers' wrapper. Of a whole CLIP or SigLIP the vision part is taken.
        dtype: Dtype of the weights.
        revision: Branch, tag or commit of the Hub repository.
        allow_missing_pooler: Accept a tower saved without pooler weights, which stay random,
            because its pooler is not going to be used.

    Returns:
        The tower in evaluation mode, and its image processor.

    Raises:
        ValueError: Weights are missing or not read, or it is not a vision tower.
    """
    with naming(source):
        config = load_without_code(AutoConfig, source, revision=revision)
    part = _VISION_PART.get(config.model_type)
    if part:
        config = getattr(config, part)
    if not takes_images(config):
        raise ValueError(
            f"{source} is a {config.model_type!r}, not a vision tower. Give CLIP, SigLIP, DINOv2, "
            "ViT or a timm network."
        )
    # AutoModel would choose the whole model for a CLIP folder; the tower's class does not.
    tower_class = type(build_tower(config)) if part else AutoModel
    model, info = load_with_account(
        tower_class, source, config=config, dtype=dtype, revision=revision
    )
    missing = sorted(
        k for k in info["missing_keys"] if not (allow_missing_pooler and "pooler" in k)
    )
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights of its vision tower, which would stay random: "
            f"{missing[:_NAMES_SHOWN]}. If only the pooler is missing, choose vision_pooling "
            "'cls', 'mean' or 'patch_mean'."
        )
    require_pixels_alone(model)
    if config.model_type != "timm_wrapper":  # in which a head left out is still a module
        refuse_unread_weights(model, model, info, source)
    name_without_path(model, source)
    forget_code(model.config)
    return model.eval(), load_image_processor(source, model.config, revision=revision)


def load_image_processor(
    source: str | Path, config: PreTrainedConfig, *, revision: str | None = None
) -> Any:
    """Load the tower's own image processor; timm's settings become an ordinary one.

    So size, mean and std are plain numbers in the model folder.

    Args:
        source: Hub id or folder of the tower.
        config: Configuration of the tower.
        revision: Branch, tag or commit of the Hub repository.

    Raises:
        ValueError: timm's settings have no equivalent.
    """
    if config.model_type != "timm_wrapper":
        return forget_code(load_without_code(AutoImageProcessor, source, revision=revision))
    return image_processor_from_timm(config.pretrained_cfg)


def image_processor_from_timm(pretrained_cfg: dict[str, Any]) -> CLIPImageProcessor:
    """Build what timm's `create_transform` does for evaluation, with its numbers written out.

    Both crop modes enlarge by the crop ratio, rounded down, then crop the center: `center` keeps
    the shape of the image, `squash` resizes both sides to that length.

    Args:
        pretrained_cfg: timm's input size, mean, std, crop ratio, crop mode and interpolation.

    Raises:
        ValueError: No image processor of transformers follows these settings.
    """
    _, height, width = pretrained_cfg["input_size"]
    crop_mode = str(pretrained_cfg.get("crop_mode") or "center")
    interpolation = str(pretrained_cfg.get("interpolation") or "bicubic").upper()
    ratio = float(pretrained_cfg.get("crop_pct") or 1.0)
    errors = []
    if crop_mode not in _CROP_MODES:
        errors.append(f"crop_mode={crop_mode!r} must be one of {_CROP_MODES}")
    if crop_mode == "center" and height != width:
        errors.append(f"crop_mode='center' needs a square input, not {height} × {width}")
    if interpolation not in PILImageResampling.__members__:
        names = [name.lower() for name in PILImageResampling.__members__]
        errors.append(f"interpolation={interpolation.lower()!r} must be one of {names}")
    if errors:
        raise ValueError(
            f"No image processor of transformers prepares images as this timm network needs them: "
            f"{'; '.join(errors)}. Take another network of timm."
        )
    resized = {"height": int(height / ratio), "width": int(width / ratio)}
    crops = crop_mode == "center" or ratio != 1.0
    image_processor_class = LLM2CLIPImageProcessor if crops else CLIPImageProcessor
    return image_processor_class(
        size={"shortest_edge": resized["height"]} if crop_mode == "center" else resized,
        do_center_crop=crops,
        crop_size={"height": height, "width": width},
        resample=getattr(PILImageResampling, interpolation),
        image_mean=list(pretrained_cfg["mean"]),
        image_std=list(pretrained_cfg["std"]),
        do_convert_rgb=True,
    )


def takes_images(config: PreTrainedConfig) -> bool:
    """Return whether a configuration is a vision tower's.

    Args:
        config: Configuration of a tower.
    """
    fields = ("image_size", "num_channels", "patch_size", "architecture")
    return config.model_type == "timm_wrapper" or any(hasattr(config, field) for field in fields)
