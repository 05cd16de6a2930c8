"""Small sources in the official layouts, from what the official code was recorded on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig

from modeling_llm2clip.configs.export_config import ConvertConfig, SourceFormat
from modeling_llm2clip.conversion.convert_checkpoint import (
    ConversionPlan,
    convert_checkpoint,
    plan_conversion,
)
from modeling_llm2clip.conversion.layouts import LAYOUTS, find_layout
from modeling_llm2clip.conversion.source_checkpoint import (
    CheckpointSource,
    LLMSource,
    open_checkpoint,
    open_language_model,
)

GOLDEN = Path(__file__).parents[2] / "conversion" / "golden"
LLM2VEC = GOLDEN / "llm2vec"
LLM = LLM2VEC / "llama"
# Which source format a family's small checkpoint has, and what is smaller in it.
FORMAT_OF = {
    "hub_clip": replace(LAYOUTS["openai-hub"].source_format, max_text_length=200),
    "openai": replace(LAYOUTS["openai"].source_format, max_text_length=200, head_width=12),
    "eva02": replace(LAYOUTS["eva02"].source_format, max_text_length=200),
    "siglip2": replace(
        LAYOUTS["siglip2"].source_format, max_text_length=200, head_width=12, preprocessing="openai"
    ),
}


@cache
def read_golden(family: str) -> dict[str, Tensor]:
    """What went into the official code and what came out."""
    return load_file(GOLDEN / f"{family}.safetensors")


@cache
def read_captions() -> tuple[list[str], str]:
    """The captions that were recorded, and the instruction."""
    stored = json.loads((LLM2VEC / "captions.json").read_text(encoding="utf-8"))
    return stored["captions"], stored["instruction"]


def read_checkpoint(family: str) -> dict[str, Tensor]:
    """The small checkpoint, by the official names."""
    start = "checkpoint."
    return {
        name.removeprefix(start): value.clone()
        for name, value in read_golden(family).items()
        if name.startswith(start)
    }


def save_checkpoint(family: str, folder: Path, state: dict[str, Any] | None = None) -> Path:
    """Save as the official sources are: a training checkpoint, or a folder as on the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    state = read_checkpoint(family) if state is None else state
    if family != "hub_clip":
        wrapped = {f"module.{name}": value for name, value in state.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": wrapped}, folder / "epoch_3.pt")
        return folder / "epoch_3.pt"
    sizes = {"hidden_size": 24, "intermediate_size": 72, "num_hidden_layers": 2}
    vision = {**sizes, "num_attention_heads": 2, "image_size": 40, "patch_size": 8}
    CLIPConfig(vision_config=vision, projection_dim=20).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # As the official repositories have it: code of their own, which is not run.
    config["auto_map"] = {"AutoModel": "modeling_clip.LLM2CLIPModel"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def convert(
    source: Path,
    output: Path,
    *,
    source_format: SourceFormat,
    llm: LLMSource | None = None,
    **config: Any,
) -> Path:
    """Convert with the recorded LLM unless another is given."""
    chosen = ConvertConfig(device="cpu", **config)
    return convert_checkpoint(source, llm or LLM, output, source_format, chosen)


def plan(
    source: Path,
    *,
    source_format: SourceFormat,
    llm: LLMSource | None = None,
    **config: Any,
) -> ConversionPlan:
    """Plan a conversion, which writes nothing."""
    return plan_conversion(
        open_checkpoint(CheckpointSource(source)),
        open_language_model(llm or LLMSource(LLM)),
        find_layout(source_format),
        source_format,
        ConvertConfig(**config),
    )


def convert_family(family: str, folder: Path, **config: Any) -> Path:
    """Convert a family's small checkpoint into `folder / "model"`."""
    source = save_checkpoint(family, folder / "source")
    return convert(source, folder / "model", source_format=FORMAT_OF[family], **config)


def copy_llm(folder: Path, family: str = "llama") -> Path:
    """Copy a recorded LLM, to be changed."""
    return Path(shutil.copytree(LLM2VEC / family, folder))
