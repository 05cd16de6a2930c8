"""Names the known word that a misspelt one may have meant; imports nothing costly."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a sentence that names the closest known word, or nothing if none is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    longer = [candidate for candidate in by_lower if candidate.startswith(word.lower())]
    close = longer or get_close_matches(word.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]}?" if close else ""
