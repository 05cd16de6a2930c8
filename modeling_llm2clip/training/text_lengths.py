"""How long texts are in tokens, and how many are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ..processing_llm2clip import LLM2CLIPProcessor

# Ids of this many texts are in memory at a time.
_TOKENIZED_AT_ONCE = 4096


def measure_texts(
    processor: LLM2CLIPProcessor, texts: Sequence[str], *, show_progress: bool = False
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], int]:
    """Token count of each text, (N,), and how many texts are cut; the ids are not kept."""
    lengths = np.zeros(len(texts), dtype=np.int64)
    num_truncated = 0
    starts = range(0, len(texts), _TOKENIZED_AT_ONCE)
    for start in tqdm(starts, desc="measure", disable=not show_progress):
        ids, num_cut = processor.list_ids(texts[start : start + _TOKENIZED_AT_ONCE])
        lengths[start : start + len(ids)] = [len(row) for row in ids]
        num_truncated += num_cut
    return lengths, num_truncated
