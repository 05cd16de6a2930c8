"""Compares a server's embeddings with the model's own.

Shapes: N texts or images, P `projection_dim`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._suggestions import list_first
from ..encoding.encode import encode_images, encode_texts
from ..model_folders.golden_embeddings import measure_distances
from ..model_folders.guarded_loading import LEAST_COSINE
from .model_under_test import ModelUnderTest


def encode(tested: ModelUnderTest, inputs: Sequence[Any]) -> Tensor:
    """Encode texts or images with the model itself as (N, P) float32 of unit length."""
    run: Any = encode_texts if isinstance(inputs[0], str) else encode_images
    embeds: Tensor = run(tested.model, tested.processor, list(inputs))
    return embeds


def require_same(
    tested: ModelUnderTest, inputs: Sequence[Any], served: Tensor, *, tolerance: float
) -> float:
    """Return the largest distance between a server's embeddings, (N, any width), and the model's.

    If it exceeds the tolerance, a ValueError names the inputs and a likely cause.
    """
    expected = encode(tested, inputs)
    if served.shape != expected.shape:
        width, model_width = served.shape[1], expected.shape[1]
        raise ValueError(
            f"The server's embeddings have {width} dimensions, the model's have {model_width}. "
            "Serve this model, or check the one that is served."
        )
    distances = measure_distances(served, expected)
    worst = float(distances.max())
    if worst <= tolerance:
        return worst
    differing = (distances > tolerance).nonzero().flatten().tolist()
    named = list_first(_name(inputs, row) for row in differing)
    raise ValueError(
        f"{len(differing)} of {len(inputs)} embeddings differ by up to {worst:.1e} (allowed: "
        f"{tolerance:.2g}): {named}.{_find_cause(tested, inputs, served, expected, tolerance)}"
    )


def _find_cause(
    tested: ModelUnderTest,
    inputs: Sequence[Any],
    served: Tensor,
    expected: Tensor,
    tolerance: float,
) -> str:
    """Return a sentence about the most likely of the common causes; empty if none applies."""
    if not served.isfinite().all():
        return " Some have NaN or infinity."
    lengths, directions = served.norm(dim=-1), F.normalize(served, dim=-1)
    if float(measure_distances(directions, expected).max()) <= tolerance:
        return f" They are not normalized: lengths are {lengths.min():.3g} to {lengths.max():.3g}."
    distances, nearest = torch.cdist(served, expected).min(dim=1)
    swapped = [
        f"{_name(inputs, row)} got the embedding of {_name(inputs, other)}"
        for row, other in enumerate(nearest.tolist())
        if distances[row] <= tolerance < float((expected[row] - expected[other]).norm())
    ]
    if swapped:
        return f" Inputs are mixed up: {list_first(swapped, '; ')}."
    if isinstance(inputs[0], str):
        bare = [tested.list_bare_ids(text)[: tested.config.max_text_length] for text in inputs]
        lost = torch.cat([tested.encode_by_hand(ids, num_unpooled=0) for ids in bare])
        if float(measure_distances(directions, lost).max()) <= tolerance:
            return " The prompt is missing."
    if float(F.cosine_similarity(served, expected).min()) >= LEAST_COSINE:
        return " The server may compute in bfloat16: start llm2clip serve with --precision float32."
    return ""


def _name(inputs: Sequence[Any], row: int) -> str:
    value = inputs[row]
    if not isinstance(value, str):
        return f"image {row} ({value.mode}, {value.width}x{value.height})"
    return repr(value if len(value) <= 32 else f"{value[:24]}… ({len(value)} characters)")
