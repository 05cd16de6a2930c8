"""The subset of SQL that filters of an index may use, checked before the database sees them.

LanceDB's parser goes one level deeper with each operator, so that a filter of two kilobytes can
overflow its stack and end the process; and some functions of SQL make gigabytes out of a few
characters. So there are no functions and no arithmetic here:

    condition   = comparison | NOT condition | (condition) | condition AND|OR condition
    comparison  = value =|==|!=|<>|<|<=|>|>= value | value [NOT] LIKE|ILIKE text
                | value [NOT] BETWEEN value AND value | value [NOT] IN (literal, …)
                | value IS [NOT] NULL
    value       = column | literal
    literal     = 'text' | number | date 'text' | timestamp 'text'
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

MOST_CHARACTERS = 10_000
"""Maximum length of a filter."""
MOST_WORDS = 200
"""Maximum columns, literals, operators and parentheses, without the literals of IN lists."""
MOST_NESTED = 20
"""Maximum parentheses and NOTs around a comparison."""

_TOKEN = re.compile(
    r"(?P<text>'[^']*(?:''[^']*)*')"
    r"|(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))"
    r"|(?P<word>[A-Za-z_]\w*)"
    r"|(?P<mark>[=!<>]=|<>|[=<>(),])",
    re.ASCII,
)
_COMPARED_BY = frozenset(("=", "==", "!=", "<>", "<", "<=", ">", ">="))
_TYPES = ("DATE", "TIMESTAMP")
_KEYWORDS = frozenset(("AND", "OR", "NOT", "LIKE", "ILIKE", "BETWEEN", "IN", "IS", "NULL", *_TYPES))
_SHOWN = 60  # characters of a filter in an error


class _Token(NamedTuple):
    kind: str  # "text", "number", "column", or the keyword or mark itself; "" at the end
    value: str
    place: int


def check_filter(where: str, columns: Iterable[str]) -> None:
    """Raise ValueError, with the place and the remedy, for a filter outside of this subset."""
    names = list(columns)
    try:
        if len(where) > MOST_CHARACTERS:
            raise ValueError(f"it has more than {MOST_CHARACTERS:,} characters")
        _Parser(where, frozenset(name.upper() for name in names)).parse()
    except ValueError as error:
        raise ValueError(explain_filter(where, str(error), names)) from None


def explain_filter(where: str, problem: str, columns: Iterable[str]) -> str:
    shown = where if len(where) <= _SHOWN else where[: _SHOWN - 1] + "…"
    return (
        f"where={shown!r} cannot be used: {problem}. The columns are {', '.join(columns)}; compare "
        "them by =, !=, <, <=, >, >=, LIKE, IN (…), BETWEEN … AND …, IS NULL, and join comparisons "
        f"by AND, OR, NOT and parentheses, at most {MOST_WORDS} words in all. Write texts as "
        "'this', times as date '2024-01-31' or timestamp '2024-01-31 18:00:00'."
    )


class _Parser:
    """Walks through a filter once, from left to right, and builds nothing."""

    def __init__(self, where: str, columns: frozenset[str]) -> None:
        self._where = where
        self._tokens = self._split(columns)
        self._num_words = 0
        self._next = next(self._tokens)

    def parse(self) -> None:
        self._parse_condition(0)
        if self._next.kind:
            raise self._expect("AND, OR or the end")

    def _split(self, columns: frozenset[str]) -> Iterator[_Token]:
        place = 0
        while place < len(self._where):
            if self._where[place] in " \t\r\n":
                place += 1
                continue
            found = _TOKEN.match(self._where, place)
            if found is None:
                raise ValueError(self._locate(place, "begins no column, literal or operator"))
            value, kind = found.group(), str(found.lastgroup)
            if kind == "mark":
                kind = value
            elif kind == "word" and value.upper() in _KEYWORDS:
                kind = value.upper()
            elif kind == "word":
                if value.upper() not in columns:
                    raise ValueError(self._locate(place, "is neither a column nor a known word"))
                kind = "column"
            yield _Token(kind, value, place)
            place = found.end()
        yield _Token("", "", place)

    def _parse_condition(self, depth: int) -> None:
        self._parse_part(depth)
        while self._next.kind in ("AND", "OR"):
            self._take()
            self._parse_part(depth)

    def _parse_part(self, depth: int) -> None:
        if self._next.kind not in ("NOT", "("):
            self._parse_comparison()
            return
        if depth == MOST_NESTED:
            raise ValueError(f"more than {MOST_NESTED} parentheses and NOTs are nested")
        if self._take().kind == "NOT":
            self._parse_part(depth + 1)
        else:
            self._parse_condition(depth + 1)
            self._require(")")

    def _parse_comparison(self) -> None:
        self._parse_value()
        if self._next.kind in _COMPARED_BY:
            self._take()
            self._parse_value()
        elif self._next.kind == "IS":
            self._take()
            if self._next.kind == "NOT":
                self._take()
            self._require("NULL")
        else:
            if self._next.kind == "NOT":
                self._take()
            self._parse_word_comparison()

    def _parse_word_comparison(self) -> None:
        kind = self._next.kind
        if kind not in ("LIKE", "ILIKE", "BETWEEN", "IN"):
            raise self._expect("=, <, >, LIKE, IN, BETWEEN or IS")
        self._take()
        if kind == "BETWEEN":
            self._parse_value()
            self._require("AND")
            self._parse_value()
        elif kind == "IN":
            self._parse_list()
        else:
            self._require("text", "a text such as 'this'")

    def _parse_list(self) -> None:
        self._require("(")
        num_words = self._num_words
        self._parse_literal()
        while self._next.kind == ",":
            self._take()
            self._parse_literal()
            self._num_words = num_words  # a list is as deep as one literal
        self._require(")")

    def _parse_value(self) -> None:
        if self._next.kind == "column":
            self._take()
        else:
            self._parse_literal("a column, a text, a number or a time")

    def _parse_literal(self, wanted: str = "a text, a number or a time") -> None:
        if self._next.kind in _TYPES:
            self._take()
            self._require("text", "a time such as '2024-01-31'")
        elif self._next.kind in ("text", "number"):
            self._take()
        else:
            raise self._expect(wanted)

    def _require(self, kind: str, wanted: str | None = None) -> None:
        if self._next.kind != kind:
            raise self._expect(wanted or kind)
        self._take()

    def _take(self) -> _Token:
        self._num_words += 1
        if self._num_words > MOST_WORDS:
            raise ValueError(f"it has more than {MOST_WORDS} words and operators")
        taken, self._next = self._next, next(self._tokens)
        return taken

    def _expect(self, wanted: str) -> ValueError:
        if not self._next.kind:
            return ValueError(f"it ends where {wanted} is missing")
        return ValueError(self._locate(self._next.place, f"is in place of {wanted}"))

    def _locate(self, place: int, problem: str) -> str:
        shown = self._where[place : place + 20]
        return f"{shown!r} at character {place + 1} {problem}"
