"""Hands a model's vision tower on as an ordinary folder of transformers, without anything of ours.

`AutoModel` and `AutoImageProcessor` load it, and so does whatever is built on a vision tower: a
detector, a probe, a multimodal LLM. What LLaVA's classes see of a tower, `find_visual_tokens` says.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedModel

from ..loading_llm2clip import load_without_code
from ..model_folders.atomic_folder import atomic_folder, require_new_folder
from ..model_folders.model_folder import find_model_folder
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPVisionModel

# LLaVA-1.5 reads the layer before the last (arXiv:2304.08485, section 4.1).
LLAVA_LAYER = -2
_CARD = """
# {title}

The vision tower of an LLM2CLIP model ([arXiv:2411.04997](https://arxiv.org/abs/2411.04997)), an
ordinary `{architecture}` of transformers: `AutoModel` and `AutoImageProcessor` load it without any
further code. It began as {origin}; the license of that applies.
"""


@dataclass(frozen=True)
class VisualTokens:
    """What an MLLM of LLaVA's kind sees of a tower: the states of one layer, one token a patch.

    Attributes:
        patch_size: side of a patch in pixels.
        num_patches: how many an image has, in the size that the image processor makes.
        num_prefix_tokens: tokens before the patches: 1 for CLS, more with registers, or none.
        width: of a token.
    """

    patch_size: int
    num_patches: int
    num_prefix_tokens: int
    width: int

    @property
    def select_strategy(self) -> str:
        """LLaVA's `vision_feature_select_strategy`: "default" drops CLS; without one, "full"."""
        return "default" if self.num_prefix_tokens else "full"

    @property
    def num_tokens(self) -> int:
        """Tokens that an image takes among the words."""
        return self.num_patches + self.num_prefix_tokens - (self.num_prefix_tokens > 0)


def export_vision_tower(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    license_id: str | None = None,
) -> Path:
    """Write the vision tower of an LLM2CLIP folder or Hub repository; its LLM is not read.

    Returns: the folder that was written; see `save_vision_tower`.
    Raises: FileExistsError when it exists and is not empty.
    """
    require_new_folder(Path(output))  # before the weights are read
    folder = find_model_folder(source, revision=revision)
    return save_vision_tower(
        LLM2CLIPVisionModel.from_pretrained(folder),
        load_without_code(AutoImageProcessor, folder),
        output,
        license_id=license_id,
    )


def save_vision_tower(
    model: LLM2CLIPModel | LLM2CLIPVisionModel,
    image_processor: Any,
    output: str | Path,
    *,
    license_id: str | None = None,
) -> Path:
    """Write a model's vision tower, its image processor and a card as one folder.

    Everything goes into a temporary folder beside the target, which is renamed when complete. The
    projection into the shared space stays behind: it belongs to the captions' half.

    Args:
        license_id: SPDX or Hub name of the weights' license, for the card.
    Raises: FileExistsError when the folder exists and is not empty.
    """
    folder = Path(output)
    tower: PreTrainedModel = model.vision_model
    with atomic_folder(folder) as unfinished:
        tower.save_pretrained(unfinished)
        image_processor.save_pretrained(unfinished)
        data = ModelCardData(
            license=license_id,
            library_name="transformers",
            pipeline_tag="image-feature-extraction",
            tags=["llm2clip"],
        )
        name = tower.config._name_or_path
        body = _CARD.format(
            title=folder.name,
            architecture=type(tower).__name__,
            origin=f"`{name}`" if name else "a tower whose name is not recorded",
        )
        ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(unfinished / "README.md")
    return folder


@torch.inference_mode()
def find_visual_tokens(
    tower: PreTrainedModel, image_processor: Any, *, layer: int = LLAVA_LAYER
) -> VisualTokens:
    """Run a blank image through a tower, and see what LLaVA's classes would make of it.

    Args:
        layer: of the hidden states, counted as `vision_feature_layer` is: from 1, or from the last,
            which is -1.
    Raises: ValueError for a tower that these classes cannot use: one without a sequence of hidden
        states (convolutional networks, everything in timm's wrapper), one that wants more than
        `pixel_values`, or one whose tokens are not its patches; and for a layer that is not there.
    """
    name = type(tower).__name__
    extra = [
        parameter
        for parameter in inspect.signature(tower.forward).parameters
        if parameter in ("spatial_shapes", "pixel_attention_mask")
    ]
    if extra:
        raise ValueError(
            f"{name} needs {' and '.join(extra)}, which LLaVA's classes do not hand to a vision "
            "tower. Take a SigLIP2 of one fixed resolution (model type siglip) instead."
        )
    blank = Image.new("RGB", (224, 224))  # of any size: the image processor makes its own of it
    pixels = image_processor(images=[blank], return_tensors="pt")["pixel_values"]
    pixels = pixels.to(device=tower.device, dtype=tower.dtype)
    states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    shape = tuple(states[-1].shape) if states else None
    if shape is None or len(shape) != 3:
        raise ValueError(
            f"{name} gives hidden states of shape {shape}, and LLaVA's classes need tokens "
            "(B, L, D). A convolutional network or a tower in timm's wrapper has none: take CLIP, "
            "SigLIP, DINOv2, DINOv3 or ViT. timm's transformers fit PerceptionLM's classes."
        )
    _require_layer(name, layer, num_layers=len(states) - 1)  # the first of them are the embeddings
    _, num_tokens, width = states[layer].shape
    patch_size = tower.config.patch_size
    patch_size = patch_size if isinstance(patch_size, int) else patch_size[0]
    num_patches = (pixels.shape[-2] // patch_size) * (pixels.shape[-1] // patch_size)
    if num_tokens < num_patches or width != tower.config.hidden_size:
        raise ValueError(
            f"{name} gives {num_tokens} tokens of width {width} for {num_patches} patches and a "
            f"hidden_size of {tower.config.hidden_size}; LLaVA's classes need a token a patch, of "
            "that width. Take CLIP, SigLIP, DINOv2, DINOv3 or ViT."
        )
    return VisualTokens(patch_size, num_patches, num_tokens - num_patches, width)


def _require_layer(name: str, layer: int, *, num_layers: int) -> None:
    # transformers takes 0 for "no hidden states" and fails at the first image.
    if layer not in (*range(-num_layers, 0), *range(1, num_layers + 1)):
        raise ValueError(
            f"layer={layer}, and {name} has {num_layers} layers. Give 1 to {num_layers}, or "
            f"-{num_layers} to -1, counted from the last."
        )
