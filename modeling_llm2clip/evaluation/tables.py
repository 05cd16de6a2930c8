"""Several results side by side, as text or Markdown.

A column holds the scores of one data set as it was read, told by its digest, under one protocol of
the task: two languages of one set, two counts of excluded samples or two rules for ties are two
columns, and their headings say in what they differ. A row is one model, told by its fingerprint.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from .labels import disambiguate, find_question
from .protocol_tables import ABSENT, Table, list_protocol_tables
from .results import Result
from .tasks.task import CONFIDENCE_LEVEL
from .tasks.task_registry import find_task

STYLES = ("text", "markdown")
_GAP = "  "
_NOTE = f"[low, high]: {CONFIDENCE_LEVEL:.0%} confidence interval, by bootstrap over the test set."
_LEAST_CELL = 20  # characters; a cell is wrapped at a third of the width, not below


def render_results(
    results: Sequence[Result],
    *,
    style: str = "text",
    width: int | None = None,
    details: bool = False,
) -> str:
    """Draw a table a question with intervals and chance, and tables of languages and lengths.

    Args:
        results: of any models, sets and tasks.
        style: `"text"` for a terminal, `"markdown"` for a document.
        width: characters that a line of text may have; None for any number. A table that is wider
            has its rows as columns, or its long cells wrapped, or both and blocks of columns.
        details: also draw what the scores hang on: models, data, how they were scored.
    Raises: ValueError when two differ that ask one question of one model on the same data.
    """
    if style not in STYLES:
        raise ValueError(f"style={style!r} is none of {STYLES}.")
    results = disambiguate(results)
    tables = [*_list_scores(results), *(list_protocol_tables(results) if details else ())]
    if style == "markdown":
        drawn = list(map(_draw_markdown, tables))
    else:
        drawn = [_draw_text(table, width) for table in tables]
    if any("[" in cell for table in tables for row in table.rows for cell in row):
        drawn.append(f"{textwrap.fill(_NOTE, width or len(_NOTE))}\n")
    return "\n".join(drawn)


def write_headline(result: Result) -> str:
    """The scores that a table shows of a result, with intervals and chance, in one line."""
    task = find_task(result.task)
    parts = []
    for title, path in task.headline.items():
        if (score := _write_score(result.scores, path)) == ABSENT:
            continue
        chance = _find(result.scores, task.chance.get(title, ()))
        beside = "" if chance is None else f", chance {_percent(chance)}"
        parts.append(f"{title} {score}{beside}")
    return "; ".join(parts)


def _list_scores(results: Sequence[Result]) -> Iterator[Table]:
    for question in dict.fromkeys(map(find_question, results)):
        asked = [result for result in results if find_question(result) == question]
        yield _compare(*question, asked)
        for name in dict.fromkeys(result.set for result in asked):
            chosen = [result for result in asked if result.set == name]
            if "languages" in chosen[0].scores:
                yield _compare_languages(name, chosen)
            if "buckets" in chosen[0].scores:
                yield _compare_lengths(name, chosen)


def _compare(task: str, title: str, results: Sequence[Result]) -> Table:
    sets = dict.fromkeys(result.set for result in results)
    headline, chance = find_task(task).headline, find_task(task).chance
    columns = [
        (name, score, path)
        for name in sets
        for score, path in headline.items()
        if any(_find(r.scores, path) is not None for r in results if r.set == name)
    ]
    rows = []
    for model in dict.fromkeys(result.model for result in results):
        of_model = {result.set: result.scores for result in results if result.model == model}
        cells = [_write_score(of_model.get(name, {}), path) for name, _, path in columns]
        rows.append([model, *cells])
    chances = [
        _find_first([r.scores for r in results if r.set == name], chance.get(score, ()))
        for name, score, _ in columns
    ]
    if any(value is not None for value in chances):
        rows.append(["chance", *map(_percent, chances)])
    heads = ["model", *(f"{name}: {score}" for name, score, _ in columns)]
    return Table(title, heads, rows)


def _compare_languages(name: str, results: Sequence[Result]) -> Table:
    languages = dict.fromkeys(lang for r in results for lang in r.scores["languages"])
    path, chance = (("t2i", name) for name in ("hit_rate_at_1", "chance_hit_rate_at_1"))
    rows = [
        [lang, *(_write_score(r.scores["languages"].get(lang, {}), path) for r in results),
         _percent(_find_first([r.scores["languages"].get(lang, {}) for r in results], chance))]
        for lang in languages
    ]  # fmt: skip
    means = [result.scores["mean"] for result in results]
    rows.append(["mean", *(_write_score(mean, path) for mean in means),
                 _percent(_find_first(means, chance))])  # fmt: skip
    heads = ["language", *(result.model for result in results), "chance"]
    return Table(f"{name}, text to image R@1 by language", heads, rows)


def _find_first(scores: Iterable[Mapping[str, Any]], path: tuple[str, ...]) -> float | None:
    """The number of the first that has it: chance is the same for all models on the same data."""
    found = (_find(of_model, path) for of_model in scores)
    return next((value for value in found if value is not None), None)


def _write_score(scores: Mapping[str, Any], path: tuple[str, ...]) -> str:
    """A score, and the interval that stands beside it where there is one."""
    value = _find(scores, path)
    *parents, name = path
    beside = parents if name == "value" else [*parents, "intervals", name]
    low, high = (_find(scores, (*beside, bound)) for bound in ("low", "high"))
    if value is None or low is None or high is None:
        return _percent(value)
    return f"{_percent(value)} [{100 * low:.1f}, {100 * high:.1f}]"


def _compare_lengths(name: str, results: Sequence[Result]) -> Table:
    bounds = {
        (bucket["from_clip_tokens"], bucket["to_clip_tokens"])
        for result in results
        for bucket in result.scores["buckets"]
    }
    rows = []
    for low, high in sorted(bounds):
        of_models = [_find_bucket(result, low) for result in results]
        first = next(bucket for bucket in of_models if bucket)
        rows.append(
            [
                f"{low} to {high}" if high else f"{low} and more",
                str(first["queries"]),
                _percent(first["share_of_tokens_beyond_clip"]),
                *(_write_score(bucket, ("hit_rate_at_1", "value")) for bucket in of_models),
            ]
        )
    heads = ["tokens", "texts", "beyond 77", *(result.model for result in results)]
    return Table(f"{name}, R@1 by length in CLIP's tokens", heads, rows)


def _find_bucket(result: Result, low: int) -> Mapping[str, Any]:
    return next((b for b in result.scores["buckets"] if b["from_clip_tokens"] == low), {})


def _find(scores: Mapping[str, Any], path: Iterable[str]) -> float | None:
    value: Any = scores
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value if isinstance(value, int | float) else None


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f} %"


def _capitalize(title: str) -> str:
    return title[0].upper() + title[1:]


def _draw_markdown(table: Table) -> str:
    lines: list[Sequence[str]] = [table.heads, ["---"] * len(table.heads), *table.rows]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in cells] for cells in lines]
    rows = "".join(f"| {' | '.join(cells)} |\n" for cells in escaped)
    return f"**{_capitalize(table.title)}**\n\n{rows}"


def _draw_text(table: Table, width: int | None) -> str:
    title = _capitalize(table.title)
    lines: list[Sequence[str]] = [table.heads, *table.rows]
    if width is None:
        return f"{title}\n\n{_align(lines)}"
    cell_width = max(_LEAST_CELL, width // 3)
    wrapped = [[textwrap.fill(cell, cell_width) for cell in line] for line in lines]
    shapes = (lines, _turn(lines), wrapped, _turn(wrapped))
    shape = next((shape for shape in shapes if _add_up(_find_widths(shape)) <= width), shapes[-1])
    blocks = "\n".join(map(_align, _cut(shape, width)))
    return f"{textwrap.fill(title, width)}\n\n{blocks}"


def _turn(lines: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    return list(zip(*lines, strict=True))


def _find_widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [
        max(len(part) for cell in column for part in cell.split("\n"))
        for column in zip(*lines, strict=True)
    ]


def _add_up(widths: Sequence[int]) -> int:
    """Characters of a line that has columns of these widths."""
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _cut(lines: Sequence[Sequence[str]], width: int) -> list[list[list[str]]]:
    """Blocks of as many columns as fit, each with the first column before them."""
    widths = _find_widths(lines)
    blocks: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        wanted = [widths[other] for other in (0, *blocks[-1], column)]
        if blocks[-1] and _add_up(wanted) > width:
            blocks.append([])
        blocks[-1].append(column)
    return [[[line[0], *(line[column] for column in block)] for line in lines] for block in blocks]


def _align(lines: Sequence[Sequence[str]]) -> str:
    """The first line, a rule, and the others; a cell may have several lines of its own."""
    widths = _find_widths(lines)
    drawn = []
    for cells in [lines[0], ["-" * width for width in widths], *lines[1:]]:
        for parts in zip_longest(*(cell.split("\n") for cell in cells), fillvalue=""):
            padded = (part.ljust(width) for part, width in zip(parts, widths, strict=True))
            drawn.append(_GAP.join(padded).rstrip())
    return "\n".join(drawn) + "\n"
