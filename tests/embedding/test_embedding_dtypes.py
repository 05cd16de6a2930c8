"""Laws of the stored dtypes: those of sentence-transformers, and what is lost is bounded."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from packaging.version import Version
from sentence_transformers import __version__ as sentence_transformers_version
from sentence_transformers.util import quantize_embeddings

from modeling_llm2clip.embedding.parquet_writer import (
    Array,
    convert_embeddings,
    measure_ranges,
    truncate_embeddings,
)


def draw_embeddings(count: int, dim: int = 48, *, seed: int = 0) -> Array:
    drawn = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    embeds: Array = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return embeds


@pytest.mark.parametrize("dtype", ["int8", "binary", "ubinary"])
def test_the_numbers_are_those_of_sentence_transformers(
    dtype: Literal["int8", "binary", "ubinary"],
) -> None:
    if dtype == "int8" and Version(sentence_transformers_version) < Version("6.0"):
        pytest.skip("there, a value outside the ranges becomes one at the other end")
    sample, embeds = draw_embeddings(100), draw_embeddings(300, seed=1)
    ranges = measure_ranges(sample)
    found, _ = convert_embeddings(embeds, dtype, ranges=ranges)
    expected = quantize_embeddings(embeds, dtype, ranges=ranges)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_values_outside_the_ranges_are_clipped_and_counted() -> None:
    ranges = np.array([[-0.5, 0.0], [0.5, 0.0]], np.float32)
    embeds = np.array([[-0.5, 0.0], [0.5, 0.0], [0.6, -0.8], [0.0, 1.0]], np.float32)
    values, num_clipped = convert_embeddings(embeds, "int8", ranges=ranges)
    assert num_clipped == 3
    # Of a dimension without a range, a step is 1. In float32, 0.5 may be a step lower.
    assert values[:, 0].tolist() in ([-128, 127, 127, -1], [-128, 126, 127, -1])
    assert values[:, 1].tolist() == [-128, -128, -128, -127]


def test_float16_is_rounded_and_float32_stays() -> None:
    embeds = draw_embeddings(5)
    assert (convert_embeddings(embeds, "float32")[0] == embeds).all()
    rounded = convert_embeddings(embeds, "float16")[0]
    assert rounded.dtype == np.float16
    np.testing.assert_allclose(rounded, embeds, atol=2**-12)  # 11 bits of mantissa below 1


def test_embeddings_that_truncation_would_leave_empty_are_refused() -> None:
    with pytest.raises(ValueError, match="truncate_dim=2: 2 embeddings would be all zeros"):
        truncate_embeddings(np.eye(4, dtype=np.float32), 2)
