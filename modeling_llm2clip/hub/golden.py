"""Vectors recorded when a checkpoint was written, against which any later load is compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor

GOLDEN_FILE = "golden_vectors.safetensors"
GOLDEN_TEXTS = (
    "a dog",
    "Two red apples lie on a wooden table beside an open window.",
    "Eine Katze schläft auf dem Sofa.",
    "夜の東京タワー",
)


def draw_golden_pictures() -> list[Image.Image]:
    """Two pictures from formulas, so that no file is needed: colour ramps, and a disc."""
    rows, columns = np.mgrid[0:64, 0:96]
    ramp = np.stack([rows * 4, columns * 2, (rows + columns) % 256], axis=-1) % 256
    disc = np.full((80, 80, 3), 255)
    y, x = np.mgrid[0:80, 0:80]
    disc[(y - 40) ** 2 + (x - 40) ** 2 < 900] = (200, 30, 30)
    return [Image.fromarray(picture.astype(np.uint8)) for picture in (ramp, disc)]


@torch.inference_mode()
def compute_golden_vectors(
    model: LLM2CLIPModel, processor: LLM2CLIPProcessor, texts: Sequence[str] = GOLDEN_TEXTS
) -> dict[str, Tensor]:
    """Encode texts and the golden pictures: `text_embeds` (T, P), `image_embeds` (2, P)."""
    inputs = processor(text=list(texts), images=draw_golden_pictures()).to(model.device)
    output = model(**inputs)
    assert output.text_embeds is not None and output.image_embeds is not None
    return {"text_embeds": output.text_embeds.cpu(), "image_embeds": output.image_embeds.cpu()}


def write_golden_vectors(folder: Path, model: LLM2CLIPModel, processor: LLM2CLIPProcessor) -> None:
    """Record what this model gives now, beside its weights."""
    vectors = {k: v.contiguous() for k, v in compute_golden_vectors(model, processor).items()}
    texts = json.dumps(GOLDEN_TEXTS, ensure_ascii=False)
    save_file(vectors, folder / GOLDEN_FILE, metadata={"texts": texts, "dtype": str(model.dtype)})


def read_golden_vectors(folder: Path) -> tuple[list[str], dict[str, Tensor]] | None:
    """Read the recorded texts and vectors; None where the folder has none."""
    path = folder / GOLDEN_FILE
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        texts = json.loads(file.metadata()["texts"])
        return texts, {name: file.get_tensor(name) for name in file.keys()}
