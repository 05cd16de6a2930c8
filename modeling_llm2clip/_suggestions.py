"""Suggests the known word closest to a misspelled one. Imports the standard library alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest the closest known word.

    Args:
        word: what the user wrote.
        known: words that are valid.

    Returns:
        A sentence that begins with a space, such as " Did you mean --data?", or an empty string if
        no known word is close.
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    word = word.lower()
    close = [candidate for candidate in by_lower if candidate.startswith(word)]
    # Such as --batch, which is a part of --global-batch-size.
    close = close or [c for c in by_lower if word.strip("-") in re.split(r"\W|_", c.strip("-"))]
    close = close or get_close_matches(word, by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]}?" if close else ""
