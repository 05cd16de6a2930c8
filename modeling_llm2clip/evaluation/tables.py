"""Several results side by side, as text or Markdown.

There is a table for each question: a task, and for some tasks what is compared with what. A column
has the scores on one dataset, a row those of one model. Results that cannot be compared share no
table: they are refused.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from tabulate import tabulate

from .result_details import ABSENT, Table, label_dataset, list_details, list_sides
from .results import Result, find_differences
from .tasks.task import CONFIDENCE_LEVEL
from .tasks.task_registry import find_task

STYLES = ("text", "markdown")
_NOTE = f"[low, high]: {CONFIDENCE_LEVEL:.0%} confidence interval, by bootstrap over the test set."
_GAP = 2  # characters between columns
_MIN_CELL = 20  # characters; narrower cells are hard to read


class EvaluationResults(Sequence[Result]):
    """Results of one or several models, printed as a table.

    Args:
        results: The results, which must be comparable.
    """

    def __init__(self, results: Iterable[Result]) -> None:
        self._results = tuple(results)

    @overload
    def __getitem__(self, index: int) -> Result: ...

    @overload
    def __getitem__(self, index: slice) -> EvaluationResults: ...

    def __getitem__(self, index: int | slice) -> Result | EvaluationResults:
        found = self._results[index]
        return found if isinstance(found, Result) else EvaluationResults(found)

    def __len__(self) -> int:
        return len(self._results)

    def __str__(self) -> str:
        return render_results(self, width=find_width())

    def _repr_markdown_(self) -> str:
        return render_results(self, style="markdown")


def find_width() -> int | None:
    """Return the width of the terminal in characters; None if the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def render_results(
    results: Sequence[Result],
    *,
    style: str = "text",
    width: int | None = None,
    details: bool = False,
) -> str:
    """Render a table per question with intervals and chance, and tables of languages and lengths.

    Args:
        results: Results of any models, datasets and tasks.
        style: `"text"` for a terminal, `"markdown"` for a document.
        width: Characters that a line of text may have; None for any number. A wider table is
            transposed, and if that is too wide as well, its cells are wrapped and its columns put
            into several blocks.
        details: Also render what the scores depend on: models, data, how they were scored.

    Raises:
        ValueError: Results cannot be compared: two models have one name, or scores of a task on a
            dataset are of different data or were computed in different ways.
    """
    if style not in STYLES:
        raise ValueError(f"style={style!r} must be one of {', '.join(STYLES)}.")
    results = _require_comparable(results)
    tables = [*_list_scores(results), *(list_details(results) if details else ())]
    drawn = [_draw_markdown(t) if style == "markdown" else _draw_text(t, width) for t in tables]
    if any("[" in cell for table in tables for row in table.rows for cell in row):
        drawn.append(f"{textwrap.fill(_NOTE, width or len(_NOTE))}\n")
    for note in _list_far_images(results):
        drawn.append(f"{textwrap.fill(note, width or len(note))}\n")
    return "\n".join(drawn)


def _list_far_images(results: Sequence[Result]) -> list[str]:
    """List which datasets are unlike what a model was trained on, once for all tasks."""
    found = {
        (result.model, result.dataset): result.run["far_images"]
        for result in results
        if "far_images" in result.run
    }
    return [f"{model} on {dataset}: {text}" for (model, dataset), text in found.items()]


def describe_scores(result: Result) -> str:
    """Describe the scores that a table shows of a result, with intervals and chance, in one line.

    Args:
        result: The result.
    """
    task = find_task(result.task)
    parts = []
    for title, path in task.headline.items():
        if (score := _format_score(result.scores, path)) == ABSENT:
            continue
        chance = _find(result.scores, task.chance.get(title, ()))
        suffix = "" if chance is None else f", chance {_percent(chance)}"
        parts.append(f"{title} {score}{suffix}")
    return "; ".join(parts)


def _require_comparable(results: Sequence[Result]) -> list[Result]:
    """Return the results, each once; raise ValueError if some cannot be compared."""
    models: dict[str, Result] = {}
    columns: dict[tuple[str, str], Result] = {}
    cells: dict[tuple[str, str, str], Result] = {}
    for result in results:
        first = models.setdefault(result.model, result)
        if differences := list(find_differences(first.fingerprint, result.fingerprint)):
            raise ValueError(
                f"Two models are named {result.model}: {differences[0]}. Give each a name of its "
                "own (NAME=SOURCE) when you evaluate it."
            )
        first = columns.setdefault((result.task, result.dataset), result)
        for what in ("data", "task"):
            then, now = {what: first.protocol[what]}, {what: result.protocol[what]}
            if differences := list(find_differences(then, now)):
                raise ValueError(
                    f"{first.model} and {result.model} cannot be compared in {result.task} on "
                    f"{result.dataset}: {differences[0]}. Evaluate both on the same data and in "
                    "the same way."
                )
        first = cells.setdefault((result.model, result.task, result.dataset), result)
        for what in ("protocol", "scores"):
            then, now = getattr(first, what), getattr(result, what)
            if differences := list(find_differences(then, now, what)):
                raise ValueError(
                    f"Two results of {result.model} for {result.task} on {result.dataset} differ: "
                    f"{differences[0]}. Leave one out."
                )
    return list(cells.values())


def _find_question(result: Result) -> tuple[str, str]:
    """Return the task, and its title with what is compared with what."""
    return result.task, "; ".join([find_task(result.task).title, *list_sides(result)])


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
    """Return the first number: chance is the same for all models on the same data."""
    found = (_find(of_model, path) for of_model in scores)
    return next((value for value in found if value is not None), None)


def _format_score(scores: Mapping[str, Any], path: tuple[str, ...]) -> str:
    """Format a score, with its interval if there is one."""
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


def _draw_markdown(table: Table) -> str:
    lines = [table.heads, *table.rows]
    heads, *rows = [
        [cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines
    ]
    drawn = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
    return f"**{_capitalize(table.title)}**\n\n{drawn}\n"


def _draw_text(table: Table, width: int | None) -> str:
    title = _capitalize(table.title)
    lines = [table.heads, *table.rows]
    turned = [list(line) for line in zip(*lines, strict=True)]
    if width is None:
        return f"{title}\n\n{_draw_lines(lines)}"
    for shape in (lines, turned):
        drawn = _draw_lines(shape)
        if max(map(len, drawn.splitlines())) <= width:
            break
    else:
        drawn = _draw_blocks(turned, width)
    return f"{textwrap.fill(title, width)}\n\n{drawn}"


def _draw_blocks(lines: Sequence[list[str]], width: int) -> str:
    """Wrap cells, and split the columns into blocks that each begin with the first column."""
    num_columns = max(1, (width + _GAP) // (_MIN_CELL + _GAP) - 1)
    drawn = []
    for start in range(1, len(lines[0]), num_columns):
        block = [[line[0], *line[start : start + num_columns]] for line in lines]
        drawn.append(_draw_lines(block, (width + _GAP) // len(block[0]) - _GAP))
    return "\n".join(drawn)


def _draw_lines(lines: Sequence[list[str]], cell_width: int | None = None) -> str:
    heads, *rows = lines
    drawn = tabulate(
        rows,
        heads,
        tablefmt="simple",
        disable_numparse=True,
        maxcolwidths=cell_width,
        maxheadercolwidths=cell_width,
    )
    return "".join(f"{line.rstrip()}\n" for line in drawn.splitlines())


def _capitalize(title: str) -> str:
    return title[0].upper() + title[1:]
