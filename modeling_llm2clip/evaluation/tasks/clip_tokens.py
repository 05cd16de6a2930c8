"""What a 77-token encoder would see of a text: CLIP's own tokenizer as the yardstick of length.

A length in one model's tokens cannot be compared with another model's, so all texts are measured
by the same tokenizer, whatever is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..._extras import CLIP_TOKENS
from ..encoders.open_clip_models import import_open_clip

# 77 positions, of which the begin and the end of the text take two (arXiv:2103.00020).
CLIP_TEXT_TOKENS = 75


def count_clip_tokens(texts: Sequence[str]) -> list[int]:
    """Tokens of each text in CLIP's vocabulary, without begin and end.

    Raises: MissingExtraError when open_clip, which has the vocabulary, is not installed.
    """
    tokenizer = import_open_clip(CLIP_TOKENS).SimpleTokenizer()
    # A text of nothing but white space that Python does not know as such has no token.
    return [max(1, len(tokenizer.encode(text))) for text in texts]


def share_beyond_clip(lengths: Sequence[int]) -> float:
    """Share of all tokens that lie behind the 75th of their text."""
    return sum(max(0, length - CLIP_TEXT_TOKENS) for length in lengths) / sum(lengths)
