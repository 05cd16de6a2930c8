"""Checks towers by running them: the direction of attention, determinism, positions, loading.

Shapes: L is the number of tokens, D the width of the LLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_llm2clip import LLM2CLIPConfig, parse_config
from ..heads_llm2clip import build_position_ids
from ..model_folders.golden_embeddings import (
    GOLDEN_TEXTS,
    measure_distances,
    render_golden_images,
)
from ..modeling_llm2clip import LLM2CLIPModel
from ..packing_llm2clip import find_first_position
from ..processing_llm2clip import LLM2CLIPProcessor
from ..vision_llm2clip import (
    find_fixed_size,
    find_patch_size,
    find_width,
    pool_inside,
    pool_vision,
    require_restored_buffers,
)

_LENGTH = 6
# Errors raised by a forward pass that cannot be bidirectional or needs other inputs.
MODEL_ERRORS = (AttributeError, TypeError, ValueError, RuntimeError, LookupError)
# A causal position does not move at all. A bidirectional one moves by far more than rounding.
_LEAST_MOVE = 1e-4
# For a single layer: movement when a later token changes, divided by movement when an earlier one
# does. Bidirectional layers have at least 0.4 (tiny ones of every family, all 30 of SmolLM2-135M,
# float32 and bfloat16), causal ones 0 or rounding (at most 1e-7).
_LEAST_SHARE_AHEAD = 1e-2
# Experts sum in a different order if their number of tokens changes, so tokens move without
# attending to each other: by at most 3e-7 in float32. A state space model moves by 0.1 or more.
_ROUNDING_OF_PARTS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Padded and unpadded runs differ only in the order of sums.
_MOST_PADDING_EFFECT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 2e-2}
# Two runs over an image may sum in a different order; random sampling moves the embedding far more.
_MOST_DIFFERENCE = 0.02
_NUM_PADS = 3
# Number of pads on the right, and its name in errors.
_PADDINGS = ((0, "without padding"), (_NUM_PADS, "with padding"))
# Both models share their weights in memory, so only an attention kernel may differ. In half
# precision, the limit above applies.
_MOST_DIFFERENCE_LOADED = {torch.float32: 1e-4}
_OWN_TOWERS = (
    "Use towers as transformers and timm load them, and set sizes, windows and extra layers in "
    "their configuration."
)
# Width and height, more than a tower takes at once.
_LARGE_IMAGE = (2048, 1024)
# Inputs that a model passes to its vision tower.
_VISION_INPUTS = {"self", "pixel_values", "pixel_attention_mask", "spatial_shapes"}


@torch.no_grad()
def measure_text_width(text_model: PreTrainedModel) -> int:
    """Measure the width of a text tower's hidden states, which its configuration may not state."""
    try:
        return run_texts(text_model, make_texts(text_model)[0]).shape[-1]
    except MODEL_ERRORS as error:
        raise ValueError(
            f"The {text_model.config.model_type!r} tower returns no hidden states of tokens: its "
            f"forward pass fails ({type(error).__name__}: {error}). Use another LLM."
        ) from error


@torch.no_grad()
def measure_vision_width(
    vision_model: PreTrainedModel, image_processor: Any, pooling: str
) -> int | None:
    """Measure the width of a vision tower's pooled output; None if its configuration has it.

    Refuses image processors that split a large image, or return inputs other than pixels.
    """
    if 1 in (settings := image_processor.to_dict().get("size") or {}).values():
        raise ValueError(
            f"{type(image_processor).__name__} has size={settings}, but an image side of one pixel "
            "is too small. Use an image processor with the tower's image size."
        )
    with _naming_failure(vision_model.config):
        images = image_processor([Image.new("RGB", _LARGE_IMAGE)] * 2, return_tensors="pt")
    rows = {name: len(value) for name, value in images.items()}
    if set(rows) - _VISION_INPUTS or rows["pixel_values"] != 2:
        raise ValueError(
            f"{type(image_processor).__name__} turns two images of {_LARGE_IMAGE[0]} × "
            f"{_LARGE_IMAGE[1]} pixels into {rows}, but a tower here takes two rows of "
            "pixel_values; only an MLLM can use more. Use the vision tower with an image processor "
            "of its own, such as CLIPImageProcessor."
        )
    images = images.to(vision_model.device)
    images["pixel_values"] = images["pixel_values"].to(vision_model.dtype)
    with _naming_failure(vision_model.config):
        output = vision_model(**images, **pool_inside(vision_model, pooling))
        output.last_hidden_state  # noqa: B018  # a backbone has none
    pooled = pool_vision(
        output,
        pooling,
        vision_model=vision_model,
        pixel_values=images["pixel_values"],
        patch_mask=images.get("pixel_attention_mask"),
    )
    width = pooled.shape[1]
    return None if width == find_width(vision_model) else width


