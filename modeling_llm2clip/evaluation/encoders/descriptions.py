"""How models read texts and images, in the same words for every model type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL.Image import Resampling

# transformers' families name the same things differently; null is what a model does not do.
_PATCH_FIELDS = ("patch_size", "max_num_patches")
# How `encoder.load_rgb` opens an image, for every model type. The plain `convert("RGB")` of the
# papers' code ignores the orientation and drops the transparency.
OPENING = {"orientation": "EXIF applied", "transparency": "on white"}
ACTIVATIONS = ("gelu", "quick_gelu")
OF_ITS_TOWER = "of its tower"
_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj")
_SAME_BUT_FOR_CASE = ["A Red Cat on Two Mats", "a red cat on two mats"]


def describe_image_processor(image_processor: Any) -> dict[str, Any]:
    """Describe how a transformers image processor makes pixel values.

    Args:
        image_processor: The image processor.

    Returns:
        `OPENING`, `processor`, `resize`, `crop`, `interpolation`, `mean`, `std`, `scale` and, if
        the number of patches is fixed instead of the size, `patch_size` and `max_num_patches`.
    """
    fields: dict[str, Any] = image_processor.to_dict()
    resample = fields.get("resample")
    normalizes = fields.get("do_normalize", True)
    described = {
        **OPENING,
        "processor": type(image_processor).__name__,
        "resize": fields.get("size") if fields.get("do_resize", True) else None,
        "crop": fields.get("crop_size") if fields.get("do_center_crop") else None,
        "interpolation": None if resample is None else Resampling(int(resample)).name.lower(),
        "mean": _round(fields.get("image_mean")) if normalizes else None,
        "std": _round(fields.get("image_std")) if normalizes else None,
        "scale": fields.get("rescale_factor") if fields.get("do_rescale", True) else None,
    }
    return described | {name: fields[name] for name in _PATCH_FIELDS if name in fields}


def _round(values: Any) -> list[float] | None:
    return None if values is None else [round(float(value), 8) for value in values]


def describe_activation(config: Any) -> str:
    """Name the activation that a configuration of transformers states.

    The weights do not show it, and a wrong one lowers the scores.

    Args:
        config: Configuration of a tower, as an object or as its JSON.

    Returns:
        The activation, or `OF_ITS_TOWER` if the configuration states none.
    """
    fields = config if isinstance(config, Mapping) else config.to_dict()
    stated = (fields[name] for name in _ACTIVATION_FIELDS if isinstance(fields.get(name), str))
    return str(next(stated, OF_ITS_TOWER))


def is_uncased(tokenizer: Any) -> bool:
    """Return whether texts that differ only in case have the same tokens, as with CLIP's own.

    Args:
        tokenizer: A tokenizer of transformers.
    """
    mixed, lower = tokenizer(_SAME_BUT_FOR_CASE, verbose=False)["input_ids"]
    return bool(mixed == lower)
