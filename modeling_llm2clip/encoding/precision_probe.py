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
from .layers import list_text_layers
from .precision import LowerPrecision

CANDIDATES = (torch.bfloat16, torch.float16)
LEAST_COSINE = 0.999
LEAST_SPEEDUP = 1.1
# A probe sees a few dozen captions of every length. The worst of thousands lost not twice as much.
LEAST_COSINE_OF_PROBE = 1 - (1 - LEAST_COSINE) / 2
_ROUNDS = 3
_SHARE_OF_FIRST_LOOK = 8  # some processors take ten times as long in float16


@dataclass(frozen=True)
class PrecisionTrial:
    """What a lower precision did to the vectors of a sample of captions.

    Attributes:
        precision: the dtype, from the earliest layer on from which it is true.
        speedup: times as fast as the model's own precision, median of three rounds; the rounding
            of weights, once for all captions, counts more here than for many captions.
        min_cosine: of the caption that suffered most; NaN when a vector is not finite.
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
    """Return the fastest precision that pays, or None to stay with the model's own.

    Args:
        captions: as `probe_precisions`.
    """
    paying = [t for t in probe_precisions(model, processor, captions) if t.pays]
    return max(paying, key=lambda trial: trial.speedup).precision if paying else None


def probe_precisions(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    captions: Sequence[str],
) -> list[PrecisionTrial]:
    """Try every candidate on some captions, in turns with the model's own precision.

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
    vectors, seconds = _encode_timed(model, processor, captions, precision)
    return PrecisionTrial(precision, own_time / seconds, _min_cosine(vectors, reference))


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
        vectors = encode_captions(model, processor, captions, precision=precision).caption_embeds
        if _min_cosine(vectors, reference) >= LEAST_COSINE_OF_PROBE:
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
        # The vectors come back to the CPU, so the work is done when this returns.
        vectors = encode_captions(model, processor, captions, precision=precision).caption_embeds
        seconds.append(time.perf_counter() - started)
    return vectors, statistics.median(seconds)


def _min_cosine(vectors: Tensor, reference: Tensor) -> float:
    return float(F.cosine_similarity(vectors.double(), reference.double()).min())