@torch.no_grad()
def find_direction_errors(text_model: PreTrainedModel, *, bidirectional: bool) -> list[str]:
    """Change the last token, with and without padding, and describe violations of the direction.

    In a bidirectional tower, the first token's hidden state must change; in a causal tower, only
    the last token's may. Each layer of a bidirectional tower is also tested by itself, because one
    bidirectional layer can mask a causal one. Padding on either side must not change any hidden
    state.
    """
    ids, changed = make_texts(text_model)
    layers = list_layers(text_model) if bidirectional else nn.ModuleList()
    errors = []
    plain = run_texts(text_model, ids)
    for num_pads, name in _PADDINGS:
        with _LayerCheck(layers) as check:
            before = run_texts(text_model, ids, num_after=num_pads)
        after = run_texts(text_model, changed, num_after=num_pads)
        moved = list(map(_relative, before[0, :-1], after[0, :-1]))
        if not bidirectional:
            if not max(moved) <= _ROUNDING_OF_PARTS.get(before.dtype, 1e-4):
                errors.append(f"{name}, a token sees a later one (moved by {max(moved):.1e})")
        elif not moved[0] > _LEAST_MOVE:
            errors.append(
                f"{name}, the first token does not see the last (moved by {moved[0]:.1e})"
            )
        elif causal := [n for n, looks_ahead in check.looks_ahead.items() if not looks_ahead]:
            errors.append(
                f"{name}, {len(causal)} of its {len(layers)} layers do not look ahead (the first: "
                f"number {causal[0]})"
            )
        elif parts := check.causal_parts:
            errors.append(
                f"{name}, parts of its layers do not look ahead: {', '.join(parts)} (attention "
                "next to them does, which hides this)"
            )
    for side, pads in {
        "right": {"num_after": _NUM_PADS},
        "left": {"num_before": _NUM_PADS},
    }.items():
        effect = _relative(plain[0], run_texts(text_model, ids, **pads)[0])
        if not effect <= _MOST_PADDING_EFFECT.get(plain.dtype, 1e-3):
            errors.append(f"with padding on the {side}, the hidden states change by {effect:.1e}")
    if bidirectional and not layers:
        errors.append("its layers are not in a ModuleList, so none can be tested by itself")
    return errors


def require_direction(text_model: PreTrainedModel, *, bidirectional: bool) -> None:
    """Refuse a text tower whose attention does not have the given direction, padded or not."""
    try:
        errors = find_direction_errors(text_model, bidirectional=bidirectional)
    except MODEL_ERRORS as error:  # some families rely on their causal mask
        errors = [f"its forward pass fails ({type(error).__name__}: {error})"]
    if errors:
        raise ValueError(
            f"The {text_model.config.model_type!r} family cannot be "
            f"{'made bidirectional' if bidirectional else 'kept causal'} here: "
            f"{'; '.join(errors)}. Use another LLM, or try bidirectional={not bidirectional}."
        )


