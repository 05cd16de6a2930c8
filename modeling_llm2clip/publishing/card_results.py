"""Results of `llm2clip evaluate` as entries of a model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._suggestions import counted
from ..evaluation.report import label_dataset
from ..evaluation.results import Result, read_result
from ..model_folders.fingerprint import fingerprint_model
from ..model_folders.model_card import CardResult, read_card_data, write_model_card

# Scores per language, class and category stay in the file: a card has no room for them.
_DETAILS = {"languages", "categories", "intervals", "top_1_of_class", "value", "low", "high"}


def read_card_results(files: Sequence[Path]) -> tuple[CardResult, ...]:
    """Read result files of `llm2clip evaluate`; all errors are named at once.

    A nested score is named by its path, such as `t2i.hit_rate_at_1`. The dataset's name states its
    language and what was left out.
    """
    results: dict[tuple[str, str], CardResult] = {}
    errors = []
    for file in files:
        try:
            result = _summarize(read_result(file))
        except (OSError, ValueError) as error:
            errors.append(str(error))
            continue
        if (task := (result.task, result.dataset)) in results:
            errors.append(f"{file}: {result.task} on {result.dataset} is given twice.")
        results[task] = result
    if errors:
        raise ValueError(" ".join(errors))
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


def _summarize(result: Result) -> CardResult:
    measured = {name: (value, bounds) for name, value, bounds in _list_scores(result.scores)}
    return CardResult(
        result.task,
        label_dataset(result, with_languages=True),
        {name: value for name, (value, _) in measured.items()},
        fingerprint=result.fingerprint,
        dtype=result.protocol["model"]["dtype"],
        count=_describe_counts(result.counts),
        intervals={name: bounds for name, (_, bounds) in measured.items() if bounds},
    )


def _describe_counts(counts: Mapping[str, Any]) -> str:
    if "languages" in counts:  # whose images may be the same
        parts = counts["languages"].values()
        shown = {"language": len(parts), "text": sum(part["texts"] for part in parts)}
    else:
        nouns = ("item", "image") if "classes" in counts else ("item", "image", "text")
        shown = {noun: counts.get(f"{noun}s") for noun in nouns}
    return ", ".join(counted(count, noun) for noun, count in shown.items() if count)


def _list_scores(
    scores: Any, path: str = "", interval: Mapping[str, float] | None = None
) -> Iterator[tuple[str, float, tuple[float, ...]]]:
    """Yield the path of every score, its value, and low and high of its interval if it has one."""
    if isinstance(scores, Mapping):
        if "value" in scores:
            yield from _list_scores(scores["value"], path, scores)
        intervals = scores.get("intervals", {})
        for name, value in scores.items():
            if name not in _DETAILS:
                place = f"{path}.{name}".strip(".")
                yield from _list_scores(value, place, intervals.get(name))
    elif isinstance(scores, int | float):
        yield path, scores, () if interval is None else (interval["low"], interval["high"])
