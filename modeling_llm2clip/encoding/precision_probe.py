"""Finds out, on the model at hand, whether a lower precision is both faster and true.

Which layers are true is a question of embeddings, and has one answer. Whether that pays is a
question of time, and noisy: it is asked only by `choose_precision` and `probe_precisions`, once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.atomic_files import hash_json
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .layers import list_text_layers
from .precision import LowerPrecision
from .recorded_precision import PRECISION_FILE, read_precision, write_precision
from .text_encoding import encode_captions

CANDIDATES = (torch.bfloat16, torch.float16)
LEAST_COSINE = 0.999
LEAST_SPEEDUP = 1.1
# A probe sees a few dozen captions of every length. The worst of thousands lost not twice as much.
LEAST_COSINE_OF_PROBE = 1 - (1 - LEAST_COSINE) / 2
_ROUNDS = 3
_SHARE_OF_FIRST_LOOK = 8  # some processors take ten times as long in float16


@dataclass(frozen=True)
class PrecisionTrial:
    """What a lower precision did to the embeddings of a sample of captions.

    Attributes:
        precision: the dtype, from the earliest layer on from which it is true.
        speedup: times as fast as the model's own precision, median of three rounds; the rounding
            of weights, once for all captions, counts more here than for many captions.
        min_cosine: of the caption that suffered most; NaN when an embedding is not finite.
    """

    precision: LowerPrecision
    speedup: float
    min_cosine: float

    @property
    def pays(self) -> bool:
        """Faster by a tenth at least, and no caption of the probe below a cosine of 0.9995."""
        return self.speedup >= LEAST_SPEEDUP and self.min_cosine >= LEAST_COSINE_OF_PROBE


def choose_precision(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    captions: Sequence[str],
) -> LowerPrecision | None:
    """Return what was chosen for this model; if nothing was yet, measure, and record it for good.

    It takes minutes where a candidate is slow, and is written into the model's folder, for
    `recorded_precision.read_precision` to read at every later load.

    Args:
        model: loaded from a folder.
        captions: as `probe_precisions`.
    Returns: the fastest precision that pays, or None to stay with the model's own.
    Raises: ValueError when the model is of no folder, or the record in it of another model.
    """
    folder = Path(model.name_or_path or "")
    if not model.name_or_path or not folder.is_dir():
        raise ValueError(
            f"The model was loaded from {model.name_or_path!r}, which is no folder that the choice "
            "could be recorded in. Save it into a folder, and load it from there."
        )
    if not (folder / PRECISION_FILE).is_file():
        trials = probe_precisions(model, processor, captions)
        write_precision(folder, pick_fastest(trials), _describe(model, captions, trials))
    return read_precision(folder)


def pick_fastest(trials: Sequence[PrecisionTrial]) -> LowerPrecision | None:
    """Pick the fastest precision that pays, or None where none does."""
    paying = [trial for trial in trials if trial.pays]
    return max(paying, key=lambda trial: trial.speedup).precision if paying else None


def _describe(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    captions: Sequence[str],
    trials: Sequence[PrecisionTrial],
) -> dict[str, Any]:
    """What a choice rests on, for people."""
    return {
        "trials": [
            {
                "dtype": str(trial.precision.dtype).removeprefix("torch."),
                "first_layer": trial.precision.first_layer,
                "speedup": round(trial.speedup, 3),
                "min_cosine": round(trial.min_cosine, 6),
                "pays": trial.pays,
            }
            for trial in trials
        ],
        "captions": {"count": len(captions), "sha256": hash_json(list(captions))},
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def find_true_layers(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    captions: Sequence[str],
    dtype: torch.dtype,
) -> LowerPrecision | None:
    """Find the earliest layer from which on a lower precision is true, by embeddings alone.

    Nothing is timed: the same model, captions and machine give the same answer.

    Args:
        captions: as `probe_precisions`.
    Returns: None when not even the last layer alone is true.
    """
    precision = _find_first_true_layer(model, processor, captions, dtype)
    found, own = (
        encode_captions(model, processor, captions, precision=chosen).caption_embeds
        for chosen in (precision, None)
    )
    return precision if _min_cosine(found, own) >= LEAST_COSINE_OF_PROBE else None


def probe_precisions(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    captions: Sequence[str],
) -> list[PrecisionTrial]:
    """Try and time every candidate on some captions, in turns with the model's own precision.

    Args:
        captions: a few dozen like those to be encoded, the longest among them: massive
            activations, which lower precision breaks, show in some captions and not in others.
    Returns: a trial for each dtype. One that gains nothing in the whole LLM is not searched for
        the layer from which on it is true: fewer layers gain less.
    """
    return [_try(model, processor, captions, dtype) for dtype in CANDIDATES]


def pick_probe_captions(captions: Sequence[str], *, count: int = 64) -> list[str]:
    """Pick captions of every length, the shortest and the longest among them.

    Raises: ValueError for a count below 2.
    """
    if count < 2:
        raise ValueError(f"count={count}: the shortest and the longest caption are two already.")
    ordered = sorted(set(captions), key=len)
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def _try(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    captions: Sequence[str],
    dtype: torch.dtype,
) -> PrecisionTrial:
    whole = _measure(model, processor, captions[::_SHARE_OF_FIRST_LOOK], LowerPrecision(dtype))
    if whole.speedup < LEAST_SPEEDUP:
        return whole
    precision = _find_first_true_layer(model, processor, captions, dtype)
    return _measure(model, processor, captions, precision)


def _measure(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    captions: Sequence[str],
    precision: LowerPrecision,
) -> PrecisionTrial:
    reference, own_time = _encode_timed(model, processor, captions, None)
    embeddings, seconds = _encode_timed(model, processor, captions, precision)
    return PrecisionTrial(precision, own_time / seconds, _min_cosine(embeddings, reference))


def _find_first_true_layer(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    captions: Sequence[str],
    dtype: torch.dtype,
) -> LowerPrecision:
    """Search by halves: the fewer layers run in a lower precision, the less is lost."""
    reference = encode_captions(model, processor, captions).caption_embeds
    first, last = 0, len(list_text_layers(model)) - 1
    while first < last:
        tried = (first + last) // 2 if first else 0  # the whole LLM is the likeliest
        precision = LowerPrecision(dtype, tried)
        embeddings = encode_captions(model, processor, captions, precision=precision).caption_embeds
        if _min_cosine(embeddings, reference) >= LEAST_COSINE_OF_PROBE:
            last = tried
        else:
            first = tried + 1
    return LowerPrecision(dtype, last)


def _encode_timed(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    captions: Sequence[str],
    precision: LowerPrecision | None,
) -> tuple[Tensor, float]:
    encode_captions(model, processor, captions[:2], precision=precision)  # warms up
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        # The embeddings come back to the CPU, so the work is done when this returns.
        embeddings = encode_captions(model, processor, captions, precision=precision).caption_embeds
        seconds.append(time.perf_counter() - started)
    return embeddings, statistics.median(seconds)


def _min_cosine(embeddings: Tensor, reference: Tensor) -> float:
    return float(F.cosine_similarity(embeddings.double(), reference.double()).min())
