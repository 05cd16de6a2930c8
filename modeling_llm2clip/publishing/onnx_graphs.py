"""Turns the towers of a model into ONNX graphs: tokens or pixels in, unit embeddings out.

Prompt and truncation are the tokenizer's. Positions, the pooled span, pooling, text adapter,
projection and normalization are in the graph.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..encoding.onnx_encoding import (
    IMAGE_INPUT,
    IMAGE_OUTPUT,
    NUM_UNPOOLED,
    TEXT_INPUTS,
    TEXT_OUTPUT,
)
from ..model_folders.onnx_folder import data_file
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel
from ..vision_llm2clip import find_fixed_size, find_patch_size

# What torch 2.6 and later write without converting again; ONNX Runtime 1.18 and later read it.
OPSET = 20
# Protocol buffers hold 2 GiB; what is larger has its weights in a file beside the graph.
_LARGEST_FILE = 2**31 - 2**24
_LARGEST_BATCH = 2**16
_LARGEST_SIDE = 2**12


@dataclass(frozen=True)
class OnnxGraph:
    """A graph that was written.

    Attributes:
        file: Where it is.
        opset: Version of ONNX's operators.
        ir_version: Version of ONNX's file format.
        inputs: Name → shape, in which names stand for dimensions that may vary.
        optional_inputs: Likewise, of inputs that have a default.
        outputs: Likewise.
    """

    file: Path
    opset: int
    ir_version: int
    inputs: Mapping[str, list[str | int]]
    optional_inputs: Mapping[str, list[str | int]]
    outputs: Mapping[str, list[str | int]]


class _TextGraph(nn.Module):
    """The text tower as a graph: token ids and mask to unit embeddings."""

    def __init__(self, model: LLM2CLIPModel | LLM2CLIPTextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, num_unpooled: Any) -> Tensor:
        # Not `get_text_features`: its count of unpooled tokens would become a constant.
        output = self.model._pool_batch(input_ids, attention_mask, num_unpooled=num_unpooled)
        return self.model.to_text_embeds(output.pooler_output)  # type: ignore[arg-type]


class _ImageGraph(nn.Module):
    """The vision tower as a graph: pixels to unit embeddings."""

    def __init__(self, model: LLM2CLIPModel | LLM2CLIPVisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.to_image_embeds(self.model.get_vision_embeds(pixel_values))


def write_text_graph(
    model: LLM2CLIPModel | LLM2CLIPTextModel, inputs: Mapping[str, Tensor], file: Path
) -> OnnxGraph:
    """Write the text tower, for any number of texts of any length.

    Args:
        model: A model with a text tower, in float32 on the CPU, in evaluation mode.
        inputs: `input_ids` and `attention_mask` of at least two texts of unequal length.
        file: File to write.

    Raises:
        ValueError: The tower cannot be exported; the message names it and has the reason.
    """
    config = model.config
    batch = torch.export.Dim("batch_size", max=_LARGEST_BATCH)
    length = torch.export.Dim("sequence_length", min=2, max=config.max_text_length)
    num_unpooled = torch.tensor(len(config.prompt_prefix_ids))
    tower = f"language model {config.text_config.model_type!r}"
    with _explaining(tower, other="vision"):
        program = torch.onnx.export(
            _TextGraph(model).eval(),
            (*(inputs[name] for name in TEXT_INPUTS), num_unpooled),
            dynamo=True,
            opset_version=OPSET,
            input_names=[*TEXT_INPUTS, NUM_UNPOOLED],
            output_names=[TEXT_OUTPUT],
            dynamic_shapes={
                **{name: {0: batch, 1: length} for name in TEXT_INPUTS},
                NUM_UNPOOLED: {},
            },
            verbose=False,
        )
        return _save(program, file, defaults={NUM_UNPOOLED: num_unpooled})


def write_image_graph(
    model: LLM2CLIPModel | LLM2CLIPVisionModel,
    pixel_values: Tensor,
    file: Path,
    *,
    any_size: bool,
) -> OnnxGraph:
    """Write the vision tower, for any number of images.

    Args:
        model: A model with a vision tower, in float32 on the CPU, in evaluation mode.
        pixel_values: (B, 3, H, W) of at least two images.
        file: File to write.
        any_size: Whether height and width may vary; see `takes_any_size`.

    Raises:
        ValueError: The tower cannot be exported; the message names it and has the reason.
    """
    shape: dict[int, Any] = {0: torch.export.Dim("batch_size", max=_LARGEST_BATCH)}
    if any_size:
        patch = find_patch_size(model.vision_model) or 1
        for axis, name in ((2, "height"), (3, "width")):
            sides = torch.export.Dim(
                name if patch == 1 else f"{name}_in_patches", min=2, max=_LARGEST_SIDE // patch
            )
            shape[axis] = sides if patch == 1 else patch * sides
    with _explaining(name_vision_tower(model), other="text"):
        program = torch.onnx.export(
            _ImageGraph(model).eval(),
            (pixel_values,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[IMAGE_INPUT],
            output_names=[IMAGE_OUTPUT],
            dynamic_shapes={IMAGE_INPUT: shape},
            verbose=False,
        )
        return _save(program, file, defaults={})


def takes_any_size(model: LLM2CLIPModel | LLM2CLIPVisionModel) -> bool:
    """Whether the vision tower takes images of other sizes than its own without an option.

    Args:
        model: A model with a vision tower.
    """
    return find_fixed_size(model.vision_model) is None


def name_vision_tower(model: LLM2CLIPModel | LLM2CLIPVisionModel) -> str:
    """Return what errors call a vision tower.

    Args:
        model: A model with a vision tower.
    """
    config: Any = model.vision_model.config
    architecture = getattr(config, "architecture", None)  # timm's name of the network
    return f"vision tower {architecture or config.model_type!r}"


@contextmanager
def _explaining(tower: str, *, other: str) -> Iterator[None]:
    """Name the tower that torch cannot export, and silence what torch says of its own."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    # torch's exporter raises errors of many classes, most of them RuntimeErrors.
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines or [type(error).__name__])[0][:300]
        raise ValueError(
            f"torch cannot export the {tower} to ONNX: {reason} Export the {other} tower alone "
            f"(--components {other}), or build the model with another tower."
        ) from error


