"""Properties of vision towers: image sizes, patches, and pooling into one embedding per image.

Several towers can be joined into one, whose pooled output is the concatenation of theirs.

Uploaded with the weights. Shapes: B is the batch size, L the number of tokens, D the width of the
tower.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_llm2clip import JoinedVisionConfig
from .loading_llm2clip import build_tower

# Names of the tokens in front of the patches. Class tokens represent the whole image.
_CLASS_TOKEN = re.compile("cls_.*token|class_embedding")
_PREFIX_TOKENS = re.compile(f"{_CLASS_TOKEN.pattern}|distillation_token|register_tokens")
# Modules that pool tokens; AIMv2 calls the query in its module "cls_token".
_POOLING_PARTS = {"head", "pooler", "attn_pool"}


class JoinedVisionModel(PreTrainedModel):
    """Several vision towers that are used as one.

    Args:
        config: Configuration of the towers.
        towers: The towers. If empty, towers with random weights are built from the configuration.
    """

    config_class = JoinedVisionConfig
    _supports_sdpa = _supports_flash_attn = True
    _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: JoinedVisionConfig, towers: Sequence[PreTrainedModel] = ()) -> None:
        super().__init__(config)
        self.towers = nn.ModuleList(towers or [build_tower(each) for each in config.towers])
        for tower, tower_config in zip(list_towers(self), config.towers, strict=True):
            tower.config = tower_config  # one object, so changes reach both
        # transformers only collects them from direct children, and the towers are in a list.
        self._no_split_modules = {
            name for tower in list_towers(self) for name in tower._no_split_modules or ()
        }
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, pooling: str = "pooler") -> BaseModelOutputWithPooling:
        """Run every tower on its own version of the images.

        Args:
            pixel_values: (B, 3, S, S) float, prepared for the largest image size.
            pooling: How each tower's output is pooled, as in `pool_vision`.

        Returns:
            `pooler_output`, (B, D): the towers' pooled outputs side by side. There is no
            `last_hidden_state`, because the towers have different numbers of tokens.
        """
        config: Any = self.config
        settings = (config.image_sizes, config.pixel_scales, config.pixel_shifts)
        pooled = []
        for tower, *each in zip(self.towers, *settings, strict=True):
            pixels = _convert_pixels(pixel_values, *each)
            embeds = pool_vision(
                tower(pixel_values=pixels), pooling, vision_model=tower, pixel_values=pixels
            )
            pooled.append(embeds.to(pixel_values.device))
        return BaseModelOutputWithPooling(pooler_output=torch.cat(pooled, dim=-1))


def _convert_pixels(
    pixel_values: Tensor, size: int, scales: Sequence[float], shifts: Sequence[float]
) -> Tensor:
    """Resize images with antialiasing and change their normalization, in float32."""
    pixels = pixel_values.float()
    if pixels.shape[-1] != size:
        pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    if [*scales, *shifts] != [1.0] * 3 + [0.0] * 3:
        scale, shift = (pixels.new_tensor(each).view(3, 1, 1) for each in (scales, shifts))
        pixels = pixels * scale + shift
    return pixels.to(pixel_values.dtype)


def build_vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a vision tower, or several as one, with random weights."""
    return JoinedVisionModel(config) if hasattr(config, "towers") else build_tower(config)  # type: ignore[arg-type]


def list_towers(vision: nn.Module | PreTrainedConfig) -> list[Any]:
    """List the towers of a vision tower, or their configurations: itself, or those joined."""
    return list(getattr(vision, "towers", [vision]))


def pool_inside(vision_model: nn.Module, pooling: str) -> dict[str, str]:
    """Return the argument by which joined towers pool; others are pooled afterwards."""
    return {"pooling": pooling} if hasattr(vision_model, "towers") else {}


def check_pixels(vision_model: nn.Module, pixel_values: Tensor) -> None:
    """Require floats of shape (B, 3, H, W), or (B, patches, values) for SigLIP2's own layout."""
    parameters = inspect.signature(vision_model.forward).parameters
    takes_patches = "spatial_shapes" in parameters
    fits = pixel_values.ndim == 3 if takes_patches else pixel_values.shape[1:-2] == (3,)
    if "pixel_values" not in parameters:  # a compiled or adapted tower hides its arguments
        fits = fits or pixel_values.ndim == 3
    if not pixel_values.is_floating_point() or not fits:
        shape = "(B, patches, values)" if takes_patches else "(B, 3, H, W)"
        raise ValueError(
            f"pixel_values must be floating point of shape {shape} for this vision tower, not "
            f"{pixel_values.dtype} {tuple(pixel_values.shape)}. Use the processor or image "
            "processor saved with the model."
        )


