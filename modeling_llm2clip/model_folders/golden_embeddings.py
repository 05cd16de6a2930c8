"""Golden embeddings: recorded when a model folder is written, and compared later.

Shapes: T texts, D width of the LLM, P `projection_dim`.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.safetensors_files import serialize_tensors
from ..data.sources.json_files import parse_json
from ..encoding.encode import encode_images, encode_texts, project_stored
from ..encoding.precision import float32_as_such
from ..processing_llm2clip import LLM2CLIPProcessor
from .fingerprint import VISION_ENTRY, hash_deciding_files
from .weights import open_model_weights

GOLDEN_FILE = "golden_embeddings.safetensors"
GOLDEN_TEXTS = (
    "a dog",
    "Two red apples lie on a wooden table beside an open window.",
    "Eine Katze schläft auf dem Sofa.",
    "夜の東京タワー",
)
_PARTS = {
    "text_embeds": "tokenizer, LLM, text adapter or text projection",
    "image_embeds": "image processor, vision tower or image projection",
}

# Distances between unit embeddings. On one machine, only the order of summation varies, and
# rounding accumulates over layers. Measured on a CPU with SmolLM2-135M (30 layers) and five texts,
# single, batched and left-padded: at most 7e-6 in float32, 0.02 in float16, 0.14 in bfloat16.
# Different texts were at least 0.67 apart, and attention to padding moved one of them by 0.9.
_SAME_MACHINE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
# Another machine also has different kernels, and may resize images with different library code. In
# half precision, that adds no more than the order of summation (0.03 and 0.14 from float32).
_OTHER_MACHINE = {**_SAME_MACHINE, torch.float32: 1e-3}


def render_golden_images() -> list[Image.Image]:
    """Render two images from formulas, so no file is needed: color ramps and a disc."""
    rows, columns = np.mgrid[0:64, 0:96]
    ramp = np.stack([rows * 4, columns * 2, (rows + columns) % 256], axis=-1) % 256
    disc = np.full((80, 80, 3), 255)
    y, x = np.mgrid[0:80, 0:80]
    disc[(y - 40) ** 2 + (x - 40) ** 2 < 900] = (200, 30, 30)
    return [Image.fromarray(image.astype(np.uint8)) for image in (ramp, disc)]


def compute_golden(
    model: Any,
    processor: LLM2CLIPProcessor,
    texts: Sequence[str] = GOLDEN_TEXTS,
    *,
    caption_embeds: Tensor | None = None,
) -> dict[str, Tensor]:
    """Encode T texts and the two golden images, as float32 of unit length on the CPU.

    Returns `text_embeds` (T, P) and `image_embeds` (2, P); only one of them for a text-only or
    vision-only model. With `caption_embeds` (T, D), the LLM is not run.
    """
    embeddings = {}
    if caption_embeds is not None:
        embeddings["text_embeds"] = project_stored(model, caption_embeds, "text")
    elif hasattr(model, "text_model"):
        embeddings["text_embeds"] = encode_texts(model, processor, texts)
    if hasattr(model, "vision_model"):
        embeddings["image_embeds"] = encode_images(model, processor, render_golden_images())
    return embeddings


def write_golden(
    folder: Path, model: Any, processor: LLM2CLIPProcessor, *, source: Path | None = None
) -> None:
    """Record a model's current embeddings in its folder, with hashes of the folder's files.

    Also records `caption_embeds` (T, D), the LLM's output, so embeddings with another text adapter
    can be computed without the LLM; and a whole model's `logit_scale` (1,), which does not affect
    the embeddings. `source` is the folder of a model with the same LLM, whose recorded
    `caption_embeds` are copied, so the LLM is not run. If `source` has no `caption_embeds`, nothing
    is recorded.
    """
    texts, caption_embeds = list(GOLDEN_TEXTS), None
    if source is not None:
        golden = read_golden(source)
        if golden is None or "caption_embeds" not in golden[1]:
            return
        texts, caption_embeds = golden[0], golden[1]["caption_embeds"]
    try:
        embeddings = compute_golden(model, processor, texts, caption_embeds=caption_embeds)
        if caption_embeds is None and hasattr(model, "text_model"):
            caption_embeds = encode_texts(model, processor, texts, project=False)
    except ValueError as error:
        raise ValueError(
            f"The model was not saved. {error} If training caused this, use the last weights with "
            "finite embeddings."
        ) from error
    if caption_embeds is not None:
        embeddings["caption_embeds"] = caption_embeds
    embeddings |= read_temperature(model)
    if not embeddings.get("logit_scale", torch.zeros(1)).isfinite().all():
        raise ValueError("The model was not saved: its logit_scale is NaN or infinite.")
    files = hash_deciding_files(folder)
    if hasattr(model, "vision_model"):
        files |= hash_deciding_files(folder, of_vision_tower=True)
    content = serialize_tensors(
        {name: embedding.cpu().contiguous() for name, embedding in embeddings.items()},
        {
            "texts": json.dumps(texts, ensure_ascii=False),
            "dtype": str(model.dtype),
            "files": json.dumps(files, sort_keys=True),
        },
    )
    (folder / GOLDEN_FILE).write_bytes(content)


def compare_golden(
    folder: Path,
    model: Any,
    processor: LLM2CLIPProcessor,
    *,
    dtype: torch.dtype | None = None,
    runs_llm: bool = True,
) -> str | None:
    """Compare a model with the embeddings recorded in its folder, and say what was compared.

    The tolerance depends on `dtype`, the dtype of the folder's weights; None for the model's dtype.
    Without `runs_llm`, text embeddings are computed from the recorded caption embeddings. Returns
    None if nothing is recorded for this model. Raises ValueError if embeddings differ by more than
    rounding on another machine.
    """
    golden = read_golden(folder)
    if golden is None or not (runs_llm or "caption_embeds" in golden[1]):
        return None
    texts, recorded = golden
    caption_embeds = None if runs_llm else recorded["caption_embeds"]
    with float32_as_such():
        computed = compute_golden(model, processor, texts, caption_embeds=caption_embeds)
    tolerance = find_tolerance(dtype or model.dtype, other_machine=True)
    errors, largest = [], 0.0
    for name, embeddings in computed.items():
        if name not in recorded or recorded[name].shape != embeddings.shape:
            errors.append(f"{name} was not recorded with shape {tuple(embeddings.shape)}")
            continue
        distances = measure_distances(embeddings, recorded[name])
        row, furthest = int(distances.argmax()), float(distances.max())
        largest = max(largest, furthest)
        if not furthest <= tolerance:
            errors.append(f"{name} moved by {furthest:.1e} in row {row} ({_PARTS[name]})")
    # Text-only and vision-only models have none. It is always saved and loaded in float32.
    for name, value in read_temperature(model).items():
        if name not in recorded:
            errors.append(f"{name} was not recorded")
        elif not torch.allclose(value, recorded[name].float(), atol=1e-6, rtol=0):
            was = float(recorded[name])
            errors.append(f"{name} is {float(value):.4f}, but {was:.4f} was recorded")
    # The LLM's output, which later training copies without checking it.
    llm = recorded.get("caption_embeds")
    if llm is None and "text_embeds" in computed:
        errors.append("caption_embeds was not recorded")
    elif llm is not None and not (
        llm.ndim == 2 and len(llm) == len(texts) and llm.isfinite().all()
    ):
        errors.append(f"caption_embeds {tuple(llm.shape)} has NaN, or not one row per text")
    if errors:
        raise ValueError(
            f"{'; '.join(errors)}; allowed in {dtype or model.dtype}: {tolerance:.2g}. Weights, "
            "settings or code have changed since the folder was written. Restore the folder."
        )
    count = sum(map(len, computed.values()))
    return f"{count} embeddings moved by at most {largest:.1e} (allowed {tolerance:.2g})"


def require_golden(
    folder: Path,
    model: Any,
    processor: LLM2CLIPProcessor,
    *,
    dtype: torch.dtype | None = None,
    runs_llm: bool = True,
    of_vision_tower: bool = False,
) -> None:
    """Refuse to write a new folder from one that differs from its recorded embeddings and files.

    Otherwise, the new folder would record the damaged embeddings and pass all checks. Warns if
    nothing is recorded, because damage cannot be detected. With `of_vision_tower`, neither
    tokenizer nor LLM is read.
    """
    try:
        compared = compare_golden(folder, model, processor, dtype=dtype, runs_llm=runs_llm)
        require_recorded_files(folder, of_vision_tower=of_vision_tower)
        _require_stated_dtype(folder)
    except ValueError as error:
        raise ValueError(
            f"Nothing was written from {folder}, because it fails the check of its golden "
            f"embeddings and recorded files. {error} Run `llm2clip doctor {folder}` for all checks."
        ) from error
    if compared is None:
        warnings.warn(
            f"{folder} has no golden embeddings of this model ({GOLDEN_FILE}), so damage would not "
            "be noticed: a model written from it would pass its checks.",
            stacklevel=3,
        )


def _require_stated_dtype(folder: Path) -> None:
    """Refuse a folder in which some weights are stored in a dtype other than config.json's.

    Such weights would lose precision on loading, or have less precision than config.json states.
    The temperature is float32 in every folder.
    """
    config = LLM2CLIPConfig.from_pretrained(folder, local_files_only=True)
    stated = getattr(config, "dtype", None)
    if stated is None or getattr(config, "quantization_config", None):
        return
    dtypes = Counter(
        tensor.dtype
        for name, tensor in open_model_weights(folder).items()
        if tensor.dtype.is_floating_point and not name.startswith("logit_scale.")
    )
    total = dtypes.total()
    for dtype, count in dtypes.items():
        if dtype != stated:
            names = [str(name).removeprefix("torch.") for name in (stated, dtype)]
            raise ValueError(
                f"config.json states {names[0]}, but {count} of {total} weights are {names[1]}. "
                "Correct the dtype in config.json, or load the model in one dtype and save it "
                "again."
            )


def read_temperature(model: Any) -> dict[str, Tensor]:
    """Return the saved `logit_scale`, (1,) float32, a logarithm; empty for a model without one."""
    scale = getattr(model, "logit_scale", None)
    return {} if scale is None else {"logit_scale": scale.log_scale.detach().float().cpu()}


def read_golden(folder: Path) -> tuple[list[str], dict[str, Tensor]] | None:
    """Read the recorded texts, and the embeddings by name; None if nothing is recorded."""
    if not (folder / GOLDEN_FILE).is_file():
        return None
    with _open_golden(folder) as file:
        texts = parse_json(file.metadata()["texts"])
        return texts, {name: file.get_tensor(name) for name in file.keys()}


def require_recorded_files(folder: Path, *, of_vision_tower: bool = False) -> bool:
    """Refuse a folder with files that have changed since its golden embeddings were computed.

    Embeddings of a few texts do not reveal every change: an edited tokenizer may produce the same
    ids for these texts. Returns False if no file hashes are recorded.
    """
    if not (folder / GOLDEN_FILE).is_file():
        return False
    with _open_golden(folder) as file:
        recorded = parse_json(file.metadata().get("files", "null"))
        if recorded is None:
            return False
        recorded = dict(recorded)
    hashes = hash_deciding_files(folder, of_vision_tower=of_vision_tower)
    names = {*hashes} if of_vision_tower else {*hashes, *recorded} - {VISION_ENTRY}
    if changed := sorted(name for name in names if hashes.get(name) != recorded.get(name)):
        raise ValueError(
            f"{', '.join(changed)}: changed since the folder was written, so some inputs may get "
            "different embeddings. Restore these files. If the change is intended, delete "
            f"{GOLDEN_FILE} and rewrite the folder with llm2clip export."
        )
    return True


def find_tolerance(dtype: torch.dtype, *, other_machine: bool = False) -> float:
    """Return the largest distance between two computations of a unit embedding due to rounding."""
    table = _OTHER_MACHINE if other_machine else _SAME_MACHINE
    return table.get(dtype, table[torch.float32])


def measure_distances(first: Tensor, second: Tensor) -> Tensor:
    """Return the distance of each row of (B, P) from its counterpart, (B,) float32.

    NaN becomes infinity.
    """
    distances: Tensor = (first.float() - second.float()).norm(dim=1).nan_to_num(nan=torch.inf)
    return distances


@contextmanager
def _open_golden(folder: Path) -> Iterator[Any]:
    """Open the recorded embeddings; report any error in them or their metadata as damage."""
    path = folder / GOLDEN_FILE
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}). Restore it. If the model is known to be intact, "
            "delete the file and rewrite the folder with llm2clip export."
        ) from error
