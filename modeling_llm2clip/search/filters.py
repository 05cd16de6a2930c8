"""Restrict the filters of an index before the database parses them.

LanceDB's parser recurses with each operator, so a filter of two kilobytes can overflow its stack
and kill the process. Some SQL functions also expand a few characters into gigabytes. A filter may
therefore hold only columns, literals, comparisons and parentheses, and has a maximum length. The
database checks whether the filter is a valid condition.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MOST_WORDS = 200
"""Maximum number of columns, literals, operators and parentheses, not counting IN lists."""
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
    """Raised for an invalid filter; the message quotes the filter and lists the allowed words."""


def check_filter(where: str, columns: Iterable[str]) -> str:
    """Return a filter in the database's syntax; raise FilterError if a word is not allowed.

    The database compares integer columns with decimals only if the decimals are cast. The database
    ignores text after a complete condition, so the filter is wrapped in parentheses, and its own
    parentheses must balance.
    """
    columns = list(columns)
    words = {*_KEYWORDS, *(column.upper() for column in columns)}
    parts: list[str] = []
    position = num_words = depth = 0
    while position < len(where[:_MOST_CHARACTERS]):
        token = _TOKEN.match(where, position)
        depth += token is not None and {"(": 1, ")": -1}.get(token.group(), 0)
        if token is None or depth < 0 or (token["word"] and token["word"].upper() not in words):
            problem = (
                f"{where[position : position + 20]!r} at character {position + 1} is not allowed"
            )
            raise explain_filter(where, problem, columns)
        number, separator = token["number"] or "", token["next"] or ""
        # An integer with more digits may not fit in 64 bits.
        is_decimal = len(number) > 18 or not f"0{number.lstrip('-')}".isdecimal()
        parts.append(f"{separator}CAST({number} AS DOUBLE)" if is_decimal else token.group())
        num_words += bool(token.lastgroup and not separator)  # an IN list adds no nesting
        position = token.end()
    if depth or not 0 < num_words <= MOST_WORDS or len(where) > _MOST_CHARACTERS:
        problem = (
            f"it has {num_words} words, {len(where):,} characters and {depth} open parentheses"
        )
        raise explain_filter(where, problem, columns)
    return f"({''.join(parts)})"


def explain_filter(where: str, problem: str, columns: Iterable[str]) -> FilterError:
    """Return an error that states what is wrong with a filter and lists the allowed words."""
    most = _MAX_CHARACTERS_IN_MESSAGE
    shown = where if len(where) <= most else where[: most - 1] + "…"
    return FilterError(
        f"where={shown!r} cannot be used: {problem}. The columns are {', '.join(columns)}. Compare "
        "them with =, !=, <, <=, >, >=, LIKE, IN (…), BETWEEN … AND … or IS NULL, and combine "
        f"comparisons with AND, OR, NOT and parentheses, using at most {MOST_WORDS} words. Write "
        "text as 'this', and times as date '2024-01-31' or timestamp '2024-01-31 18:00:00'."
    )
