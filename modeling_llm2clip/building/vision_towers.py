"""Loads the vision tower for a new model, and its image processor.

Also sets the image size and the normalization of pixels. The tower's configuration and the image
processor store both settings, so loading the folder needs no options.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
)

from .._suggestions import counted, list_first
from ..configs.build_config import Normalization
from ..configuration_llm2clip import JoinedVisionConfig
from ..encoding.dual_encoder import require_dual_encoder
from ..image_cropping_llm2clip import LLM2CLIPImageProcessor
from ..loading_llm2clip import build_tower, load_without_code
from ..vision_llm2clip import (
    JoinedVisionModel,
    can_interpolate,
    choose_interpolation,
    find_fixed_size,
    find_patch_size,
)
from .part_loading import forget_code, forget_origin, load_part, naming
from .tower_checks import require_pixels_alone

MEAN_AND_STD = {
    "openai": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "half": ([0.5] * 3, [0.5] * 3),
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}
# Field of processors that keep the aspect ratio and limit the number of patches (SigLIP2 NaFlex).
_COUNTS_PATCHES = "max_num_patches"
_CROP_MODES = ("center", "squash")
# Not "nearest", for which torchvision and Pillow choose different pixels; torchvision lacks others.
_INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")
# Sizes and colors of the images that measure normalization.
_PLAIN_IMAGES = (((640, 480), "black"), ((480, 640), "white"), ((640, 480), (220, 30, 60)))


def load_vision_tower(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    allow_missing_pooler: bool = False,
    keep_projection: bool = False,
) -> tuple[PreTrainedModel, Any, Tensor | None]:
    """Load a vision tower, in evaluation mode, its image processor, and the projection to keep.

    The source is a Hub id or folder of a transformers vision tower or of a wrapped timm network.
    From a model with a `vision_config`, such as CLIP, only the vision tower is loaded. With
    `allow_missing_pooler`, pooler weights may be missing and stay random. With `keep_projection`,
    the source must be a dual encoder. The dual encoder's image projection, (P, D), maps into the
    space of its text encoder; SigLIP's pooled output already is in that space.
    """
    with naming(source):
        config = load_without_code(AutoConfig, source)
    if keep_projection:
        require_dual_encoder(config.model_type, source)
    vision_config: Any = getattr(config, "vision_config", None) or config
    # timm may store it here as well; transformers always builds the network without classes.
    (getattr(vision_config, "model_args", None) or {}).pop("num_classes", None)
    if hasattr(vision_config, "towers"):
        raise ValueError(
            f"{source} has several vision towers joined into one, which cannot be loaded from "
            "there. Name the towers that it was built from, joined by +."
        )
    if not takes_images(vision_config):
        raise ValueError(
            f"{source} is a {config.model_type!r}, not a vision tower. Use CLIP, SigLIP, DINOv2, "
            "ViT or a timm network."
        )
    with torch.device("meta"):  # checks before the weights are read
        require_pixels_alone(build_tower(vision_config))
    beside = ("visual_projection.",) if keep_projection else ()
    model, whole, missing = load_part(
        source, config, vision_config, source, beside=beside, dtype=dtype
    )
    if missing := [k for k in missing if not (allow_missing_pooler and "pooler" in k)]:
        raise ValueError(
            f"{source} lacks {counted(len(missing), 'weight')} of its vision tower, which would "
            f"stay random: {list_first(missing)}. If only the pooler is missing, set "
            "vision_pooling to 'cls', 'mean' or 'patch_mean'."
        )
    kept = None
    if keep_projection:
        projection: Any = getattr(whole, "visual_projection", None)
        kept = (
            torch.eye(vision_config.hidden_size)
            if projection is None
            else projection.weight.detach()
        )
    forget_origin(model.config, source)
    image_processor: Any = (
        image_processor_from_timm(model.config.pretrained_cfg)  # timm has no image processors
        if config.model_type == "timm_wrapper"
        else forget_code(load_without_code(AutoImageProcessor, source))
    )
    return model.eval(), image_processor, kept


def join_vision_towers(
    towers: Sequence[tuple[PreTrainedModel, Any]],
) -> tuple[PreTrainedModel, Any]:
    """Join several vision towers and their image processors into one tower and its processor.

    The image processor is that of the largest size, of several the first. The other towers see its
    images, resized. Each processor's normalization is measured on plain images.
    """
    configs = [tower.config for tower, _ in towers]
    names = [config.name_or_path or config.model_type for config in configs]
    if len(dict(towers)) < len(towers) or any(hasattr(c, "towers") for c in configs):
        raise ValueError(
            f"{', '.join(names)} cannot be joined: a loaded tower is listed twice, or is several "
            "towers already joined. List each single tower once."
        )
    if len(dtypes := sorted({str(tower.dtype) for tower, _ in towers})) > 1:
        raise ValueError(
            f"{', '.join(names)} have the dtypes {', '.join(dtypes)}, but joined towers are saved "
            f"in one. Cast them first, for example with tower.to({dtypes[-1]})."
        )
    sizes, colors = [], []
    for name, (tower, image_processor) in zip(names, towers, strict=True):
        images = black, white, _ = [
            image_processor(Image.new("RGB", size, color), return_tensors="pt")["pixel_values"]
            for size, color in _PLAIN_IMAGES
        ]
        if black.ndim != 4 or black.shape[2] != black.shape[3] or black.shape != white.shape:
            raise ValueError(
                f"{name} cannot be joined with other towers: they share square images, but its "
                f"image processor prepares images of {tuple(black.shape)} and "
                f"{tuple(white.shape)}. Use a tower with a fixed image size."
            )
        choose_interpolation(tower, black, interpolate=False)
        sizes.append(side := black.shape[-1])
        # The center, because the processor may have padded the image to a square.
        colors.append([pixels[0, :, side // 2, side // 2].double() for pixels in images])
    largest = sizes.index(max(sizes))
    first, last, middle = colors[largest]
    scales = [(white - black) / (last - first) for black, white, _ in colors]
    shifts = [black - first * scale for (black, *_), scale in zip(colors, scales, strict=True)]
    for name, (*_, plain), scale, shift in zip(names, colors, scales, shifts, strict=True):
        if not torch.allclose(middle * scale + shift, plain, atol=0.02):  # 8-bit rounding
            raise ValueError(
                f"{name} and {names[largest]} cannot be joined: their image processors change "
                "colors differently, for example only one of them to BGR. Use other towers, or "
                "image processors with the same order of channels."
            )
    config = JoinedVisionConfig(
        configs,
        sizes,
        [scale.tolist() for scale in scales],
        [shift.tolist() for shift in shifts],
        architecture="+".join(getattr(c, "architecture", None) or c.model_type for c in configs),
        dtype=towers[0][0].dtype,
    )
    config._name_or_path = "+".join(c._name_or_path for c in configs if c._name_or_path)
    return JoinedVisionModel(config, [t for t, _ in towers]).train(False), towers[largest][1]


def image_processor_from_timm(pretrained_cfg: dict[str, Any]) -> CLIPImageProcessor:
    """Build an image processor equivalent to timm's `create_transform` for evaluation.

    Both crop modes resize to the input size divided by the crop ratio, rounded down, then crop the
    center: `center` keeps the aspect ratio, `squash` resizes both sides to that length.
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
            f"No image processor in transformers can prepare images for this timm network: "
            f"{'; '.join(errors)}. Use another timm network."
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
    """Return whether a configuration belongs to a vision tower."""
    fields = ("image_size", "num_channels", "patch_size", "architecture")
    return config.model_type == "timm_wrapper" or any(hasattr(config, field) for field in fields)


