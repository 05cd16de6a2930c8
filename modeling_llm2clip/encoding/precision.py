"""Finds out, on the model at hand, whether a lower precision is both faster and true."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from ..processing_llm2clip import LLM2CLIPProcessor
from .captions import encode_captions

CANDIDATES = (torch.bfloat16, torch.float16)
LEAST_COSINE = 0.999
LEAST_SPEEDUP = 1.1
_ROUNDS = 3


@dataclass(frozen=True)
class PrecisionTrial:
    """What one dtype did, by autocast, to the vectors of a sample of captions.

    Attributes:
        speedup: times as fast as the model's own precision, median of three rounds.
        min_cosine: of the caption that suffered most; NaN when a vector is not finite.
    """

    dtype: torch.dtype
    speedup: float
    min_cosine: float

    @property
    def pays(self) -> bool:
        """Faster by a tenth at least, and no caption below a cosine of 0.999."""
        return self.speedup >= LEAST_SPEEDUP and self.min_cosine >= LEAST_COSINE


def probe_precisions(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    captions: Sequence[str],
) -> list[PrecisionTrial]:
    """Try every candidate on some captions, in turns with the model's own precision.

    Args:
        captions: a few dozen like those to be encoded, the longest among them: massive
            activations, which lower precision breaks, show in some captions and not in others.
    """
    reference, own_time = _encode_timed(model, processor, captions, None)
    trials = []
    for dtype in CANDIDATES:
        vectors, seconds = _encode_timed(model, processor, captions, dtype)
        cosines = F.cosine_similarity(vectors.double(), reference.double())
        trials.append(PrecisionTrial(dtype, own_time / seconds, float(cosines.min())))
    return trials


def choose_precision(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    captions: Sequence[str],
) -> torch.dtype | None:
    """Return the fastest precision that pays, or None to stay with the model's own."""
    paying = [t for t in probe_precisions(model, processor, captions) if t.pays]
    return max(paying, key=lambda trial: trial.speedup).dtype if paying else None


def pick_probe_captions(captions: Sequence[str], *, count: int = 32) -> list[str]:
    """Pick captions of every length, the shortest and the longest among them."""
    ordered = sorted(set(captions), key=len)
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def _encode_timed(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    captions: Sequence[str],
    dtype: torch.dtype | None,
) -> tuple[Tensor, float]:
    encode_captions(model, processor, captions[:2], precision=dtype)  # warms up
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        # The vectors come back to the CPU, so the work is done when this returns.
        vectors = encode_captions(model, processor, captions, precision=dtype).caption_embeds
        seconds.append(time.perf_counter() - started)
    return vectors, statistics.median(seconds)