def _save(program: Any, file: Path, *, defaults: Mapping[str, Tensor]) -> OnnxGraph:
    """Write the graph; inputs with a default may be left out when it is run."""
    import onnx_ir

    model = program.model
    for value in model.graph.inputs:
        if value.name in defaults:
            value.const_value = onnx_ir.tensor(defaults[value.name].numpy(), name=value.name)
            model.graph.register_initializer(value)
    save_graph(model, file)

    def list_shapes(values: Any, *, optional: bool = False) -> dict[str, list[str | int]]:
        return {
            value.name: [side if isinstance(side, int) else str(side) for side in value.shape]
            for value in values
            if (value.name in defaults) == optional
        }

    return OnnxGraph(
        file=file,
        opset=model.opset_imports[""],
        ir_version=model.ir_version,
        inputs=list_shapes(model.graph.inputs),
        optional_inputs=list_shapes(model.graph.inputs, optional=True),
        outputs=list_shapes(model.graph.outputs),
    )


def save_graph(model: Any, file: Path) -> None:
    """Write a graph, with its weights in a second file if they are too large for one.

    Args:
        model: `onnx_ir.Model`.
        file: File to write.
    """
    import onnx_ir

    weights = (value.const_value for value in model.graph.initializers.values())
    num_bytes = sum(tensor.nbytes for tensor in weights if tensor is not None)
    beside = data_file(file).name if num_bytes > _LARGEST_FILE else None
    onnx_ir.save(model, file, external_data=beside)
