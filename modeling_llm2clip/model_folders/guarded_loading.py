"""Loads models for inference in a precision; bfloat16 that nobody asked for is compared first.

A GPU multiplies bfloat16 about ten times as fast as float32, and a model folder is float32 unless
it was exported otherwise. Heads are small, and always run in float32 on a GPU.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.records.record_loading import find_example_data
from ..encoding.encode import encode_images, encode_texts, project_stored
from ..encoding.precision import DeviceTraits, choose_tower_dtype, load_on_device
from ..loading_llm2clip import list_model_files
from ..processing_llm2clip import LLM2CLIPProcessor
from .golden_embeddings import compute_golden, read_golden
from .weights import open_model_weights

T = TypeVar("T")

LEAST_COSINE = 0.999
_NUM_COMPARED = 64  # texts, and as many images
# Memory for the float32 weights, those in bfloat16 beside them, and a batch, in sizes of the first.
_ROOM = 1.75
_OF_HEADS = re.compile(r"(?!(text|vision)_model\.)|text_model\.pooled_dense\.")


def load_in_precision(
    model_class: Any,
    folder: Path,
    device: torch.device,
    precision: str = "auto",
    *,
    traits: DeviceTraits | None = None,
    **options: Any,
) -> Any:
    """Load a model to a device, with its towers in the dtype that a precision means there.

    On a CPU, `auto` is the stored dtype. Float32 towers that a GPU would run in bfloat16 stay in
    float32 unless bfloat16 keeps the embeddings of texts and images to a cosine of 0.999: those
    that the same weights give in float32, or, where these do not fit beside, the golden ones of the
    folder. stderr gets what was compared.

    Args:
        model_class: Whole, text-only or vision-only model.
        folder: A model folder.
        device: Where the model runs.
        precision: `auto`, `float32` or `bfloat16`.
        traits: What decides; None to read it from the device.
        options: Further arguments of `from_pretrained`.
    """
    traits = traits or DeviceTraits.read(device)
    stored = find_stored_dtype(folder)
    dtype, is_compared = choose_tower_dtype(precision, traits, stored)
    load = partial(load_on_device, model_class, folder, device, **options)
    if dtype == stored and traits.kind != "cuda":
        return load()
    if not is_compared:
        return _keep_heads(load(dtype=dtype), folder)
    return _load_compared(load, folder, traits.free_bytes)


def _load_compared(load: Callable[..., Any], folder: Path, free_bytes: int) -> Any:
    """Load float32 towers in bfloat16 if that keeps their embeddings, and otherwise as stored."""
    size = sum(file.stat().st_size for file in list_model_files(folder))
    processor = LLM2CLIPProcessor.from_pretrained(folder, local_files_only=True)
    embed, beside = partial(_embed_examples, processor=processor), "the same weights in float32"
    model, golden = None, read_golden(folder)
    if free_bytes >= _ROOM * size:
        model = load()
        expected = embed(model)
    elif golden is not None:
        texts, expected = golden
        embed = partial(compute_golden, processor=processor, texts=texts)
        beside = "the golden embeddings of the folder, because memory has no room for float32,"
    else:
        _say("float32: memory has no room to compare bfloat16 with it, nor has the folder golden "
             "embeddings")  # fmt: skip
        return load()
    cast = _keep_heads(load(dtype=torch.bfloat16), folder)
    least = min(
        float(F.cosine_similarity(rows, expected[name].float()).min())
        for name, rows in embed(cast).items()
    )
    is_close = least >= LEAST_COSINE  # False for NaN
    _say(
        f"{'bfloat16' if is_close else 'float32'}: the smallest cosine of embeddings in bfloat16 "
        f"with {beside} is {least:.5f}, and {LEAST_COSINE} is required"
    )
    if is_close:
        return cast
    return load() if model is None else model


def find_stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype in which a model folder loads."""
    stated = LLM2CLIPConfig.from_pretrained(folder, local_files_only=True).dtype
    if isinstance(stated, torch.dtype):
        return stated
    dtypes = (weight.dtype for weight in open_model_weights(folder).values())
    return next(dtype for dtype in dtypes if dtype.is_floating_point)


def _keep_heads(model: Any, folder: Path) -> Any:
    """Give everything but the towers its stored weights in float32."""
    weights = open_model_weights(folder)
    for name, weight in model.named_parameters():
        if _OF_HEADS.match(name):
            weight.data = weights[name].read().to(weight.device, torch.float32)
    return model


def _embed_examples(model: Any, processor: LLM2CLIPProcessor) -> dict[str, Tensor]:
    """Encode texts and images that come with the package, by tower and as they are compared."""
    data, embeds = find_example_data() / "emoji", {}
    if hasattr(model, "text_model"):
        lines = _choose((data / "captions.jsonl").read_text(encoding="utf-8").splitlines())
        texts = [json.loads(line)["captions"][0] for line in lines]
        embeds["text"] = encode_texts(model, processor, texts, project=False)
    if hasattr(model, "vision_model"):
        images = _choose(sorted((data / "images").glob("*/*.png")))
        embeds["image"] = encode_images(model, processor, images, project=False)
    projected = {f"{n} projected": project_stored(model, e, n) for n, e in embeds.items()}
    return embeds | projected


def _choose(items: Sequence[T]) -> Sequence[T]:
    return items[:: len(items) // _NUM_COMPARED][:_NUM_COMPARED]


def _say(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(f"Towers run in {text}.", file=sys.stderr)
