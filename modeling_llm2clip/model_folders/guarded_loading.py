"""Load models for inference in a precision; automatic bfloat16 is first checked against float32.

A GPU multiplies bfloat16 about ten times as fast as float32, a CPU with AMX six times, and a model
folder is float32 unless exported in another dtype. Heads (text adapter and projections) are small
and run in float32 next to a tower in bfloat16.
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
# Number of texts, and of images. On a CPU, each 16 take up to half a second in both dtypes.
_NUM_COMPARED = {"cuda": 64, "cpu": 16}
# Memory for the float32 weights, a bfloat16 copy and a batch, as a multiple of the float32 size.
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
    """Load a model onto a device, with the towers in the dtype that `precision` means there.

    On a device that multiplies bfloat16 in hardware, `auto` runs each float32 tower in bfloat16 if
    that keeps its embeddings within a cosine of 0.999; otherwise, `auto` is the stored dtype. They
    are compared with float32 embeddings from the same weights or, if a bfloat16 and a float32 copy
    do not fit into a GPU's memory together, with the folder's golden embeddings. The comparison is
    reported on stderr.

    Args:
        model_class: Class of a whole, text-only or vision-only model.
        folder: A model folder.
        device: Where the model runs.
        precision: `auto`, `float32` or `bfloat16`.
        traits: Traits of the device that decide the dtype; None to read the traits from the device.
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
    return _load_compared(load, folder, traits)


def _load_compared(load: Callable[..., Any], folder: Path, traits: DeviceTraits) -> Any:
    """Load each float32 tower in bfloat16 if that preserves its embeddings, otherwise as stored."""
    size = sum(file.stat().st_size for file in list_model_files(folder))
    processor = LLM2CLIPProcessor.from_pretrained(folder, local_files_only=True)
    number, reference = _NUM_COMPARED[traits.kind], "the same weights in float32"
    embed = partial(_embed_examples, processor=processor, number=number)
    model, golden = None, read_golden(folder)
    if traits.kind == "cpu" or traits.free_bytes >= _ROOM * size:
        model = load()
        expected = embed(model)
    elif golden is not None:
        texts, expected = golden
        embed = partial(compute_golden, processor=processor, texts=texts)
        reference = "the folder's golden embeddings (not enough memory for float32)"
    else:
        _report(
            "Towers run in float32: bfloat16 cannot be checked without golden embeddings or enough "
            "memory for both dtypes."
        )
        return load()
    cast = _keep_heads(load(dtype=torch.bfloat16), folder)
    cosines: dict[str, list[Tensor]] = {}
    for name, rows in embed(cast).items():
        tower = "text_model" if name.startswith("text") else "vision_model"
        cosines.setdefault(tower, []).append(F.cosine_similarity(rows, expected[name].float()))
    least = {tower: float(torch.cat(parts).min()) for tower, parts in cosines.items()}
    kept = [tower for tower, cosine in least.items() if cosine >= LEAST_COSINE]  # none for NaN
    for tower, cosine in least.items():
        _report(
            f"The {tower.removesuffix('_model')} tower runs in "
            f"{'bfloat16' if tower in kept else 'float32'}: the smallest cosine between bfloat16 "
            f"embeddings and {reference} is {cosine:.5f}, at least {LEAST_COSINE} is required."
        )
    if model is None:
        if len(kept) == len(least):
            return cast
        model = load()
    for tower in kept:
        setattr(model, tower, getattr(cast, tower))
    return model


def find_stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype in which a model folder loads."""
    stated = LLM2CLIPConfig.from_pretrained(folder, local_files_only=True).dtype
    if isinstance(stated, torch.dtype):
        return stated
    dtypes = (weight.dtype for weight in open_model_weights(folder).values())
    return next(dtype for dtype in dtypes if dtype.is_floating_point)


def _keep_heads(model: Any, folder: Path) -> Any:
    """Load the stored weights of everything but the towers in float32."""
    weights = open_model_weights(folder)
    for name, weight in model.named_parameters():
        if _OF_HEADS.match(name):
            weight.data = weights[name].read().to(weight.device, torch.float32)
    return model


def _embed_examples(model: Any, processor: LLM2CLIPProcessor, number: int) -> dict[str, Tensor]:
    """Encode the package's example texts and images, before and after projection."""
    data, embeds = find_example_data() / "emoji", {}
    if hasattr(model, "text_model"):
        lines = _choose((data / "captions.jsonl").read_text(encoding="utf-8").splitlines(), number)
        texts = [json.loads(line)["captions"][0] for line in lines]
        embeds["text"] = encode_texts(model, processor, texts, project=False)
    if hasattr(model, "vision_model"):
        images = _choose(sorted((data / "images").glob("*/*.png")), number)
        embeds["image"] = encode_images(model, processor, images, project=False)
    projected = {f"{n} projected": project_stored(model, e, n) for n, e in embeds.items()}
    return embeds | projected


def _choose(items: Sequence[T], number: int) -> Sequence[T]:
    return items[:: len(items) // number][:number]


def _report(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr)