def set_normalization(image_processor: Any, normalization: Normalization) -> Any:
    """Return the image processor with the chosen mean and std; if it has none (TIPSv2), 0 and 1."""
    if normalization == "own" and getattr(image_processor, "do_normalize", True):
        return image_processor
    mean, std = MEAN_AND_STD.get(normalization, ([0.0] * 3, [1.0] * 3))
    return _change(image_processor, image_mean=list(mean), image_std=list(std), do_normalize=True)


@torch.no_grad()
def set_image_size(
    vision_model: PreTrainedModel, image_processor: Any, image_size: int
) -> tuple[PreTrainedModel, Any]:
    """Return the tower and image processor for square images of another size, in pixels.

    Position embeddings for a fixed size are interpolated once, in the same way as in the tower's
    forward pass. A tower that takes any size is left unchanged. Only a timm network is changed in
    place.
    """
    fixed_size = find_fixed_size(vision_model)
    patch = find_patch_size(vision_model)
    # A tower may have been trained with a remainder (SigLIP: 384 pixels in patches of 14).
    if patch and image_size % patch and fixed_size != (image_size, image_size):
        raise ValueError(
            f"image_size={image_size} is not a multiple of the tower's patch size of {patch} "
            "pixels, so the remainder would be cropped. Use "
            f"{max(image_size // patch, 1) * patch}, for example."
        )
    timm_model: Any = getattr(vision_model, "timm_model", None)
    if fixed_size is not None and fixed_size != (image_size, image_size):
        if timm_model is None and can_interpolate(vision_model):
            vision_model = _resize_positions(vision_model, image_size, patch=patch)
        elif hasattr(timm_model, "set_input_size"):
            _resize_network(timm_model, vision_model.config, image_size)
        else:
            _refuse_size(
                vision_model,
                image_size,
                f"it only has positions for {fixed_size[0]} × {fixed_size[1]}",
            )
    if not hasattr(image_processor, _COUNTS_PATCHES):
        image = torch.zeros(1, 3, image_size, image_size, dtype=vision_model.dtype)
        try:
            vision_model(pixel_values=image.to(vision_model.device))
        except (AssertionError, RuntimeError, ValueError, LookupError) as error:
            _refuse_size(
                vision_model, image_size, f"it fails with {type(error).__name__} ({error})"
            )
    return vision_model, _resize_images(image_processor, image_size, patch)


