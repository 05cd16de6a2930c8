"""Tiny models that many tests share and none may change, and the parts of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from packaging.version import Version
from tiny import JOINED, LLM_FAMILIES, VISION_FAMILIES, tiny_images, tiny_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor

PAIRS = [(vision, "llama") for vision in (*VISION_FAMILIES, JOINED)] + [
    ("clip", llm) for llm in LLM_FAMILIES if llm != "llama"
]
CAPTIONS = ["a dog", "two red apples on a wooden table by the window", "x"]
INSTRUCTION = "Instruct: find the image. Query: "
# Sums of float32 numbers in another order, over two layers, for embeddings of unit length.
ROUNDING = 1e-5

# Families that differ most from each other, which the default suite runs. CI runs all.
COMMON = {
    "clip",
    JOINED,
    "siglip2",
    "dinov2",
    "timm",
    "eva02",
    "llama",
    "qwen3",
    "gemma3_text",
    "phi",
}


def mostly_slow(families: Iterable[str], common: Iterable[str] = COMMON) -> list[Any]:
    """Mark parameters of a test as slow, but for the common ones."""
    slow = pytest.mark.slow
    return [name if name in common else pytest.param(name, marks=slow) for name in families]


every_pair = pytest.mark.parametrize(
    ("vision", "llm"),
    [
        pytest.param(*pair, marks=() if COMMON.issuperset(pair) else pytest.mark.slow)
        for pair in PAIRS
    ],
    ids=["-".join(pair) for pair in PAIRS],
)
every_vision = pytest.mark.parametrize("vision", mostly_slow((*VISION_FAMILIES, JOINED)))
# `pytest -m gpu` runs the second device, which the default suite skips.
every_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
one_process_writes = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "should_save_on_this_rank"),
    reason="this version of transformers writes in every process",
)
every_llm = pytest.mark.parametrize("llm", mostly_slow(LLM_FAMILIES))


@cache
def shared_model(vision: str = "clip", llm: str = "llama") -> tuple[Any, Any]:
    """A model and its processor that no test may change."""
    return tiny_model(vision, llm)


def skip_where_names_are_garbled(vision: str) -> None:
    """Skip a test that saves a tower which this version of transformers cannot save in a model."""
    if vision == "dinov3_vit" and Version(transformers_version) < Version("5.9"):
        pytest.skip("transformers before 5.9 saves a DINOv3 inside a model under wrong names")


def fresh_processor() -> LLM2CLIPProcessor:
    """The processor of the shared model, whose counts a test may change."""
    shared = shared_model()[1]
    return LLM2CLIPProcessor(shared.image_processor, shared.tokenizer, shared.max_text_length)


@cache
def shared_batch(vision: str = "clip", llm: str = "llama") -> dict[str, Tensor]:
    """Three captions of different lengths and three images of different colors."""
    processor = shared_model(vision, llm)[1]
    return dict(processor(text=CAPTIONS, images=tiny_images(3)))


def take(batch: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: batch[name] for name in names}


def move(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def texts_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return take(batch, "input_ids", "attention_mask")


def images_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in texts_of(batch)}


def encode(model: Any, batch: Any, **given: Any) -> Tensor:
    """Embeddings of the images of a batch, which may have captions too."""
    images = {name: value for name, value in batch.items() if "input_ids" not in batch}
    with torch.no_grad():
        return model.get_image_features(**(images or images_of(batch)), **given).pooler_output


def first_position_moves_by(model: LLM2CLIPModel, batch: dict[str, Tensor], row: int) -> float:
    """Return by how much the first hidden state changes if the last real token does."""
    changed = {name: value.clone() for name, value in batch.items()}
    last = int(batch["attention_mask"][row].sum()) - 1
    changed["input_ids"][row, last] = (batch["input_ids"][row, last] + 7) % 300
    with torch.no_grad():
        before, after = (
            model.text_model(**inputs, use_cache=False).last_hidden_state[row, 0]
            for inputs in (batch, changed)
        )
    return float((before - after).abs().max())
