"""What an image processor does to an image, in the same words for every kind of model."""

from __future__ import annotations

from typing import Any

from PIL.Image import Resampling

# transformers' families name the same things differently; what is absent is told as null.
_PATCH_SETTINGS = ("patch_size", "max_num_patches")
# How `encoder.load_rgb` opens an image, for every kind of model. The plain `convert("RGB")` of the
# papers' code turns nothing, and drops the transparency.
OPENING = {"orientation": "EXIF applied", "transparency": "on white"}


def describe_image_processor(image_processor: Any) -> dict[str, Any]:
    """Say how a transformers image processor makes pixel values.

    Returns: what `OPENING` says, `processor`, `resize`, `crop`, `interpolation`, `mean`, `std`,
        `scale` and, where the number of patches is fixed instead of the size, `patch_size` and
        `max_num_patches`.
    """
    settings: dict[str, Any] = image_processor.to_dict()
    resample = settings.get("resample")
    normalizes = settings.get("do_normalize", True)
    described = {
        **OPENING,
        "processor": type(image_processor).__name__,
        "resize": settings.get("size") if settings.get("do_resize", True) else None,
        "crop": settings.get("crop_size") if settings.get("do_center_crop") else None,
        "interpolation": None if resample is None else Resampling(int(resample)).name.lower(),
        "mean": _round(settings.get("image_mean")) if normalizes else None,
        "std": _round(settings.get("image_std")) if normalizes else None,
        "scale": settings.get("rescale_factor") if settings.get("do_rescale", True) else None,
    }
    return described | {name: settings[name] for name in _PATCH_SETTINGS if name in settings}


def _round(values: Any) -> list[float] | None:
    return None if values is None else [round(float(value), 8) for value in values]
