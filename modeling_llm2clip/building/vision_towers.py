"""Loads the vision tower that a new model is built from, and its image processor.

Here is also the part that loading an LLM shares: an account of every key, and errors that name the
source.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import PILImageResampling

from .._suggestions import counted
from ..configs.build_config import BuildConfig
from ..encoding.clip_texts import load_dual_encoder, read_dual_encoder
from ..image_cropping_llm2clip import LLM2CLIPImageProcessor
from ..loading_llm2clip import build_tower, find_tower_class, load_without_code
from .text_layers import KEEP_ALL
from .tower_checks import list_layers, require_pixels_alone

# Causal masks, which older checkpoints hold beside the weights.
_MASKS = ("attn.bias", "attention.bias")
_NAMES_SHOWN = 8
_CROP_MODES = ("center", "squash")


def load_vision_tower(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    allow_missing_pooler: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a vision tower, in evaluation mode, and its image processor.

    The source is a Hub id or folder of a vision tower of transformers, or of a timm network in its
    wrapper. Of a model that has a `vision_config`, such as CLIP, the vision tower is taken. A tower
    may be saved without pooler weights, which stay random, where its pooler is not going to be
    used.
    """
    with naming(source):
        config = load_without_code(AutoConfig, source)
    vision_config = getattr(config, "vision_config", None) or config
    if not takes_images(vision_config):
        raise ValueError(
            f"{source} is a {config.model_type!r}, not a vision tower. Give CLIP, SigLIP, DINOv2, "
            "ViT or a timm network."
        )
    with torch.device("meta"):  # before the weights are read
        require_pixels_alone(build_tower(vision_config))
    model, missing = load_part(source, config, vision_config, source, dtype=dtype)
    missing = [k for k in missing if not (allow_missing_pooler and "pooler" in k)]
    if missing:
        raise ValueError(
            f"{source} lacks {counted(len(missing), 'weight')} of its vision tower, which would "
            f"stay random: {missing[:_NAMES_SHOWN]}. If only the pooler is missing, choose "
            "vision_pooling 'cls', 'mean' or 'patch_mean'."
        )
    forget_origin(model.config, source)
    if config.model_type == "timm_wrapper":  # which has no image processor of its own
        return model.eval(), image_processor_from_timm(model.config.pretrained_cfg)
    return model.eval(), forget_code(load_without_code(AutoImageProcessor, source))


def load_shared_projection(source: str | Path | None, config: BuildConfig) -> Tensor:
    """Load the image projection of a dual encoder, (P, D), into the space of its own texts.

    SigLIP has none: what its tower pools is in that space already.
    """
    if source is None:
        raise ValueError(
            "keep_projection takes the image projection of a dual encoder, and a loaded vision "
            "tower has none. Give its folder or Hub id."
        )
    own = read_dual_encoder(source)
    projection = getattr(load_dual_encoder(source), "visual_projection", None)
    kept = (
        torch.eye(own.vision_config.hidden_size)
        if projection is None
        else projection.weight.detach()
    )
    if config.projection_dim not in (None, len(kept)):
        raise ValueError(
            f"keep_projection keeps {counted(len(kept), 'dimension')}, as {source} has, and "
            f"projection_dim={config.projection_dim} asks for others. Leave it out."
        )
    return kept


def image_processor_from_timm(pretrained_cfg: dict[str, Any]) -> CLIPImageProcessor:
    """Build what timm's `create_transform` does for evaluation, with its numbers written out.

    Both crop modes enlarge by the crop ratio, rounded down, then crop the center: `center` keeps
    the shape of the image, `squash` resizes both sides to that length.
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
    """Return whether a configuration is a vision tower's."""
    fields = ("image_size", "num_channels", "patch_size", "architecture")
    return config.model_type == "timm_wrapper" or any(hasattr(config, field) for field in fields)


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Name the source in transformers' errors about files that are not there."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{source} cannot be loaded: {error}") from error


def load_with_account(
    model_class: Any, name: str | Path, **settings: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load as `from_pretrained` does, without its table of keys, which the caller judges.

    Returns the model and, among others, its `missing_keys` and `unexpected_keys`.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_needed)
    try:
        loaded: tuple[PreTrainedModel, dict[str, Any]] = load_without_code(
            model_class, name, output_loading_info=True, **settings
        )
    except SafetensorError as error:
        raise ValueError(
            f"{name}: a weight file is truncated or damaged ({error}). Download or save it again."
        ) from error
    finally:
        logger.removeFilter(_is_needed)
    return loaded


