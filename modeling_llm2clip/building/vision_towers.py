"""Loads the vision tower that a new model is built from, and its image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import PILImageResampling

from .._suggestions import counted, list_first
from ..encoding.dual_encoder import require_dual_encoder
from ..image_cropping_llm2clip import LLM2CLIPImageProcessor
from ..loading_llm2clip import build_tower, load_without_code
from .part_loading import forget_code, forget_origin, load_part, naming
from .tower_checks import require_pixels_alone

_CROP_MODES = ("center", "squash")
# torchvision takes other pixels for the nearest one than Pillow does, and lacks the rest.
_INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")


def load_vision_tower(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    allow_missing_pooler: bool = False,
    keep_projection: bool = False,
) -> tuple[PreTrainedModel, Any, Tensor | None]:
    """Load a vision tower, in evaluation mode, its image processor, and the projection to keep.

    The source is a Hub id or folder of a vision tower of transformers, or of a timm network in its
    wrapper. Of a model that has a `vision_config`, such as CLIP, the vision tower is taken. A tower
    may be saved without pooler weights, which stay random, where its pooler is not going to be
    used. With `keep_projection`, the source is a dual encoder, and the projection, (P, D), that of
    its images into the space of its own texts; what SigLIP's tower pools is in that space already.
    """
    with naming(source):
        config = load_without_code(AutoConfig, source)
    if keep_projection:
        require_dual_encoder(config.model_type, source)
    vision_config: Any = getattr(config, "vision_config", None) or config
    # timm may write it here and above; transformers always builds a network without classes.
    (getattr(vision_config, "model_args", None) or {}).pop("num_classes", None)
    if not takes_images(vision_config):
        raise ValueError(
            f"{source} is a {config.model_type!r}, not a vision tower. Give CLIP, SigLIP, DINOv2, "
            "ViT or a timm network."
        )
    with torch.device("meta"):  # before the weights are read
        require_pixels_alone(build_tower(vision_config))
    beside = ("visual_projection.",) if keep_projection else ()
    model, whole, missing = load_part(
        source, config, vision_config, source, beside=beside, dtype=dtype
    )
    missing = [k for k in missing if not (allow_missing_pooler and "pooler" in k)]
    if missing:
        raise ValueError(
            f"{source} lacks {counted(len(missing), 'weight')} of its vision tower, which would "
            f"stay random: {list_first(missing)}. If only the pooler is missing, choose "
            "vision_pooling 'cls', 'mean' or 'patch_mean'."
        )
    kept = None
    if keep_projection:
        projection: Any = getattr(whole, "visual_projection", None)
        width = vision_config.hidden_size
        kept = torch.eye(width) if projection is None else projection.weight.detach()
    forget_origin(model.config, source)
    if config.model_type == "timm_wrapper":  # which has no image processor of its own
        image_processor: Any = image_processor_from_timm(model.config.pretrained_cfg)
    else:
        image_processor = forget_code(load_without_code(AutoImageProcessor, source))
    return model.eval(), image_processor, kept


def image_processor_from_timm(pretrained_cfg: dict[str, Any]) -> CLIPImageProcessor:
    """Build what timm's `create_transform` does for evaluation, with its numbers written out.

    Both crop modes enlarge by the crop ratio, rounded down, then crop the center: `center` keeps
    the shape of the image, `squash` resizes both sides to that length.
    """
    _, height, width = pretrained_cfg["input_size"]
    crop_mode = str(pretrained_cfg.get("crop_mode") or "center")
    interpolation = str(pretrained_cfg.get("interpolation") or "bicubic")
    ratio = float(pretrained_cfg.get("crop_pct") or 1.0)
    errors = []
    if crop_mode not in _CROP_MODES:
        errors.append(f"crop_mode={crop_mode!r} must be one of {_CROP_MODES}")
    if crop_mode == "center" and height != width:
        errors.append(f"crop_mode='center' needs a square input, not {height} × {width}")
    if interpolation not in _INTERPOLATIONS:
        errors.append(f"interpolation={interpolation!r} must be one of {_INTERPOLATIONS}")
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
        resample=getattr(PILImageResampling, interpolation.upper()),
        image_mean=list(pretrained_cfg["mean"]),
        image_std=list(pretrained_cfg["std"]),
        do_convert_rgb=True,
    )


def takes_images(config: PreTrainedConfig) -> bool:
    """Return whether a configuration is a vision tower's."""
    fields = ("image_size", "num_channels", "patch_size", "architecture")
    return config.model_type == "timm_wrapper" or any(hasattr(config, field) for field in fields)
