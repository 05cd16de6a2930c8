"""Reads image labels and their prompts, without importing torch, so errors are reported at once.

| file | content |
| --- | --- |
| `*.json` | a list of labels, or an object: label to prompt or list of prompts |
| `*.csv` | columns `label` and optionally `prompt`; a label may have several rows |
| any other | one label per line |

A label without prompts is inserted into every template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._suggestions import counted
from .sources.csv_files import iterate_csv
from .sources.json_files import parse_json, parse_object

_SHOWN = 5
_SHOWN_CHARACTERS = 100  # of a template


@dataclass(frozen=True)
class Label:
    """A label and the texts whose mean embedding represents it.

    Attributes:
        name: The label.
        prompts: The label's texts, at least one.
    """

    name: str
    prompts: tuple[str, ...]


def read_labels(file: Path, *, templates: Sequence[str] = ("{}",)) -> list[Label]:
    """Read a UTF-8 file of labels, in order; each template has one `{}` for the label."""
    check_templates(templates)
    try:
        prompts_of = _parse(file)
        _check(prompts_of)
    except (OSError, ValueError) as error:
        message = str(error).removeprefix(f"{file} ")
        raise ValueError(f"{file}: {message}") from error
    if list(templates) != ["{}"] and all(prompts for _, prompts in prompts_of):
        raise ValueError(
            f"{file}: every label has its own prompts, so no template is used. Leave the templates "
            "out."
        )
    return _fill_templates(prompts_of, templates)


def make_labels(names: Sequence[str], *, templates: Sequence[str] = ("{}",)) -> list[Label]:
    check_templates(templates)
    prompts_of: list[tuple[str, list[str]]] = [(name.strip(), []) for name in names]
    _check(prompts_of)
    return _fill_templates(prompts_of, templates)


def check_templates(templates: Sequence[str]) -> None:
    if not templates:
        raise ValueError("There is no template. Pass at least one, such as '{}'.")
    broken = [text[:_SHOWN_CHARACTERS] for text in templates if text.count("{}") != 1][:_SHOWN]
    if broken:
        raise ValueError(
            f"Templates without exactly one {{}}: {broken}. Put one {{}} where the label goes."
        )


def _fill_templates(
    prompts_of: Sequence[tuple[str, Sequence[str]]], templates: Sequence[str]
) -> list[Label]:
    return [
        Label(name, tuple(prompts) or tuple(template.replace("{}", name) for template in templates))
        for name, prompts in prompts_of
    ]


def _parse(file: Path) -> list[tuple[str, list[str]]]:
    if file.suffix.lower() == ".csv":
        return _parse_csv(file)
    text = file.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    if file.suffix.lower() == ".json":
        return _parse_labels(text)
    return [(line.strip(), []) for line in text.split("\n") if line.strip()]


def _parse_labels(text: str) -> list[tuple[str, list[str]]]:
    content = parse_json(text)
    if isinstance(content, list):
        return [(_require_text(name), []) for name in content]
    if isinstance(content, dict):
        content = parse_object(text.encode())  # also detects repeated labels
        if isinstance(content, str):
            raise ValueError(f"{content}. Keep each label only once.")
        lists = ((name, p if isinstance(p, list) else [p]) for name, p in content.items())
        return [(name.strip(), list(map(_require_text, prompts))) for name, prompts in lists]
    raise ValueError(
        f"found {type(content).__name__}. Write a list of labels, or an object that maps labels to "
        "prompts."
    )


def _require_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is of type {type(value).__name__}. Write it as a string.")
    return value.strip()


def _check_columns(columns: list[str]) -> None:
    if "label" not in columns or set(columns) - {"label", "prompt"}:
        raise ValueError(f"the columns are {columns}. Name them label, or label and prompt.")


def _parse_csv(file: Path) -> list[tuple[str, list[str]]]:
    prompts_of: dict[str, list[str]] = {}
    for line, row in iterate_csv(file, check=_check_columns, fill=True):
        name, prompt = (row.get(column, "").strip() for column in ("label", "prompt"))
        if not name:
            raise ValueError(f"line {line} has a blank label. Fill it in, or remove the line.")
        if name in prompts_of and not (prompt and prompts_of[name]):
            raise ValueError(
                f"line {line} repeats the label {name!r}. Give each of its rows its own prompt."
            )
        prompts_of.setdefault(name, []).extend([prompt] if prompt else [])
    return list(prompts_of.items())


def _check(prompts_of: Sequence[tuple[str, Iterable[str]]]) -> None:
    if not prompts_of:
        raise ValueError("there are no labels. Write one per line.")
    counts = Counter(name for name, _ in prompts_of)
    if twice := [name for name, count in counts.items() if count > 1]:
        shown = f"{counted(len(twice), 'repeated label')}: {twice[:_SHOWN]}"
        raise ValueError(f"{shown}. Keep each label only once.")
    for number, (name, prompts) in enumerate(prompts_of, start=1):
        if not all((name, *prompts)):
            what = f"a prompt of {name!r}" if name else f"label number {number}"
            raise ValueError(f"{what} is blank. Fill it in, or leave it out.")
