"""Tiles of the score matrix fit into the memory that they are given."""

from __future__ import annotations

import pytest

from modeling_llm2clip.evaluation.metrics.ranking import choose_tile_shape


@pytest.mark.parametrize("width", [1, 64, 1280, 4096])
@pytest.mark.parametrize("memory_mb", [2, 64, 256, 1024])
def test_a_tile_grows_with_memory_and_fits_it(width, memory_mb):
    shape = choose_tile_shape(width, max_memory_mb=memory_mb, device_type="cuda")
    needed = 40 * shape.images * shape.texts + 28 * width * (shape.images + shape.texts)
    assert needed <= memory_mb * 1e6
    more = choose_tile_shape(width, max_memory_mb=2 * memory_mb, device_type="cuda")
    assert more.texts > shape.texts or shape.texts == 2048