def require_restored_buffers(vision_model: nn.Module) -> None:
    """Raise ValueError if loading would leave tables of a timm network uninitialized.

    Tables derived from the settings, such as relative positions, are not saved. Loading a network
    does not compute these tables, so each module needs a method that computes its own tables
    afterwards.
    """
    timm_model: Any = getattr(vision_model, "timm_model", None)
    if timm_model is None:
        return
    saved = timm_model.state_dict().keys()
    tables = (name for name, _ in timm_model.named_buffers() if name not in saved)
    lost = [
        name
        for name in tables
        if not any(
            hasattr(timm_model.get_submodule(name.rpartition(".")[0]), method)
            for method in ("init_non_persistent_buffers", "_get_pos_embed_values")
        )
    ]
    if lost:
        config: Any = vision_model.config
        raise ValueError(
            f"{config.architecture} of timm cannot be loaded: its modules have no method that "
            f"computes {', '.join(lost[:2])} and {max(len(lost) - 2, 0)} more, which are not saved "
            "and would hold arbitrary numbers. Install timm 1.0.23 or later; if you already have "
            "it, use another network."
        )


def find_width(vision_model: nn.Module) -> int | None:
    """Return the width of a tower's image embedding, if its configuration states one."""
    timm_model: Any = getattr(vision_model, "timm_model", None)
    if timm_model is not None:
        return int(getattr(timm_model, "head_hidden_size", None) or timm_model.num_features)
    config: Any = vision_model.config
    width = getattr(config, "hidden_size", None)
    if width is None and getattr(config, "hidden_sizes", None):
        width = config.hidden_sizes[-1]  # convolutional: one per stage; the last is pooled
    return width


def has_class_token(vision_model: nn.Module) -> bool:
    """Return whether the tower has a class token."""
    return all(
        any(map(_CLASS_TOKEN.fullmatch, _find_own_parameters(tower)))
        for tower in list_towers(vision_model)
    )


def find_fixed_size(vision_model: nn.Module) -> tuple[int, int] | None:
    """Return the image size that a tower has positions for, or None if it takes any size."""
    timm_model: Any = getattr(vision_model, "timm_model", None)
    config: Any = vision_model.config
    trained = (getattr(config, "pretrained_cfg", None) or {}).get("input_size", ())[-2:]  # timm
    stated = getattr(config, "image_size", None) or trained
    size = (stated, stated) if isinstance(stated, int) else tuple(stated) if stated else None
    if hasattr(vision_model, "towers") or _has_table_of_pairs(vision_model):
        return size
    if timm_model is not None:
        patches: Any = getattr(timm_model, "patch_embed", None)
        is_fixed = getattr(patches, "strict_img_size", False) and patches.img_size
        return tuple(patches.img_size) if is_fixed else _find_size_of_distances(timm_model)
    if size and (can_interpolate(vision_model) or _has_fixed_table(vision_model, size)):
        return size
    return None


def _has_table_of_pairs(vision_model: nn.Module) -> bool:
    """Return whether attention has a bias for each pair of patches of the whole image (LeViT).

    An image of another shape with the same number of patches would silently get the wrong biases.
    Attention within windows also has such tables, but works for images of any size.
    """
    # Lists, because torch.compile cannot trace generators here.
    has_pairs = any(["attention_bias_idxs" in name for name, _ in vision_model.named_buffers()])
    return has_pairs and not any(
        [name.startswith("window_") for module in vision_model.modules() for name in vars(module)]
    )


