"""Reads recorded evaluations as results for a model card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from .._suggestions import counted
from ..evaluation.report import label_dataset
from ..evaluation.results import is_result, parse_result
from ..model_folders.fingerprint import fingerprint_model
from ..model_folders.model_card import CardResult, read_card_data, write_model_card

# What `llm2clip evaluate` reports per language, class, category or measure: too much for a card.
_DETAILS = {"languages", "categories", "intervals", "top_1_of_class"}
_INTERVAL = {"value", "low", "high"}


def read_card_results(files: Sequence[Path]) -> tuple[CardResult, ...]:
    """Read recorded evaluation results from JSON files with an object each, or a list of them.

    An object has `task`, `dataset` and `scores`: numbers by name, nested to any depth, with an
    interval of 95 % confidence as `{"value", "low", "high"}`. A nested score is named by its path,
    such as `t2i.hit_rate_at_1`. `count` may say how much was measured, such as "1,000 images".
    Scores per language, class or category, and everything else, are left to the file. For results
    of `llm2clip evaluate`, the dataset's name states its language and what was left out. All errors
    are named at once.
    """
    results: dict[tuple[str, str], CardResult] = {}
    errors = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            errors.append(f"{file}: {error}")
            continue
        for entry in content if isinstance(content, list) else [content]:
            try:
                result = _read_result(entry, file)
            except ValueError as error:
                errors.append(f"{file}: {error}")
                continue
            task = (result.task, result.dataset)
            if task in results:
                errors.append(f"{file}: {result.task} on {result.dataset} is given twice")
            results[task] = result
    if errors:
        raise ValueError(
            f"{'; '.join(errors)}. Wanted: JSON with 'task' and 'dataset' (text) and 'scores' "
            "(names and numbers), as `llm2clip evaluate` writes it."
        )
    return tuple(results.values())


def require_own_results(results: Sequence[CardResult], folder: Path) -> None:
    """Refuse results of another model than a folder's; those without a fingerprint are taken."""
    stated = [result for result in results if result.fingerprint is not None]
    if not stated:
        return
    fingerprint = fingerprint_model(folder)
    foreign = []
    for result in stated:
        measured = {"dtype": result.dtype or fingerprint["dtype"], **(result.fingerprint or {})}
        differing = [name for name, value in fingerprint.items() if measured.get(name) != value]
        if differing:
            foreign.append(f"{result.task} on {result.dataset} ({', '.join(differing)})")
    if foreign:
        raise ValueError(
            f"{'; '.join(foreign)}: not measured with the model that would be written. Export "
            "first (another dtype makes other weights), evaluate the folder that is written, as "
            "a model of this package and in its own dtype, and give these results."
        )


def add_card_results(folder: Path, files: Sequence[Path]) -> None:
    """State further results on the card of a model folder, in place of older ones on a dataset.

    A card that has them stays as it is.
    """
    results = read_card_results(files)
    require_own_results(results, folder)
    card = read_card_data(folder)
    if all(result in card.results for result in results):
        return
    measured = {(result.task, result.dataset) for result in results}
    kept = [result for result in card.results if (result.task, result.dataset) not in measured]
    write_model_card(folder, replace(card, results=(*kept, *results)), name=folder.name)


def _read_result(entry: Any, file: Path) -> CardResult:
    if not isinstance(entry, dict):
        raise ValueError(f"holds {type(entry).__name__}, wanted an object")
    task, dataset = entry.get("task"), entry.get("dataset")
    absent = [name for name, value in (("task", task), ("dataset", dataset)) if not value]
    if absent:
        raise ValueError(f"has no {absent}")
    measured = dict(_iterate_scores(entry.get("scores"), ""))
    if not measured:
        raise ValueError("has no scores")
    # By their exact types, because True is an int.
    wrong = sorted(
        name
        for name, numbers in measured.items()
        if any(type(number) not in (int, float) or not isfinite(number) for number in numbers)
    )
    if wrong:
        raise ValueError(f"has scores that are not finite numbers: {wrong}")
    facts = {"fingerprint": entry.get("fingerprint"), "count": entry.get("count")}
    if not isinstance(facts["count"], str | None):
        raise ValueError(f"has count={facts['count']!r}, wanted a text")
    if is_result(entry):
        result = parse_result(entry, file)
        dataset = label_dataset(result, with_languages=True)
        facts |= {
            "dtype": result.protocol["model"]["dtype"],
            "count": _describe_counts(result.counts),
        }
    return CardResult(
        str(task),
        str(dataset),
        {name: numbers[0] for name, numbers in measured.items()},
        **facts,
        intervals={name: numbers[1:] for name, numbers in measured.items() if numbers[1:]},
    )


def _describe_counts(counts: Mapping[str, Any]) -> str:
    if "languages" in counts:  # whose images may be the same
        parts = counts["languages"].values()
        shown = {"language": len(parts), "text": sum(part["texts"] for part in parts)}
    else:
        nouns = ("item", "image") if "classes" in counts else ("item", "image", "text")
        shown = {noun: counts.get(f"{noun}s") for noun in nouns}
    return ", ".join(counted(count, noun) for noun, count in shown.items() if count)


def _iterate_scores(
    scores: Any, path: str, interval: Any = None
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the path of every score, without None, lists and details, and its value and interval.

    `interval` is that of the score, where it is beside it.
    """
    if isinstance(scores, dict):
        intervals = scores.get("intervals") or {}
        if _INTERVAL <= set(scores):
            others = {name: score for name, score in scores.items() if name not in _INTERVAL}
            intervals, scores = {"": scores}, {"": scores["value"], **others}
        for name, value in scores.items():
            if name not in _DETAILS:
                place = f"{path}.{name}".strip(".")
                interval = intervals.get(name) if isinstance(intervals, dict) else None
                yield from _iterate_scores(value, place, interval)
    elif scores is not None and not isinstance(scores, list):
        is_stated = isinstance(interval, dict) and _INTERVAL <= set(interval)
        yield path, (scores, *((interval["low"], interval["high"]) if is_stated else ()))
