"""Embeddings recorded when a model folder was written, against which any later load is compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from ..data.safetensors_files import serialize_tensors
from ..encoding.encode import encode_images, encode_texts, project_captions
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .fingerprint import hash_deciding_files

GOLDEN_FILE = "golden_embeddings.safetensors"
GOLDEN_TEXTS = (
    "a dog",
    "Two red apples lie on a wooden table beside an open window.",
    "Eine Katze schläft auf dem Sofa.",
    "夜の東京タワー",
)


# Distances of unit embeddings. One machine, another order of sums: rounding that adds up over
# layers. Measured on a CPU with SmolLM2-135M (30 layers) and five texts, alone, batched, padded
# left: at most 7e-6 in float32, 0.02 in float16, 0.14 in bfloat16. Different texts were at least
# 0.67 apart, and attention to padding moved one of them by 0.9.
_SAME_MACHINE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
# Another machine has other kernels too, and may resize images by other library code; in half
# precision that costs no more than another order of sums (0.03 and 0.14 from float32).
_OTHER_MACHINE = {**_SAME_MACHINE, torch.float32: 1e-3}


def render_golden_images() -> list[Image.Image]:
    """Render two images from formulas, so that no file is needed: color ramps, and a disc."""
    rows, columns = np.mgrid[0:64, 0:96]
    ramp = np.stack([rows * 4, columns * 2, (rows + columns) % 256], axis=-1) % 256
    disc = np.full((80, 80, 3), 255)
    y, x = np.mgrid[0:80, 0:80]
    disc[(y - 40) ** 2 + (x - 40) ** 2 < 900] = (200, 30, 30)
    return [Image.fromarray(image.astype(np.uint8)) for image in (ramp, disc)]


def compute_golden(
    model: Any, processor: LLM2CLIPProcessor, texts: Sequence[str] = GOLDEN_TEXTS
) -> dict[str, Tensor]:
    """Encode texts and the golden images.

    Args:
        model: A whole, text-only or vision-only model.
        processor: Its processor.
        texts: T texts.

    Returns:
        `text_embeds` (T, P) and `image_embeds` (2, P), float32 of unit length on the CPU; only one
        of them for a text-only or vision-only model.
    """
    embeddings = {}
    if hasattr(model, "text_model"):
        embeddings["text_embeds"] = encode_texts(model, processor, texts)
    if hasattr(model, "vision_model"):
        embeddings["image_embeds"] = encode_images(model, processor, render_golden_images())
    return embeddings


def write_golden(folder: Path, model: Any, processor: LLM2CLIPProcessor) -> None:
    """Record the embeddings that a model gives now, beside its weights, and hashes of its files.

    Also `caption_embeds` (T, D), the LLM's part, so that the embeddings of another text adapter can
    be recorded without the LLM; and of a whole model `logit_scale` (1,), which no embedding shows.

    Args:
        folder: Model folder, complete but for its card.
        model: A whole, text-only or vision-only model.
        processor: Its processor.

    Raises:
        ValueError: An embedding has NaN or infinity.
    """
    with _naming_the_save():
        embeddings = compute_golden(model, processor)
        if hasattr(model, "text_model"):
            embeddings["caption_embeds"] = encode_texts(
                model, processor, GOLDEN_TEXTS, project=False
            )
    _save(folder, {**embeddings, **read_temperature(model)}, list(GOLDEN_TEXTS), model.dtype)


def renew_golden(
    source: Path, folder: Path, model: LLM2CLIPModel, processor: LLM2CLIPProcessor
) -> bool:
    """Record a model's embeddings without running its LLM.

    Args:
        source: Folder of a model with the same LLM, where its caption embeddings are recorded.
        folder: Where to record.
        model: Its text adapter, projections and vision tower are run.
        processor: Its processor.

    Returns:
        Whether they were recorded: False where the source has no caption embeddings.

    Raises:
        ValueError: An embedding has NaN or infinity.
    """
    golden = read_golden(source)
    if golden is None or "caption_embeds" not in golden[1]:
        return False
    texts, recorded = golden
    caption_embeds = recorded["caption_embeds"]
    with _naming_the_save():
        embeddings = {
            "text_embeds": project_captions(model, caption_embeds),
            "image_embeds": encode_images(model, processor, render_golden_images()),
            "caption_embeds": caption_embeds,
        }
    _save(folder, {**embeddings, **read_temperature(model)}, texts, model.dtype)
    return True


def read_temperature(model: Any) -> dict[str, Tensor]:
    """Return the temperature as it is saved.

    Args:
        model: A whole, text-only or vision-only model.

    Returns:
        `logit_scale` (1,) float32, a logarithm; nothing of a text-only or vision-only model.
    """
    scale = getattr(model, "logit_scale", None)
    return {} if scale is None else {"logit_scale": scale.log_scale.detach().float().cpu()}


def read_golden(folder: Path) -> tuple[list[str], dict[str, Tensor]] | None:
    """Read the recorded texts and embeddings.

    Args:
        folder: Model folder.

    Returns:
        The texts, and name → embeddings; None where the folder has none.
    """
    path = folder / GOLDEN_FILE
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        texts = json.loads(file.metadata()["texts"])
        return texts, {name: file.get_tensor(name) for name in file.keys()}


def find_changed_files(folder: Path) -> list[str] | None:
    """Find the files that differ from those that the recorded embeddings were computed with.

    Embeddings of a few texts do not show every change: an edited tokenizer may give them the same
    ids.

    Args:
        folder: Model folder.

    Returns:
        Names of files that were changed, added or removed, and `weights`; None where nothing was
        recorded.

    Raises:
        ValueError: The folder has no weights, or a file is not valid JSON.
    """
    path = folder / GOLDEN_FILE
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        recorded = json.loads(file.metadata().get("files", "null"))
    if recorded is None:
        return None
    found = hash_deciding_files(folder)
    return sorted(n for n in {*found, *recorded} if found.get(n) != recorded.get(n))


def find_tolerance(dtype: torch.dtype, *, other_machine: bool = False) -> float:
    """Return the largest harmless distance between two computations of a unit embedding.

    Args:
        dtype: Dtype that they are computed in.
        other_machine: Whether they are computed on two machines.
    """
    table = _OTHER_MACHINE if other_machine else _SAME_MACHINE
    return table.get(dtype, table[torch.float32])


def measure_distances(first: Tensor, second: Tensor) -> Tensor:
    """Return the distance of each row from its counterpart, (B,) float32; NaN becomes infinite.

    Args:
        first: (B, P) embeddings.
        second: (B, P) embeddings.
    """
    distances: Tensor = (first.float() - second.float()).norm(dim=1).nan_to_num(nan=torch.inf)
    return distances


@contextmanager
def _naming_the_save() -> Iterator[None]:
    """Say of broken embeddings that the model is therefore not saved."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"The model is not saved. {error} After a training, take the last weights that give "
            "finite embeddings."
        ) from error


def _save(
    folder: Path, embeddings: dict[str, Tensor], texts: list[str], dtype: torch.dtype
) -> None:
    if not embeddings.get("logit_scale", torch.zeros(1)).isfinite().all():
        raise ValueError("The model is not saved: its logit_scale has NaN or infinity.")
    content = serialize_tensors(
        {name: embedding.cpu().contiguous() for name, embedding in embeddings.items()},
        {
            "texts": json.dumps(texts, ensure_ascii=False),
            "dtype": str(dtype),
            "files": json.dumps(hash_deciding_files(folder), sort_keys=True),
        },
    )
    (folder / GOLDEN_FILE).write_bytes(content)
