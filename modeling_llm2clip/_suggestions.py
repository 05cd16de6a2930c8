"""Formats parts of messages: suggestions, counts, lists. Imports only the standard library."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

MAX_LISTED = 5  # names, places or errors that a message lists


def is_unicode(text: object) -> bool:
    """Return whether a name or path can be written as UTF-8."""
    return not re.search("[\ud800-\udfff]", str(text))  # Python's surrogates for invalid bytes


def escape_controls(text: object) -> str:
    """Escape control and unprintable characters; keep line breaks and tabs."""
    return re.sub(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]",
        lambda match: f"\\u{ord(match[0]):04x}",
        str(text),
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest the closest known word: a sentence with a leading space, or an empty string."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    word = word.lower()
    close = [candidate for candidate in by_lower if candidate.startswith(word)]
    # For example --batch, which is part of --global-batch-size.
    close = close or [c for c in by_lower if word.strip("-") in re.split(r"\W|_", c.strip("-"))]
    close = close or get_close_matches(word, by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]}?" if close else ""


def counted(number: int, noun: str) -> str:
    """Format a number and its noun, such as "1 image" or "1,200 images"."""
    if number == 1:
        return f"1 {noun}"
    ends_in_ies = noun.endswith("y") and noun[-2] not in "aeiou"
    return f"{number:,} {noun[:-1]}ies" if ends_in_ies else f"{number:,} {noun}s"


def list_first(items: Iterable[object], separator: str = ", ", *, total: int | None = None) -> str:
    """List the first items and count the rest, such as "a, b, c, d, e and 3 more"."""
    # Pass the number of items as `total` if `items` has only the first `MAX_LISTED`.
    listed = list(map(str, items))
    rest = (len(listed) if total is None else total) - len(listed[:MAX_LISTED])
    before_rest = " " if separator == ", " else separator
    return separator.join(listed[:MAX_LISTED]) + (f"{before_rest}and {rest:,} more" if rest else "")
