"""A tiny dual encoder, the model that keeps its projection, and its stores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aligning import Prepared, Run, write_color_data
from safetensors.torch import load_file, save_file
from tiny import tiny_llm, tiny_tokenizer
from tiny_encoders import save_tiny_encoder

from modeling_llm2clip.building.build_model import build_model
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.model_folders.golden_embeddings import GOLDEN_FILE
from modeling_llm2clip.training.alignment.align import align

EXTRACTED = ExtractConfig(store_dtype="float32", device="cpu", show_progress=False)
LONG = "red and green " * 60  # no teacher reads it to the end
STAGE: dict[str, Any] = {"device": "cpu", "max_steps": 0, "inherit_steps": 40}


@dataclass(frozen=True)
class Inheriting(Prepared):
    """With a dual encoder, whose projection the model keeps, and its store of captions."""

    clip: Path
    teacher: Path

    def align(self, output: Path, *, resume: bool = False, **changed: Any) -> Run:
        stores = {"caption_store": self.captions, "image_store": self.images}
        stores |= {name: changed.pop(name) for name in (*stores, "inherit_from") if name in changed}
        align(
            changed.pop("model", self.model), self.records, output,
            AlignConfig(**{**STAGE, **changed}),
            resume=resume, **{"inherit_from": self.teacher, **stores},
        )  # fmt: skip
        return Run(output)


def build(vision: Any, output: Path, **changed: Any) -> Path:
    tokenizer = tiny_tokenizer()
    options = {"keep_projection": True, "text_adapter_layers": 2, "max_text_length": 64, **changed}
    return build_model(
        vision,
        (tiny_llm(vocabulary_size=len(tokenizer)), tokenizer),
        output,
        BuildConfig(prompt="llama-3", device="cpu", **options),
    )


def prepare(
    folder: Path, family: str, *, count: int, num_views: int = 0, has_stores: bool = True
) -> Inheriting:
    clip = save_tiny_encoder(family, folder / "clip")
    data = write_color_data(folder / "data", count=count)
    lines = (data / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    lines[-1] = json.dumps({**json.loads(lines[-1]), "long_captions": [LONG]})
    if num_views:
        long = "It is number {}. It is a plane. It has one color. Nothing else is on it."
        lines = [
            json.dumps({**json.loads(line), "long_captions": [long.format(number)]})
            for number, line in enumerate(lines)
        ]
    config = replace(EXTRACTED, sentence_views=num_views)
    (data / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model, records = build(clip, folder / "model"), load_records(data)
    if has_stores:
        extract(model, records, folder / "captions", config, modality="text")
        extract(model, records, folder / "images", EXTRACTED, modality="image")
    extract(clip, records, folder / "teacher", config, modality="text")
    return Inheriting(
        data, model, folder / "captions", folder / "images", clip=clip, teacher=folder / "teacher"
    )


def copy_into_other_spaces(model: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Copy the model with another image projection, then vision tower; yield the error, and it."""
    for name, message in (
        ("visual_projection.weight", "--keep-projection"),
        ("vision_model.post_layernorm.weight", "does not match the vision tower"),
    ):
        copy = shutil.copytree(model, folder / name)
        (copy / GOLDEN_FILE).unlink()
        weights = load_file(copy / "model.safetensors")
        weights[name] += 1
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        yield message, copy