def _has_fixed_table(vision_model: nn.Module, size: tuple[int, ...]) -> bool:
    """Return whether a table has one row per patch and is not interpolated.

    For example, AIMv2 would use the wrong rows for an image of another shape with the same number
    of patches.
    """
    kinds = {*map(type, vision_model.modules())}
    # If only a module inside the tower takes the argument, it is never passed (GraniteDocling).
    asked = any([can_interpolate(module) for module in vision_model.modules()])
    if not asked and any("interpolat" in method for kind in kinds for method in vars(kind)):
        return False
    patch = find_patch_size(vision_model)
    # Lists, because torch.compile cannot trace generators here.
    num_patches = prod([side // patch for side in size]) if patch else 0
    lengths = {num_patches, num_patches + has_class_token(vision_model)}
    tables = [v for n, v in _find_own_parameters(vision_model).items() if "position" in n]
    return any([not lengths.isdisjoint(table.shape[:-1]) for table in tables])


def _find_size_of_distances(timm_model: nn.Module) -> tuple[int, int] | None:
    """Return the image size of timm's MViTv2; None for other networks.

    MViTv2's position table is indexed by distance, counted from the largest one. A smaller image
    would silently read the entries for other distances, and a larger image would raise IndexError.
    """
    tables = dict(timm_model.named_parameters())
    first = [tables.get(f"stages.0.blocks.0.attn.rel_pos_{side}") for side in "hw"]
    patches: Any = getattr(timm_model, "patch_embed", None)
    if first[0] is None or first[1] is None:
        return None
    height, width = ((len(table) + 1) // 2 for table in first if table is not None)
    return height * patches.proj.stride[0], width * patches.proj.stride[1]


def find_patch_size(vision_model: nn.Module) -> int:
    """Return the side of a patch in pixels; 0 for networks without patches.

    Networks with overlapping patches merge the patches later. For such networks, the result is the
    side covered by one position of the last stage, because each stage drops the pixels beyond a
    multiple of its stride.
    """
    timm_model: Any = getattr(vision_model, "timm_model", None)
    if timm_model is None:
        config: Any = vision_model.config
        size: Any = getattr(config, "patch_size", 0) or 0
        if isinstance(size, int):
            return size
        if len(size) != 2:  # one per stage of a convolutional network
            return 0
        if size[0] != size[1]:
            raise ValueError(
                f"The patches of this {config.model_type!r} tower are {size} pixels, but only "
                "square ones are supported. Use another vision tower."
            )
        merged = getattr(config, "query_stride", [1])[0] ** getattr(config, "num_query_pool", 0)
        return int(getattr(config, "patch_stride", size)[0] * merged)  # Hiera's overlap
    patches: Any = getattr(timm_model, "patch_embed", getattr(timm_model, "embeds", None))
    size = getattr(patches, "patch_size", 0)
    side = int(size if isinstance(size, int) else size[0])
    step = getattr(getattr(patches, "proj", None), "stride", (side,))[0]
    return int(timm_model.feature_info[-1]["reduction"]) if step < side else side


def choose_interpolation(
    vision_model: nn.Module, pixel_values: Tensor, *, interpolate: bool
) -> dict[str, bool]:
    """Return the tower's argument for interpolating positions, if images of this size need it.

    Some towers would silently use the wrong positions for images of another size. Raises ValueError
    if the tower has no positions for this size and may not or cannot interpolate them, or if the
    size is not a multiple of the patch size.
    """
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    fixed = find_fixed_size(vision_model)
    if pixel_values.ndim != 4 or size == fixed:
        return {}
    subject = f"Got images of {size[0]} × {size[1]} pixels"
    interpolates = can_interpolate(vision_model)
    if fixed is not None and not (interpolates and interpolate):
        raise ValueError(
            f"{subject}, but this vision tower has positions for {fixed[0]} × {fixed[1]}"
            f"{'' if interpolates else ' and cannot interpolate them'}. Prepare the images with "
            "the model's processor, "
            f"{'pass interpolate_pos_encoding=True, ' if interpolates else ''}or build the model "
            "with image_size (llm2clip build --image-size)."
        )
    patch = find_patch_size(vision_model)
    if patch and any(side % patch or not side for side in size):
        raise ValueError(
            f"{subject}: height and width must be multiples of the patch size {patch}, because the "
            "tower would ignore the remaining pixels. Resize the images."
        )
    return {} if fixed is None else {"interpolate_pos_encoding": True}


def count_prefix_tokens(vision_model: nn.Module) -> int:
    """Count the tokens before the patches: class token, distillation token and registers."""
    timm_model: Any = getattr(vision_model, "timm_model", None)
    if timm_model is not None:
        return int(getattr(timm_model, "num_prefix_tokens", 0))
    return sum(
        value.numel() // value.shape[-1]
        for name, value in _find_own_parameters(vision_model).items()
        if _PREFIX_TOKENS.fullmatch(name)
    )


def find_patches(vision_model: nn.Module, hidden_states: Tensor, pixel_values: Tensor) -> Tensor:
    """Return the hidden states of a tower's patches, without class token and registers.

    Maps (B, L, D) to (B, L - prefix, D); the length must fit the number of patches in an image of
    this size.
    """
    side = find_patch_size(vision_model)
    expected = pixel_values.shape[1] if pixel_values.ndim == 3 else 0
    if side and pixel_values.ndim != 3:
        expected = (pixel_values.shape[-2] // side) * (pixel_values.shape[-1] // side)
    # Some towers remove the class token from their output.
    is_all_patches = hidden_states.shape[1] == expected
    num_prefix = 0 if is_all_patches else count_prefix_tokens(vision_model)
    patches = hidden_states[:, num_prefix:]
    # Hierarchical towers merge equal numbers of patches.
    if not patches.shape[1] or expected % patches.shape[1] or not expected:
        config: Any = vision_model.config
        raise ValueError(
            f"vision_pooling='patch_mean', but this {config.model_type!r} tower returns "
            f"{hidden_states.shape[1]} tokens, {num_prefix} of them before the patches, for "
            f"{expected or 'an unknown number of'} patches of the image. Use 'pooler', 'cls' or "
            "'mean'."
        )
    return patches


def pool_vision(
    output: Any,
    pooling: str,
    *,
    vision_model: nn.Module,
    pixel_values: Tensor,
    patch_mask: Tensor | None = None,
) -> Tensor:
    """Pool a tower's output into one embedding per image, (B, D).

    `patch_mask`, (B, L), is 0 where a patch is padding.
    """
    if hasattr(vision_model, "towers"):  # has pooled the output of each
        return output.pooler_output  # type: ignore[no-any-return]
    config: Any = vision_model.config
    num_images, tower = pixel_values.shape[0], f"this {config.model_type!r} tower"
    hidden_states: Tensor = output.last_hidden_state
    if hidden_states.shape[0] != num_images:
        raise ValueError(
            f"Each image needs its own embedding, but {tower} joins the images of a batch: "
            f"{num_images} images give states of shape {tuple(hidden_states.shape)}. Use another "
            "vision tower."
        )
    if pooling == "pooler":
        # RADIO calls it a summary: several concatenated class tokens.
        pooled = getattr(output, "pooler_output", getattr(output, "summary", None))
        if pooled is None:
            raise ValueError(
                f"vision_pooling='pooler', but {tower} has no pooler output. Choose 'cls', 'mean' "
                "or 'patch_mean' (llm2clip build --vision-pooling)."
            )
        # Convolutional towers return (B, D, 1, 1).
        if pooled.shape[0] != num_images or pooled.shape[2:] not in ((), (1, 1)):
            raise ValueError(
                f"vision_pooling='pooler' needs a row per image, but {tower} pools {num_images} "
                f"images into {tuple(pooled.shape)}. Choose another --vision-pooling."
            )
        return pooled.flatten(1)  # type: ignore[no-any-return]
    if hidden_states.ndim != 3:
        raise ValueError(
            f"vision_pooling={pooling!r} needs tokens (B, L, D), but the tower returns "
            f"{tuple(hidden_states.shape)}. Use 'pooler'."
        )
    if pooling == "patch_mean":
        hidden_states = find_patches(vision_model, hidden_states, pixel_values)
    if pooling == "cls":
        return hidden_states[:, 0]
    if patch_mask is None:
        return hidden_states.float().mean(dim=1)
    weights = patch_mask.to(hidden_states.device).float().unsqueeze(-1)  # (B, L, 1)
    return (hidden_states.float() * weights).sum(dim=1) / weights.sum(dim=1)


def can_interpolate(module: nn.Module) -> bool:
    """Return whether a tower, or a module in it, takes `interpolate_pos_encoding`."""
    return "interpolate_pos_encoding" in inspect.signature(module.forward).parameters


def _find_own_parameters(vision_model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters outside the pooling modules, by the last part of their names.

    The weight of an embedding layer is listed under the layer's name.
    """
    paths = ((n.removesuffix(".weight").split("."), v) for n, v in vision_model.named_parameters())
    return {path[-1]: value for path, value in paths if _POOLING_PARTS.isdisjoint(path)}