def _refuse_size(vision_model: PreTrainedModel, image_size: int, reason: str) -> NoReturn:
    config: Any = vision_model.config
    name = getattr(config, "architecture", config.model_type)
    raise ValueError(
        f"The tower {name} does not support image_size={image_size}: {reason}. Remove image_size, "
        "or use a tower trained at this size."
    )


def _resize_network(timm_model: Any, config: Any, image_size: int) -> None:
    """Resize a timm network's position embeddings and windows, and store both in its config."""
    resize = timm_model.set_input_size
    changed: dict[str, Any] = {"img_size": image_size}
    if "window_size" in inspect.signature(resize).parameters:
        # Windows grow with the image, but differently in each version of timm, and a network built
        # from its configuration would have the window size of its architecture.
        windows = (m.window_size for m in timm_model.modules() if hasattr(m, "window_size"))
        sides = zip(next(windows), timm_model.patch_embed.img_size, strict=True)
        height, width = (max(1, side * image_size // old_side) for side, old_side in sides)
        changed["window_size"] = height if height == width else (height, width)
    resize(**{**changed, "img_size": (image_size, image_size)})
    config.model_args = {**(config.model_args or {}), **changed}


def _resize_positions(
    vision_model: PreTrainedModel, image_size: int, *, patch: int
) -> PreTrainedModel:
    config = copy.deepcopy(vision_model.config)
    if not isinstance(config.image_size, int):
        _refuse_size(vision_model, image_size, "its configuration has separate height and width")
    config.image_size = image_size
    resized: Any = build_tower(config)
    resized.to(vision_model.dtype)
    weights, shapes = vision_model.state_dict(), resized.state_dict()
    changed = [name for name in weights if weights[name].shape != shapes[name].shape]
    if len(changed) != 1 or ".position_embedding" not in changed[0]:
        raise ValueError(
            f"In this {config.model_type!r} tower, the image size affects weights other than the "
            f"position embeddings: {changed}. Remove image_size, and pass "
            "interpolate_pos_encoding=True."
        )
    num_patches = (vision_model.config.image_size // patch) ** 2
    num_others = weights[changed[0]].shape[-2] - num_patches  # a class token, or none
    positions = _interpolate_positions(vision_model, image_size, patch, num_others)
    weights[changed[0]] = positions.reshape(shapes[changed[0]].shape)
    resized.load_state_dict(weights)
    return resized.train(vision_model.training)  # type: ignore[no-any-return]


@torch.no_grad()
def _interpolate_positions(
    vision_model: nn.Module, image_size: int, patch: int, num_others: int
) -> Tensor:
    """Interpolate positions as the tower itself does; return (1, L, D) float32."""
    original: Any = next(
        module for module in vision_model.modules() if hasattr(module, "interpolate_pos_encoding")
    )
    embeddings = copy.deepcopy(original).float()  # half precision would shift the positions
    config: Any = vision_model.config
    tokens = torch.empty(1, num_others + (image_size // patch) ** 2, config.hidden_size)
    positions: Tensor = embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
    return positions


def _resize_images(image_processor: Any, image_size: int, patch: int) -> Any:
    if hasattr(image_processor, _COUNTS_PATCHES):
        return _change(image_processor, max_num_patches=(image_size // patch) ** 2)
    settings = image_processor.to_dict()
    size = {name: value for name, value in settings["size"].items() if value}
    crops = bool(settings.get("do_center_crop") and settings.get("crop_size"))
    old = settings["crop_size"]["height"] if crops else next(iter(size.values()))
    # Keeps the ratio of resized to cropped size.
    changes: dict[str, Any] = {
        "size": {name: round(value * image_size / old) for name, value in size.items()}
    }
    if crops:
        changes["crop_size"] = {"height": image_size, "width": image_size}
    return _change(image_processor, **changes)


def _change(image_processor: Any, **changes: Any) -> Any:
    return type(image_processor).from_dict({**image_processor.to_dict(), **changes})
