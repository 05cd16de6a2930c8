"""Whether a tokenizer tells capitals from small letters."""

from __future__ import annotations

from typing import Any

_SAME_BUT_FOR_CAPITALS = ["A Red Cat on Two Mats", "a red cat on two mats"]


def is_uncased(tokenizer: Any) -> bool:
    """Whether texts that differ in capitals alone have the same tokens, as with CLIP's own."""
    upper, lower = tokenizer(_SAME_BUT_FOR_CAPITALS, verbose=False)["input_ids"]
    return bool(upper == lower)