def make_texts(text_model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Make the ids of a text, (1, L), and of the same text with a different last token."""
    ids = torch.arange(1, _LENGTH + 1, device=text_model.device).unsqueeze(0)
    ids = ids % text_model.config.vocab_size
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 7) % text_model.config.vocab_size
    return ids, changed


class _LayerCheck:
    """While open, reruns every layer: with a different last token, then a different first token.

    The parts of each layer are rerun as well, because an inherently causal part, such as a state
    space model, may be next to bidirectional attention.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self.looks_ahead = dict.fromkeys(range(len(layers)), False)  # a layer may never run
        # Parts of any layer that look back but not ahead, by name; a dict, to keep their order.
        self.causal_parts: dict[str, None] = {}
        self._is_running_again = False
        self._handles: list[Any] = []

    def __enter__(self) -> _LayerCheck:
        for number, layer in enumerate(self._layers):
            self._watch(layer, number)
            for name, part in layer.named_modules():
                # Modules without children (projections, norms) see one token at a time.
                if part is not layer and any(True for _ in part.children()):
                    self._watch(part, f"{name} ({type(part).__name__})")
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, module: nn.Module, name: int | str) -> None:
        hook = partial(self._compare, name)
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _compare(
        self, name: int | str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Record whether a layer or a part looks ahead, if it looks at other tokens at all."""
        states: Any = args[0] if args else kwargs.get("hidden_states")  # (…, L, D)
        is_part = isinstance(name, str)
        if is_part and (
            self._is_running_again or not (_is_of_tokens(states) and _is_of_tokens(output))
        ):
            return
        # A layer's residual is subtracted first, because large numbers in it would hide a change.
        residual = 0.0 if is_part else states.float()
        self._is_running_again = True
        moves = []
        for position in (_LENGTH - 1, 0):
            hidden = states.clone()
            hidden[..., position, :] = -hidden[..., position, :].flip(-1)
            changed = (
                module.forward(hidden, *args[1:], **kwargs)
                if args
                else module.forward(**{**kwargs, "hidden_states": hidden})
            )
            before, after = (
                (take_hidden(states).float() - residual)[..., 1 : _LENGTH - 1, :].unbind(-2)
                for states in (output, changed)
            )
            moves.append(max(map(_relative, before, after)))
        self._is_running_again = False
        ahead, back = moves
        is_rounding = is_part and back <= _ROUNDING_OF_PARTS.get(states.dtype, 1e-4)
        looks_ahead = is_rounding or ahead >= _LEAST_SHARE_AHEAD * back
        if isinstance(name, int):
            self.looks_ahead[name] = looks_ahead
        elif not looks_ahead:
            self.causal_parts[name] = None


def _is_of_tokens(value: Any) -> bool:
    """Return whether a value is or starts with floating-point states of the tokens, (…, L, D)."""
    hidden = take_hidden(value)
    is_tensor = isinstance(hidden, Tensor) and hidden.is_floating_point() and hidden.ndim >= 2
    return is_tensor and hidden.shape[-2] >= _LENGTH


def list_layers(text_model: nn.Module) -> nn.ModuleList:
    """Find the decoder's layers, under any name; empty if there is no such list."""
    count = getattr(text_model.config, "num_hidden_layers", None)
    lists = (module for module in text_model.modules() if isinstance(module, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == count), nn.ModuleList())


def take_hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def run_texts(
    text_model: PreTrainedModel, ids: Tensor, *, num_before: int = 0, num_after: int = 0
) -> Tensor:
    """Run texts with padding on either side; return their last hidden states, (B, L, D)."""
    pads = (num_before, num_after)
    mask = nn.functional.pad(torch.ones_like(ids), pads)
    inputs = {"input_ids": nn.functional.pad(ids, pads), "attention_mask": mask}
    # Positions start at the first token, as in the model itself.
    if "position_ids" in inspect.signature(text_model.forward).parameters:
        first = find_first_position(text_model)
        inputs["position_ids"] = build_position_ids(mask, first=first)
    hidden = text_model(**inputs, use_cache=False).last_hidden_state
    return hidden[:, num_before : num_before + _LENGTH]  # type: ignore[no-any-return]


def _relative(before: Tensor, after: Tensor) -> float:
    difference = (before.float() - after.float()).norm()
    return float(difference / before.float().norm().clamp(min=1e-12))


def require_pixels_alone(vision_model: PreTrainedModel) -> None:
    """Refuse a vision tower that needs more inputs than pixels, as in some multimodal LLMs."""
    parameters = inspect.signature(vision_model.forward).parameters.values()
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in _VISION_INPUTS
    ]
    if needed:
        raise ValueError(
            f"The {vision_model.config.model_type!r} tower needs {' and '.join(needed)}, which its "
            "MLLM computes for it, and returns no embedding of the whole image. LLM2CLIP only "
            "passes pixel_values to a tower. Use CLIP, SigLIP, SigLIP2, DINOv2, DINOv3, ViT or a "
            "timm network."
        )


