"""Bounds the filters of an index before the database reads them.

LanceDB's parser goes one level deeper with each operator, so that a filter of two kilobytes can
overflow its stack and end the process; and some functions of SQL make gigabytes out of a few
characters. So a filter has columns, literals, comparisons and parentheses alone, and few of them.
Whether they make up a condition is up to the database.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MOST_WORDS = 200
"""Maximum columns, literals, operators and parentheses, without the literals of IN lists."""
_MOST_CHARACTERS = 10_000
_MAX_CHARACTERS_IN_MESSAGE = 60

_TOKEN = re.compile(
    r"[ \t\r\n]+"
    r"|(?P<next>,[ \t\r\n]*)?(?:(?P<text>'[^']*(?:''[^']*)*')"
    r"|(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])))"
    r"|(?P<word>[A-Za-z_]\w*)"
    r"|(?P<mark>[=!<>]=|<>|[=<>()])",
    re.ASCII,
)
_KEYWORDS = (
    "AND", "OR", "NOT", "LIKE", "ILIKE", "BETWEEN", "IN", "IS", "NULL", "DATE", "TIMESTAMP"
)  # fmt: skip


class FilterError(ValueError):
    """A filter cannot be used; the message names it and the words that are allowed."""


def check_filter(where: str, columns: Iterable[str]) -> str:
    """Return a filter in the form that the database takes; FilterError if a word is not allowed.

    The database compares integers with other numbers only if these are cast. It ignores text
    after a complete condition, so the filter is put in parentheses, and its own must match.
    """
    columns = list(columns)
    words = {*_KEYWORDS, *(column.upper() for column in columns)}
    parts: list[str] = []
    place = num_words = depth = 0
    while place < len(where[:_MOST_CHARACTERS]):
        token = _TOKEN.match(where, place)
        depth += token is not None and {"(": 1, ")": -1}.get(token.group(), 0)
        if token is None or depth < 0 or (token["word"] and token["word"].upper() not in words):
            problem = f"{where[place : place + 20]!r} at character {place + 1} is not allowed"
            raise explain_filter(where, problem, columns)
        number, separator = token["number"] or "", token["next"] or ""
        # An integer of more digits may be none of 64 bits.
        is_decimal = len(number) > 18 or not f"0{number.lstrip('-')}".isdecimal()
        parts.append(f"{separator}CAST({number} AS DOUBLE)" if is_decimal else token.group())
        num_words += bool(token.lastgroup and not separator)  # a list is as deep as one literal
        place = token.end()
    if depth or not 0 < num_words <= MOST_WORDS or len(where) > _MOST_CHARACTERS:
        problem = (
            f"it has {num_words} words, {len(where):,} characters and {depth} open parentheses"
        )
        raise explain_filter(where, problem, columns)
    return f"({''.join(parts)})"


def explain_filter(where: str, problem: str, columns: Iterable[str]) -> FilterError:
    """Make the error that names the problem of a filter, and the words that are allowed."""
    most = _MAX_CHARACTERS_IN_MESSAGE
    shown = where if len(where) <= most else where[: most - 1] + "…"
    return FilterError(
        f"where={shown!r} cannot be used: {problem}. The columns are {', '.join(columns)}; compare "
        "them by =, !=, <, <=, >, >=, LIKE, IN (…), BETWEEN … AND …, IS NULL, and join comparisons "
        f"by AND, OR, NOT and parentheses, at most {MOST_WORDS} words in all. Write texts as "
        "'this', times as date '2024-01-31' or timestamp '2024-01-31 18:00:00'."
    )
