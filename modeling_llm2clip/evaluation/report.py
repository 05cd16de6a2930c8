"""Render results as tables.

There is one table per question: a task and, for some tasks, the type of queries and candidates.
Each column shows one score on one dataset, and each row shows one model. Results that cannot be
compared raise an error.
"""

from __future__ import annotations

from collections import UserList
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tabulate import tabulate

from .metrics.scores import CONFIDENCE_LEVEL
from .results import Result, find_conflict
from .tasks.task_registry import find_task

_NOTE = f"[low, high]: {CONFIDENCE_LEVEL:.0%} confidence interval, by bootstrap over the test set."
ABSENT = "–"
_SHOWN_LANGUAGES = 3
_UNITS = ("images", "items", "captions", "classes")
# Protocol fields of a task that are part of its title.
_SIDES = ("queries", "candidates")


class EvaluationResults(UserList[Result]):
    """Comparable results of one or more models, which print as a table."""

    def __repr__(self) -> str:
        return render_results(self)

    def _repr_markdown_(self) -> str:
        return render_results(self, style="markdown")


def render_results(
    results: Sequence[Result], *, style: Literal["text", "markdown"] = "text"
) -> str:
    """Render a table per task with intervals and chance, and tables by language and text length.

    Results that cannot be compared, for example of two models with the same name, raise ValueError.
    """
    results = list_comparable(results)
    tables = [*_list_scores(results)]
    drawn = [_draw(table, style) for table in tables]
    if any("[" in cell for table in tables for row in table.rows for cell in row):
        drawn.append(f"{_NOTE}\n")
    far = {  # shown once for all tasks
        f"{result.model} on {result.dataset}": result.run["far_images"]
        for result in results
        if "far_images" in result.run
    }
    drawn += [f"{where}: {text}\n" for where, text in far.items()]
    return "\n".join(drawn)


def describe_scores(result: Result) -> str:
    task = find_task(result.task)
    parts = []
    for title, path in task.headline.items():
        if (score := _format_score(result.scores, path)) == ABSENT:
            continue
        chance = _find(result.scores, task.chance.get(title, ()))
        suffix = "" if chance is None else f", chance {_percent(chance)}"
        parts.append(f"{title} {score}{suffix}")
    return "; ".join(parts)


def list_comparable(results: Sequence[Result]) -> list[Result]:
    """Return the results without duplicates; raise ValueError if some cannot be compared."""
    cells: dict[tuple[str, str, str], Result] = {}
    for result in results:
        name = f"{result.model}, {result.task} on {result.dataset}"
        for other in cells.values():
            if conflict := find_conflict(other, result):
                raise ValueError(
                    f"{name} comes from {conflict} ({other.model}, {other.task} on "
                    f"{other.dataset}). Give each model a unique name (NAME=SOURCE), and evaluate "
                    "all of them on the same data in the same way."
                )
        first = cells.setdefault((result.model, result.task, result.dataset), result)
        if first.scores != result.scores:
            raise ValueError(f"Two results for {name} have different scores. Leave one out.")
    return list(cells.values())


def _find_question(result: Result) -> tuple[str, str]:
    task = result.protocol["task"]
    sides = (f"{side}: {task[side]}" for side in _SIDES if side in task)
    return result.task, "; ".join([find_task(result.task).title, *sides])


def _list_scores(results: Sequence[Result]) -> Iterator[Table]:
    for question in dict.fromkeys(map(_find_question, results)):
        answers = [result for result in results if _find_question(result) == question]
        yield _compare_models(*question, answers)
        for dataset in dict.fromkeys(result.dataset for result in answers):
            chosen = [result for result in answers if result.dataset == dataset]
            if "languages" in chosen[0].scores:
                yield _compare_languages(chosen)
            if "buckets" in chosen[0].scores:
                yield _compare_lengths(chosen)


def _compare_models(task: str, title: str, results: Sequence[Result]) -> Table:
    labels = {result.dataset: label_dataset(result) for result in results}
    headline, chance = find_task(task).headline, find_task(task).chance
    columns = [
        (dataset, score, path)
        for dataset in labels
        for score, path in headline.items()
        if any(_find(r.scores, path) is not None for r in results if r.dataset == dataset)
    ]
    rows = []
    for model in dict.fromkeys(result.model for result in results):
        scores = {result.dataset: result.scores for result in results if result.model == model}
        cells = [_format_score(scores.get(dataset, {}), path) for dataset, _, path in columns]
        rows.append([model, *cells])
    chances = [
        _find_first([r.scores for r in results if r.dataset == dataset], chance.get(score, ()))
        for dataset, score, _ in columns
    ]
    if any(value is not None for value in chances):
        rows.append(["chance", *map(_percent, chances)])
    heads = ["model", *(f"{labels[dataset]}: {score}" for dataset, score, _ in columns)]
    return Table(title, heads, rows)


