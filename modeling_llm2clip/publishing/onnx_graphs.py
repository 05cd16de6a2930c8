"""Turns the towers of a model into ONNX graphs: tokens or pixels in, unit embeddings out.

The tokenizer adds the prompt and truncates. Positions, the pooled span, pooling, text adapter,
projection and normalization are in the graph. Models must be in float32 on the CPU, in evaluation
mode.

The language model's linear layers can be quantized, with a scale and zero point per block of
weights: all linear layers to 4 bits, or all except the attention projections to 8 bits. Everything
else stays float32: token embeddings, norms, text adapter, projection, activations. In SmolLM2-135M,
the attention projections have a quarter of the weights but cause more than half of the 8-bit error.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..encoding.onnx_encoding import (
    IMAGE_INPUT,
    IMAGE_OUTPUT,
    NUM_UNPOOLED,
    TEXT_INPUTS,
)
from ..model_folders.onnx_folder import data_file
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel
from ..vision_llm2clip import find_patch_size

# Written directly, without conversion, by torch 2.6 and later; read by ONNX Runtime 1.18 and later.
OPSET = 20
# Protocol buffers are limited to 2 GiB; a larger graph has its weights in a second file.
_LARGEST_FILE = 2**31 - 2**24
_LARGEST_BATCH = 2**16
_LARGEST_SIDE = 2**12
BLOCK_SIZE = 16
_FLOAT32 = 1  # the operator's accuracy_level for float32; see its documentation
# Metadata key under which torch's exporter records the modules that a node comes from.
_SCOPES = "pkg.torch.onnx.name_scopes"
# Metadata key for the lines of code, which contain paths on the exporting machine.
_SOURCE_LINES = "pkg.torch.onnx.stack_trace"
_LLM_SCOPE = "model.text_model."
_ATTENTION = ("attn", "attention")  # parts of the names of attention modules in transformers


class _TowerGraph(nn.Module):
    """A tower as a module to export: from tokens or pixels to unit embeddings."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


class _TextGraph(_TowerGraph):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, num_unpooled: Any) -> Any:
        # Not `get_text_features`: it would turn the number of unpooled tokens into a constant.
        output = self.model._pool_batch(input_ids, attention_mask, num_unpooled=num_unpooled)
        return self.model.to_text_embeds(self.model._apply_dense(output.pooler_output))


class _ImageGraph(_TowerGraph):
    def forward(self, pixel_values: Tensor) -> Any:
        return self.model.to_image_embeds(self.model.get_vision_embeds(pixel_values))


def write_text_graph(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    inputs: Mapping[str, Tensor],
    file: Path,
    *,
    output: str,
) -> dict[str, Any]:
    """Write the text tower as a graph for any number of texts of any length.

    `inputs` are `input_ids` and `attention_mask` of at least two texts of different lengths.
    """
    config = model.config
    batch = torch.export.Dim("batch_size", max=_LARGEST_BATCH)
    length = torch.export.Dim("sequence_length", min=2, max=config.max_text_length)
    num_unpooled = torch.tensor(config.num_unpooled)
    with _explaining(f"language model {config.text_config.model_type!r}", other="vision"):
        return _export(
            _TextGraph(model),
            {**{name: inputs[name] for name in TEXT_INPUTS}, NUM_UNPOOLED: num_unpooled},
            file,
            output=output,
            shapes={**{name: {0: batch, 1: length} for name in TEXT_INPUTS}, NUM_UNPOOLED: {}},
            defaults={NUM_UNPOOLED: num_unpooled},
        )


def write_image_graph(
    model: LLM2CLIPModel | LLM2CLIPVisionModel,
    pixel_values: Tensor,
    file: Path,
    *,
    any_size: bool,
) -> dict[str, Any]:
    """Write the vision tower as a graph for any number of images, of any size with `any_size`.

    `pixel_values` (B, 3, H, W) must hold at least two images.
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
        inputs, shapes = {IMAGE_INPUT: pixel_values}, {IMAGE_INPUT: shape}
        return _export(_ImageGraph(model), inputs, file, output=IMAGE_OUTPUT, shapes=shapes)


def name_vision_tower(model: LLM2CLIPModel | LLM2CLIPVisionModel) -> str:
    config: Any = model.vision_model.config
    architecture = getattr(config, "architecture", None)  # timm's name of the network
    return f"vision tower {architecture or config.model_type!r}"


@contextmanager
def _explaining(tower: str, *, other: str) -> Iterator[None]:
    """Name the tower in the error if torch cannot export it, and silence torch's own messages."""
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
            f"torch cannot export the {tower} to ONNX: {reason} Export only the {other} tower "
            f"(--components {other}), or build the model with another tower."
        ) from error


def _export(
    graph: nn.Module,
    inputs: Mapping[str, Tensor],
    file: Path,
    *,
    output: str,
    shapes: Mapping[str, Any],
    defaults: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write a graph, and return its versions and the shapes of its inputs and outputs by name.

    Dynamic dimensions are given by name. Inputs with a default are optional at run time.
    """
    import onnx_ir

    program: Any = torch.onnx.export(
        graph.eval(),
        tuple(inputs.values()),
        dynamo=True,
        opset_version=OPSET,
        input_names=[*inputs],
        output_names=[output],
        dynamic_shapes=dict(shapes),
        verbose=False,
    )
    model = program.model
    for node in model.graph.all_nodes():
        node.metadata_props.pop(_SOURCE_LINES, None)
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

    return {
        "opset": model.opset_imports[""],
        "ir_version": model.ir_version,
        "inputs": list_shapes(model.graph.inputs),
        "optional_inputs": list_shapes(model.graph.inputs, optional=True),
        "outputs": list_shapes(model.graph.outputs),
    }


def save_graph(model: Any, file: Path) -> None:
    """Write a graph; weights go to a second file if one file would be too large."""
    import onnx_ir

    weights = (value.const_value for value in model.graph.initializers.values())
    num_bytes = sum(tensor.nbytes for tensor in weights if tensor is not None)
    weights_file = data_file(file).name if num_bytes > _LARGEST_FILE else None
    onnx_ir.save(model, file, external_data=weights_file)


def write_rounded_graph(source: Path, file: Path, *, bits: int) -> int:
    """Write a text graph whose language model is quantized to 8-bit or 4-bit weights.

    Returns the number of quantized linear layers.
    """
    import onnx
    import onnx_ir

    model = onnx.load(source)
    products = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    constant = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    layers = []  # the language model's matrix products with a constant matrix
    for node in model.graph.node:
        scopes = {entry.key: entry.value for entry in node.metadata_props}.get(_SCOPES, "")
        is_linear = node.op_type == "MatMul" and node.input[1] in constant
        is_exact = bits == 8 and any(name in scopes for name in _ATTENTION)
        if is_linear and _LLM_SCOPE in scopes and not is_exact:
            layers.append(node.name)
    if not layers:
        raise ValueError(f"{source} has no linear layers of a language model to quantize.")
    with _quiet_quantizer():
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        config = nbits.DefaultWeightOnlyQuantConfig(
            block_size=BLOCK_SIZE, is_symmetric=False, accuracy_level=_FLOAT32, bits=bits
        )
        others = sorted({*products} - {*layers})
        quantizer = nbits.MatMulNBitsQuantizer(model, nodes_to_exclude=others, algo_config=config)
        quantizer.process()
    save_graph(onnx_ir.from_proto(quantizer.model.model), file)
    return len(layers)


@contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Restore the root logger, because importing the quantizer makes it log every node."""
    root, logger = logging.getLogger(), logging.getLogger("onnxruntime.quantization")
    level, handlers = root.level, [*root.handlers]
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
