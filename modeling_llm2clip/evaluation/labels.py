"""Tells results apart: what a table or a plot calls a model and a set.

A name gets longer where it stands for several things, and where a set is not all that is published.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..data.atomic_files import hash_json
from .results import Result, find_differences
from .tasks.task_registry import find_task

# Choices of a task that stand in its title.
SIDES = ("queries", "candidates")
_SHOWN_OF_DIGEST = 8
_SHOWN_LANGUAGES = 3
_UNITS = ("images", "items", "captions", "classes")


def disambiguate(results: Sequence[Result]) -> list[Result]:
    """The results, `model` and `set` longer where they would stand for several models or data.

    Raises: ValueError when two differ that ask one question of one model on the same data.
    """
    fingerprints: dict[str, set[str]] = {}
    of_set: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        fingerprints.setdefault(result.model, set()).add(shorten_fingerprint(result))
        of_set.setdefault((find_question(result), result.set), []).append(result)
    told = []
    for result in results:
        model = result.model
        if len(fingerprints[model]) > 1:
            model = f"{model} ({shorten_fingerprint(result)})"
        label = _label_dataset(result, of_set[find_question(result), result.set])
        told.append(replace(result, model=model, set=label))
    return _drop_repeated(told)


def name_data(result: Result) -> str:
    """The dataset as it stands alone: what it lacks, and its languages."""
    label = _label_dataset(result, [result])
    is_english = set(list_data(result)) <= {"en", "None"}
    return label if is_english else f"{label} [{describe_languages(result)}]"


def find_question(result: Result) -> tuple[str, str]:
    """Name of the task, and its title with what looked for what."""
    return result.task, "; ".join([find_task(result.task).title, *list_sides(result)])


def list_sides(result: Result) -> list[str]:
    """What looked for what, where the task says it."""
    task = result.protocol["task"]
    return [f"{side}: {task[side]}" for side in SIDES if side in task]


def list_data(result: Result) -> dict[str, Mapping[str, Any]]:
    """The protocols of a result's data: one, or one a language in the order of the languages."""
    data = result.protocol["data"]
    parts = data["languages"] if "languages" in data else {str(data.get("lang")): data}
    return {lang: parts[lang] for lang in sorted(parts)}


def list_digests(result: Result) -> tuple[str, ...]:
    """Digests of the data of a result: one, or one a language."""
    return tuple(str(data["digest"]) for data in list_data(result).values())


def shorten_digests(result: Result) -> str:
    """The beginning of each digest of the data, or of the digest of all where there are many."""
    digests = list_digests(result)
    if len(digests) > _SHOWN_LANGUAGES:
        digests = (hash_json(digests),)
    return "+".join(digest[:_SHOWN_OF_DIGEST] for digest in digests)


def shorten_fingerprint(result: Result) -> str:
    """The beginning of a digest of everything that tells two models apart."""
    return hash_json(result.fingerprint)[:_SHOWN_OF_DIGEST]


def describe_languages(result: Result) -> str:
    """The languages, or how many there are."""
    languages = list_data(result)
    if len(languages) > _SHOWN_LANGUAGES:
        return f"{len(languages)} languages"
    return "+".join(languages)


def describe_amount(data: Mapping[str, Any], units: Iterable[str] = _UNITS) -> str:
    """How much there is, and of how much, as in `12 of 5,000 images, 60 of 25,000 captions`."""
    published = data.get("published") or {}
    amounts = []
    for unit in units:
        if unit not in data:
            continue
        have, wanted = data[unit], published.get(unit, data[unit])
        of = "" if have == wanted else f" of {wanted:,}"
        amounts.append(f"{have:,}{of} {unit}")
    return ", ".join(amounts)


def list_other_files(data: Mapping[str, Any]) -> list[str]:
    """Files that are not those that were published."""
    return [name for name, state in (data.get("checksums") or {}).items() if state != "published"]


def _label_dataset(result: Result, others: Sequence[Result]) -> str:
    """The set, what it lacks, and in what it differs from the others of its name."""
    is_alone = len(set(map(list_digests, others))) == 1
    amount = _describe_first_amount(result)
    described = f"{describe_languages(result)}, {amount}"
    parts = []
    if not is_alone:
        parts.append(described)
        alike = {
            list_digests(other)
            for other in others
            if described == f"{describe_languages(other)}, {_describe_first_amount(other)}"
        }
        parts += [shorten_digests(result)] if len(alike) > 1 else []
    elif " of " in amount:
        parts.append(amount)
    if any(map(list_other_files, list_data(result).values())):
        parts.append("files differ")
    parts += _list_own_choices(result, others)
    return f"{result.set} ({', '.join(parts)})" if parts else result.set


def _describe_first_amount(result: Result) -> str:
    """How many images, items or captions; of the first language in which some are lacking."""
    found = []
    for data in list_data(result).values():
        there = [unit for unit in _UNITS if unit in data]
        published = data.get("published") or {}
        lacking = [unit for unit in there if data[unit] != published.get(unit, data[unit])]
        found.append(describe_amount(data, (lacking or there)[:1]))
    return next((amount for amount in found if " of " in amount), found[0])


def _list_own_choices(result: Result, others: Sequence[Result]) -> list[str]:
    """Every choice of the task that others of the set made otherwise, by a digest of its value."""
    protocols = [other.protocol["task"] for other in others]
    names = dict.fromkeys(name for protocol in protocols for name in protocol)
    return [
        f"{name} {hash_json(result.protocol['task'].get(name))[:_SHOWN_OF_DIGEST]}"
        for name in names
        if len({json.dumps(protocol.get(name)) for protocol in protocols}) > 1
    ]


def _drop_repeated(results: Sequence[Result]) -> list[Result]:
    kept: dict[tuple[Any, ...], Result] = {}
    for result in results:
        key = (result.model, find_question(result), result.set)
        first = kept.setdefault(key, result)
        differences = [
            difference
            for what in ("protocol", "scores")
            for difference in find_differences(getattr(first, what), getattr(result, what), what)
        ]
        if differences:
            raise ValueError(
                f"Two results of {result.model} for {result.task} on {result.set} differ: "
                f"{differences[0]}. Give each model a name of its own, or leave one out."
            )
    return list(kept.values())
