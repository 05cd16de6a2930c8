"""Docstrings as documentation tools read them: Google style, complete for what is exported."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import modeling_llm2clip

griffe: Any = pytest.importorskip("griffe", reason='needs pip install -e ".[test]"')

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "modeling_llm2clip"
_HEADERS = "Args|Arguments|Attributes|Examples?|Raises|Returns|Yields|Warns|Note"
_INLINE_HEADER = re.compile(rf"^\s*({_HEADERS}):[ \t]+\S", re.MULTILINE)
# What griffe reads as a note or as plain text, and not as an example.
_NO_EXAMPLES = re.compile(r"^\s*Example:$", re.MULTILINE)
_NOT_DOCUMENTED = {"self", "cls"}
_EMPTY_OPENING = re.compile(r"(What|How|Whether|Of|The same|Likewise)\b")
EXPORTED = {f"modeling_llm2clip.{home}.{name}" for name, home in modeling_llm2clip._HOME.items()}


@cache
def load_package() -> Any:
    return griffe.load(
        "modeling_llm2clip",
        search_paths=[str(ROOT)],
        docstring_parser="google",
        docstring_options={"returns_multiple_items": False},
        allow_inspection=False,
        try_relative_path=False,
    )


def walk(parent: Any) -> Iterator[Any]:
    """Yield every class and function of a module or class, and the modules in it."""
    for member in parent.members.values():
        if member.is_alias:
            continue
        yield member
        if member.is_module or member.is_class:
            yield from walk(member)


@cache
def list_objects() -> tuple[Any, ...]:
    package = load_package()
    return (package, *walk(package))


def relative(path: str | Path) -> str:
    return Path(path).resolve().relative_to(PACKAGE).as_posix()


def find_warnings() -> dict[str, list[str]]:
    """Everything that griffe warns of while it reads docstrings, by file."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, logger = Collect(logging.WARNING), logging.getLogger("griffe")
    logger.addHandler(handler)
    try:
        for item in list_objects():
            _ = item.docstring and item.docstring.parsed
    finally:
        logger.removeHandler(handler)
    found = defaultdict(list)
    for message in messages:
        path, _, rest = message.partition(":")
        found[relative(ROOT / path)].append(rest)
    return found


def find_inline_headers() -> dict[str, list[str]]:
    """Headers with text behind them, which are read as plain sentences."""
    found = defaultdict(list)
    for item in list_objects():
        if item.docstring and (match := _INLINE_HEADER.search(item.docstring.value)):
            found[relative(item.filepath)].append(f"{item.path}: {match[0].strip()} …")
    return found


def find_unread_examples() -> dict[str, list[str]]:
    """Docstrings with `>>>` outside a section `Examples:`, and those under another header."""
    found = defaultdict(list)
    for item in list_objects():
        if item.docstring is None:
            continue
        sections = item.docstring.parsed
        elsewhere = ">>>" in "".join(
            str(section.value) for section in sections if section.kind.value != "examples"
        )
        if elsewhere or _NO_EXAMPLES.search(item.docstring.value):
            found[relative(item.filepath)].append(item.path)
    return found


def is_exported(item: Any) -> bool:
    """Tell whether users import it from the package, or call it as a method of such a class."""
    owner, _, name = item.path.rpartition(".")
    return item.path in EXPORTED or (owner in EXPORTED and not name.startswith("_"))


def find_undocumented() -> dict[str, list[str]]:
    """Exported classes, functions and methods that lack a docstring or entries of parameters."""
    found = defaultdict(list)
    for item in list_objects():
        if not is_exported(item) or not (item.is_function or item.is_class):
            continue
        if not item.docstring:
            found[relative(item.filepath)].append(f"{item.path}: no docstring")
        elif item.is_function and (missing := find_missing_entries(item)):
            found[relative(item.filepath)].append(f"{item.path}: {sorted(missing)}")
    return found


def find_missing_entries(item: Any) -> set[str]:
    wanted = {p.name.lstrip("*") for p in item.parameters} - _NOT_DOCUMENTED
    entries = {
        parameter.name.lstrip("*")
        for section in item.docstring.parsed
        if section.kind.value == "parameters"
        for parameter in section.value
    }
    return wanted - entries


def find_openings() -> dict[str, list[str]]:
    """Docstrings that begin with a word that says nothing yet."""
    found = defaultdict(list)
    for item in list_objects():
        if item.docstring and _EMPTY_OPENING.match(item.docstring.value):
            found[relative(item.filepath)].append(f"{item.path}: {item.docstring.value[:40]}")
    return found


def find_small_entries() -> dict[str, list[str]]:
    """Entries of sections whose text begins with a small letter, not with code or a shape."""
    found = defaultdict(list)
    for item in list_objects():
        for section in item.docstring.parsed if item.docstring else ():
            for entry in section.value if isinstance(section.value, list) else ():
                text = getattr(entry, "description", "")
                if text[:1].islower():
                    found[relative(item.filepath)].append(f"{item.path}: {text[:40]}")
    return found


RULES = {
    "griffe warns of nothing": find_warnings,
    "section headers are on lines of their own": find_inline_headers,
    "examples are in a section of their own": find_unread_examples,
    "what is exported has a docstring, with an entry for every parameter": find_undocumented,
    "none begins with what, how, whether or of": find_openings,
    "entries begin with a capital letter": find_small_entries,
}


@pytest.mark.parametrize("rule", RULES)
def test_docstrings_follow_the_rule(rule: str) -> None:
    found = RULES[rule]()
    assert found == {}
