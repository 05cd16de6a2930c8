"""Rows of models: folders of models and of their towers, checkpoints of others, options in YAML.

A number in a configuration may be another model's, so that refusals alone are judged.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import converting
import torch
import yaml
from tiny import draw_noise, tiny_llm, tiny_model
from tiny_embedders import tiny_embedder
from tiny_encoders import save_tiny_encoder
from tiny_folders import save_tiny_llm, save_tiny_vision

from faults.damage import Target, anything, call
from modeling_llm2clip.__main__ import LINE
from modeling_llm2clip.cli.command import parse
from modeling_llm2clip.configs.config_fields import read_config
from modeling_llm2clip.configs.train_config import TrainConfig
from modeling_llm2clip.encoding.dual_encoder import DualEncoder, DualEncoderProcessor
from modeling_llm2clip.model_folders.model_card import CardData, CardResult, read_card_data
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.model_folders.weights import open_weights

_OPTIONS = {"batch_size": 4, "rows_per_shard": 512, "device": "cpu"}


def write_model(folder: Path) -> Path:
    result = CardResult("retrieval", "coco (en)", {"i2t_R@1": 0.5}, intervals={"i2t_R@1": (0, 1)})
    card = CardData(license="mit", training_data=("hub:owner/name", "mine"), results=(result,))
    return save_model(*tiny_model(), folder / "model", instructions={"query": "Find: "}, card=card)


def use_model(path: Path) -> object:
    model, processor = load_model(path, device="cpu")
    batch = processor(text=["a dog"], images=[draw_noise()])
    return [tuple(embeds.shape) for embeds in model(**batch)[:2]]


def write_towers(folder: Path, **more: Callable[[Path], object]) -> Path:
    """Write towers into folders whose names are no plain words: messages have the last part."""
    parts: dict[str, Callable[[Path], object]] = {
        "vision_tower": save_tiny_vision, "text_tower": save_tiny_llm,
    }  # fmt: skip
    for name, write in {**parts, **more}.items():
        write(folder / "towers" / name)
    return folder / "towers"


def load_dual_encoder(path: Path) -> object:
    return DualEncoder(path, DualEncoderProcessor(path), torch.device("cpu")).embedding_dim


def save_lora(folder: Path) -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian")
    model: Any = peft.get_peft_model(tiny_llm(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.01)
    model.save_pretrained(str(folder))


def save_embedder(folder: Path) -> None:
    tiny_embedder(folder)


def build(path: Path, *words: str, text: str = "text_tower", prompt: str = "llama-3") -> object:
    output = path.parent / "built"
    shutil.rmtree(output, ignore_errors=True)
    where = [word.format(path=path) for word in words]
    return call("build", path / "vision_tower", path / text, output, "--prompt", prompt,
                "--device", "cpu", *where)  # fmt: skip


def read_weights(path: Path) -> object:
    return {
        name: hashlib.sha256(tensor.read().numpy().tobytes()).hexdigest()
        for name, tensor in open_weights(path).items()
    }


def plan_conversion(path: Path, *, family: str) -> object:
    return len(converting.plan(path, source_format=converting.FORMAT_OF[family]).weights)


def write_llm2vec(folder: Path) -> Path:
    save_tiny_vision(folder / "towers" / "vision_tower")
    converting.copy_llm(folder / "towers" / "text_tower")
    return folder / "towers"


def write_yaml(folder: Path, *, content: dict[str, Any]) -> Path:
    (folder / "options.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder / "options.yaml"


def parse_options(path: Path) -> object:
    parse(LINE, ["extract", "model", "data", "store", "--modality", "text", "--config", str(path)])
    return "parsed"


_RECIPE: dict[str, Any] = {
    "vision_model": "vision", "text_model": "llm", "data": "data", "output": "output",
    "build": {"prompt": "none", "projection_dim": 16}, "align": {"max_steps": 6},
    "finetune": {"max_steps": 4, "num_held_out": 4}, "extract": {"rows_per_shard": 16},
}  # fmt: skip
_JSON = ("*.json",)

TARGETS = (
    Target("model", write_model, use_model, anything, files=_JSON),
    Target("checked model", write_model, partial(call, "doctor", codes=(0, 1)), anything),
    Target("card", write_model, read_card_data, anything, files=("README.md",)),
    Target("towers", write_towers, build, anything, files=_JSON),
    Target("lora", partial(write_towers, lora=save_lora),
           lambda path: build(path, "--lora", "{path}/lora"), anything,
           files=("adapter*", "README.md")),
    Target("embedder", partial(write_towers, text_tower=save_embedder),
           partial(build, text="text_tower/embedder", prompt="own"), anything, files=_JSON),
    Target("dual encoder", lambda folder: save_tiny_encoder("clip", folder / "clip"),
           load_dual_encoder, anything, files=_JSON),
    Target("checkpoint", partial(converting.save_checkpoint, "openai"), read_weights,
           ways=("bytes",)),
    Target("fields of a checkpoint", partial(converting.save_checkpoint, "openai"),
           partial(plan_conversion, family="openai"), anything, ways=("fields",)),
    Target("checkpoint of the Hub",
           lambda folder: converting.save_checkpoint("hub_clip", folder / "checkpoint"),
           partial(plan_conversion, family="hub_clip"), anything),
    Target("llm2vec", write_llm2vec, partial(build, prompt="llama-3"), anything, files=_JSON),
    Target("recipe", partial(write_yaml, content=_RECIPE),
           lambda path: read_config(path, TrainConfig), anything),
    Target("options", partial(write_yaml, content=_OPTIONS), parse_options, anything),
)  # fmt: skip