@contextmanager
def _naming_failure(config: PreTrainedConfig) -> Iterator[None]:
    try:
        yield
    except MODEL_ERRORS as error:
        raise ValueError(
            f"The vision tower {config.name_or_path or config.model_type!r} cannot be used: "
            f"preparing or encoding an image fails ({type(error).__name__}: {error}). Use another "
            "vision tower, or an image processor with the tower's image size."
        ) from error


@torch.inference_mode()
def require_deterministic(model: LLM2CLIPModel, processor: LLM2CLIPProcessor) -> None:
    """Refuse a model whose vision tower returns different embeddings for the same image.

    Masked autoencoders, for example, mask random patches even outside of training; other towers mix
    the images of a batch.
    """
    images = render_golden_images()[:2]
    with _naming_failure(model.config.vision_config):
        alone, again, in_batch = (
            model.get_vision_embeds(**processor(images=batch).to(model.device))[0]
            for batch in (images[:1], images[:1], images)
        )
    for embeds, when in ((again, "each time"), (in_batch, "next to another image")):
        difference = float((alone - embeds).norm() / alone.norm())
        if not difference <= _MOST_DIFFERENCE:
            raise ValueError(
                f"The {model.config.vision_config.model_type!r} tower returns a different "
                f"embedding of an image {when} (off by {difference:.0%}): it samples at random, "
                "mixes the images of a batch, or returns NaN. Use another vision tower."
            )


@torch.inference_mode()
def require_positions(model: LLM2CLIPModel, processor: LLM2CLIPProcessor) -> None:
    """Refuse a tower that silently uses the same positions for images of another shape.

    Such a tower returns the same states if the same patches are arranged in one column.
    """
    side = find_patch_size(model.vision_model)
    pixels = processor(images=render_golden_images()[:1]).to(model.device)["pixel_values"]
    if not side or pixels.ndim != 4 or find_fixed_size(model.vision_model) is not None:
        return
    # (1, 3, rows, columns, side, side)
    patches = pixels.unfold(2, side, side).unfold(3, side, side)
    column = patches.flatten(2, 3).flatten(2, 3)
    try:
        square, other = (
            model.get_image_features(images).last_hidden_state for images in (pixels, column)
        )
    except (AssertionError, *MODEL_ERRORS):  # not silent
        return
    if (
        patches.shape[3] > 1
        and square.shape == other.shape
        and _relative(square, other) < _LEAST_MOVE
    ):
        raise ValueError(
            f"The {model.config.vision_config.model_type!r} tower accepts images of another shape, "
            f"such as {column.shape[2]} × {column.shape[3]} pixels, but silently uses the "
            f"positions of {pixels.shape[2]} × {pixels.shape[3]}, or none. Use another vision "
            "tower."
        )


@torch.inference_mode()
def require_loadable(model: LLM2CLIPModel, processor: LLM2CLIPProcessor) -> None:
    """Refuse a model whose configuration does not describe it: its folder would load differently.

    Loads a second model from the configuration; both models share the weights in memory.
    """
    require_restored_buffers(model.vision_model)
    kept = parse_config(model.config.to_json_string(use_diff=False))  # as read from a file
    try:
        loaded = LLM2CLIPModel.from_pretrained(
            None,
            config=LLM2CLIPConfig.from_dict(kept),
            state_dict=model.state_dict(),
            dtype=model.dtype,
        )
    except MODEL_ERRORS as error:
        raise ValueError(
            f"The model cannot be loaded back: {error} The configuration of a tower does not "
            f"describe its network. {_OWN_TOWERS}"
        ) from error
    inputs = processor(text=GOLDEN_TEXTS[1], images=render_golden_images()[0]).to(model.device)
    outputs, expected = (m(**inputs) for m in (loaded.to(model.device), model))
    dtypes = {parameter.dtype for parameter in model.parameters()}
    most = max(_MOST_DIFFERENCE_LOADED.get(dtype, _MOST_DIFFERENCE) for dtype in dtypes)
    towers = {"text_embeds": model.config.text_config, "image_embeds": model.config.vision_config}
    errors = [
        f"the embeddings of the {config.model_type!r} tower are off by {off:.1e}"
        for name, config in towers.items()
        if not (off := float(measure_distances(outputs[name], expected[name]))) <= most
    ]
    if errors:
        raise ValueError(
            f"The model would load differently: {' and '.join(errors)} (allowed {most:.2g}). Its "
            f"configuration does not describe the network. {_OWN_TOWERS}"
        )