def _compare_languages(results: Sequence[Result]) -> Table:
    languages = dict.fromkeys(lang for r in results for lang in r.scores["languages"])
    path, chance = (("t2i", name) for name in ("hit_rate_at_1", "chance_hit_rate_at_1"))
    rows = []
    for lang in [*languages, "mean"]:
        scores = [
            r.scores["mean"] if lang == "mean" else r.scores["languages"].get(lang, {})
            for r in results
        ]
        cells = [_format_score(of_model, path) for of_model in scores]
        rows.append([lang, *cells, _percent(_find_first(scores, chance))])
    heads = ["language", *(result.model for result in results), "chance"]
    return Table(f"{label_dataset(results[0])}, text to image R@1 by language", heads, rows)


def _compare_lengths(results: Sequence[Result]) -> Table:
    bounds = {
        (bucket["from_clip_tokens"], bucket["to_clip_tokens"])
        for result in results
        for bucket in result.scores["buckets"]
    }
    rows = []
    for low, high in sorted(bounds):
        of_models: list[dict[str, Any]] = [
            next((b for b in r.scores["buckets"] if b["from_clip_tokens"] == low), {})
            for r in results
        ]
        first = next(bucket for bucket in of_models if bucket)
        rows.append(
            [
                f"{low} to {high}" if high else f"{low} and more",
                str(first["queries"]),
                _percent(first["share_of_tokens_beyond_clip"]),
                *(_format_score(bucket, ("hit_rate_at_1", "value")) for bucket in of_models),
            ]
        )
    heads = ["tokens", "texts", "beyond 77", *(result.model for result in results)]
    return Table(f"{label_dataset(results[0])}, R@1 by length in CLIP's tokens", heads, rows)


def _find_first(scores: Iterable[Mapping[str, Any]], path: tuple[str, ...]) -> float | None:
    """Return the first chance score found; all models have the same chance on the same data."""
    chances = (_find(of_model, path) for of_model in scores)
    return next((value for value in chances if value is not None), None)


def _format_score(scores: Mapping[str, Any], path: tuple[str, ...]) -> str:
    value = _find(scores, path)
    *parents, name = path
    interval = parents if name == "value" else [*parents, "intervals", name]
    low, high = (_find(scores, (*interval, bound)) for bound in ("low", "high"))
    if value is None or low is None or high is None:
        return _percent(value)
    return f"{_percent(value)} [{100 * low:.1f}, {100 * high:.1f}]"


def _find(scores: Mapping[str, Any], path: Iterable[str]) -> float | None:
    value: Any = scores
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value if isinstance(value, int | float) else None


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f} %"


def _draw(table: Table, style: str) -> str:
    title = table.title[0].upper() + table.title[1:]
    if style == "markdown":
        heads, *rows = [
            [cell.replace("|", "\\|").replace("\n", " ") for cell in line]
            for line in (table.heads, *table.rows)
        ]
        drawn = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
        return f"**{title}**\n\n{drawn}\n"
    drawn = tabulate(table.rows, table.heads, tablefmt="simple", disable_numparse=True)
    lines = "".join(f"{line.rstrip()}\n" for line in drawn.splitlines())
    return f"{title}\n\n{lines}"


class Table(NamedTuple):
    """A table to be rendered; every row has one cell per entry of `heads`."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def label_dataset(result: Result, *, with_languages: bool = False) -> str:
    """Label a result's dataset with its name and its differences from the published dataset."""
    data = list_data(result)
    parts = [
        f"{part[unit]:,} of {published[unit]:,} {unit}"
        for part in data.values()
        if (published := part.get("published") or {})
        for unit in _UNITS
        if unit in part and part[unit] != published.get(unit, part[unit])
    ][:1]
    if any("differs" in (part.get("checksums") or {}).values() for part in data.values()):
        parts.append("files differ")
    label = f"{result.dataset} ({', '.join(parts)})" if parts else result.dataset
    is_english = set(data) <= {"en", "None"}
    languages = f"{len(data)} languages" if len(data) > _SHOWN_LANGUAGES else "+".join(data)
    return label if is_english or not with_languages else f"{label} [{languages}]"


def list_data(result: Result) -> dict[str, Mapping[str, Any]]:
    """List the protocols of a result's data by language, sorted."""
    data = result.protocol["data"]
    parts = data["languages"] if "languages" in data else {str(data.get("lang")): data}
    return {lang: parts[lang] for lang in sorted(parts)}
