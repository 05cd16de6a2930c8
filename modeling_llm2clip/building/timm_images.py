"""Turns timm's settings of how a network wants its images into an ordinary image processor."""

from __future__ import annotations

import math
from typing import Any

from transformers import CLIPImageProcessor
from transformers.image_utils import PILImageResampling

_CROP_MODES = ("center", "squash")


def image_processor_from_timm(pretrained_cfg: dict[str, Any]) -> CLIPImageProcessor:
    """Build what timm's `create_transform` does for evaluation, with its numbers written out.

    Both crop modes enlarge by the crop share, rounded down, then cut out the middle: `center`
    keeps the shape of the image, `squash` gives both sides that length. Where the rest to cut
    off is odd, transformers may start one pixel before timm.

    Args:
        pretrained_cfg: timm's input size, mean, std, crop share, crop mode and interpolation.
    Raises: ValueError for settings that no image processor of transformers follows.
    """
    _, height, width = pretrained_cfg["input_size"]
    crop_mode = str(pretrained_cfg.get("crop_mode") or "center")
    interpolation = str(pretrained_cfg.get("interpolation") or "bicubic").upper()
    share = float(pretrained_cfg.get("crop_pct") or 1.0)
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
            f"The timm network wants images as no image processor here makes them: "
            f"{'; '.join(errors)}. Take another network of timm."
        )
    resized = {"height": math.floor(height / share), "width": math.floor(width / share)}
    return CLIPImageProcessor(
        size={"shortest_edge": resized["height"]} if crop_mode == "center" else resized,
        do_center_crop=crop_mode == "center" or share != 1.0,
        crop_size={"height": height, "width": width},
        resample=getattr(PILImageResampling, interpolation),
        image_mean=list(pretrained_cfg["mean"]),
        image_std=list(pretrained_cfg["std"]),
        do_convert_rgb=True,
    )