def load_part(
    name: str | Path,
    config: PreTrainedConfig,
    part_config: PreTrainedConfig,
    source: str | Path,
    *,
    above: range = range(0),
    **settings: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """Load the part of a model that has this configuration, which may be all of it.

    Returns the part and the names of its weights that the source lacks. Weights that the part does
    not read are refused, but for its layers of the numbers `above`, which it leaves out.
    """
    if above:
        settings["ignore_mismatched_sizes"] = True  # they are named below
    # As the whole, because only its class knows how published weights of the parts are named.
    whole, info = load_with_account(find_tower_class(config), name, config=config, **settings)
    if misshapen := sorted(key for key, *_ in info["mismatched_keys"]):
        raise ValueError(
            f"{source} cannot be cut to {above.start} layers: {misshapen[:_NAMES_SHOWN]} would be "
            f"of another shape, as weights that have a part for each layer. {KEEP_ALL}"
        )
    part, prefix = whole, ""
    if part_config is not config:
        with torch.device("meta"):  # takes no memory; the saved model is going to be of this class
            wanted = type(build_tower(part_config))
        prefix, part = _find_part(whole, wanted, source)
        part.config._name_or_path = whole.config._name_or_path
    if above:
        _account_for_layers(whole, part, above, info)
    if part_config.model_type != "timm_wrapper":  # in which a head left out is still a module
        _refuse_unread_weights(whole, part, info, source)
    return part, sorted(key for key in info["missing_keys"] if key.startswith(prefix))


def _find_part(
    whole: PreTrainedModel, wanted: type, source: str | Path
) -> tuple[str, PreTrainedModel]:
    for name, module in whole.named_modules():
        if type(module) is wanted and isinstance(module, PreTrainedModel):
            return f"{name}.", module
    raise ValueError(
        f"{source} is a {whole.config.model_type!r} without a {wanted.__name__}, which its "
        "configuration promises. Give the tower alone."
    )


def _account_for_layers(
    whole: PreTrainedModel, part: PreTrainedModel, above: range, info: dict[str, Any]
) -> None:
    """Remove the weights of layers that a part leaves out from the unexpected keys, in place."""
    layers = list_layers(part)
    places = [name for name, module in whole.named_modules() if module is layers]
    left_out = [f".{place}.{number}." for place in places for number in above]
    unread = info["unexpected_keys"]
    info["unexpected_keys"] = {k for k in unread if not any(one in f".{k}" for one in left_out)}


def _refuse_unread_weights(
    whole: PreTrainedModel, tower: PreTrainedModel, info: dict[str, Any], source: str | Path
) -> None:
    """Refuse weights in a module of the tower that the tower does not read.

    Other parts of the checkpoint, such as a head, are beside the tower's modules; buffers are not
    weights.
    """
    parts = set(tower.modules()) - {tower}
    inside = {
        name
        for name, module in whole.named_modules()
        if not isinstance(module, nn.ModuleList) and module in parts
    }
    unread = []
    for key in sorted(info["unexpected_keys"]):
        parents = accumulate(
            key.removeprefix(f"{whole.base_model_prefix}.").split(".")[:-1], "{}.{}".format
        )
        is_weight = key.endswith((".weight", ".bias")) and not key.endswith(_MASKS)
        if is_weight and not inside.isdisjoint(parents):
            unread.append(key)
    if unread:
        raise ValueError(
            f"{source} has {counted(len(unread), 'weight')} that {type(tower).__name__} does not "
            f"read, so it would give other hidden states: {unread[:_NAMES_SHOWN]}. Correct "
            "config.json, or take the transformers version that the checkpoint names."
        )


def forget_code(holder: Any) -> Any:
    """Remove the name of a repository's code from a configuration or image processor."""
    holder.__dict__.pop("auto_map", None)
    return holder


def forget_origin(config: Any, source: str | Path) -> None:
    """Forget the path that a tower came from, since configurations are published, and its code."""
    if Path(source).exists():
        config._name_or_path = Path(source).name
    forget_code(config)


def _is_needed(record: logging.LogRecord) -> bool:
    """Drop tables of keys from the log, but for those that an error refers to."""
    text = record.getMessage()
    return "LOAD REPORT" not in text or "MISMATCH" in text or "CONVERSION" in text
