"""Suggests the known word that a misspelled one may have meant; imports nothing costly."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a sentence that names the closest known word, or nothing if none is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    word = word.lower()
    longer = [candidate for candidate in by_lower if candidate.startswith(word)]
    close = longer or get_close_matches(word, by_lower, n=1)
    # As --batch is a part of --global-batch-size.
    close = close or [c for c in by_lower if word.strip("-") in re.split(r"\W|_", c.strip("-"))]
    return f" Did you mean {by_lower[close[0]]}?" if close else ""
