"""Several results side by side, as text or Markdown.

A column holds the scores of one data set as it was read, told by its digest, under one protocol of
the task: two languages of one set, two counts of excluded samples or two rules for ties are two
columns, and their headings say in what they differ. A row is one model, told by its fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .labels import find_question, tell_apart
from .protocol_tables import ABSENT, list_protocol_tables
from .results import Result
from .tasks.registry import find_task

STYLES = ("text", "markdown")


def render_results(results: Sequence[Result], *, style: str = "text") -> str:
    """Draw a table a question, tables of languages and lengths, and what the scores hang on.

    Args:
        results: of any models, sets and tasks.
        style: `"text"` for a terminal, `"markdown"` for a document.
    Raises: ValueError when two differ that ask one question of one model on the same data.
    """
    if style not in STYLES:
        raise ValueError(f"style={style!r} is none of {STYLES}.")
    results = tell_apart(results)
    parts = []
    for question in dict.fromkeys(map(find_question, results)):
        asked = [result for result in results if find_question(result) == question]
        task, title = question
        parts.append(_title(title, style) + _draw_task(task, asked, style))
        for name in dict.fromkeys(result.set for result in asked):
            chosen = [result for result in asked if result.set == name]
            if "languages" in chosen[0].scores:
                title = f"{name}, text to picture R@1 by language"
                parts.append(_title(title, style) + _draw_languages(chosen, style))
            if "buckets" in chosen[0].scores:
                title = f"{name}, R@1 by length in CLIP's tokens"
                parts.append(_title(title, style) + _draw_lengths(chosen, style))
    for table in list_protocol_tables(results):
        parts.append(_title(table.title, style) + _draw(table.heads, table.rows, style))
    return "\n".join(parts)


def _draw_task(task: str, results: Sequence[Result], style: str) -> str:
    sets = dict.fromkeys(result.set for result in results)
    columns = [
        (name, title, path)
        for name in sets
        for title, path in find_task(task).headline.items()
        if any(_find(r.scores, path) is not None for r in results if r.set == name)
    ]
    rows = []
    for model in dict.fromkeys(result.model for result in results):
        of_model = {result.set: result.scores for result in results if result.model == model}
        cells = [_percent(_find(of_model.get(name, {}), path)) for name, _, path in columns]
        rows.append([model, *cells])
    return _draw(["model", *(f"{name}: {title}" for name, title, _ in columns)], rows, style)


def _draw_languages(results: Sequence[Result], style: str) -> str:
    languages = dict.fromkeys(lang for r in results for lang in r.scores["languages"])
    path = ("text_to_image", "hit_rate_at_1")
    rows = [
        [lang, *(_percent(_find(r.scores["languages"].get(lang, {}), path)) for r in results),
         _percent(_chance_of(results, lang))]
        for lang in languages
    ]  # fmt: skip
    rows.append(["mean", *(_percent(_find(r.scores["mean"], path)) for r in results), ABSENT])
    return _draw(["language", *(result.model for result in results), "chance"], rows, style)


def _chance_of(results: Sequence[Result], lang: str) -> float | None:
    path = ("languages", lang, "text_to_image", "chance_hit_rate_at_1")
    found = [_find(result.scores, path) for result in results]
    return next((value for value in found if value is not None), None)


def _draw_lengths(results: Sequence[Result], style: str) -> str:
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
                *(_percent(_find(bucket, ("hit_rate_at_1", "value"))) for bucket in of_models),
            ]
        )
    heads = ["tokens", "texts", "beyond 77", *(result.model for result in results)]
    return _draw(heads, rows, style)


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


def _title(text: str, style: str) -> str:
    heading = text[0].upper() + text[1:]
    return f"**{heading}**\n\n" if style == "markdown" else f"{heading}\n\n"


def _draw(heads: Sequence[str], rows: Sequence[Sequence[str]], style: str) -> str:
    if style == "markdown":
        lines: list[Sequence[str]] = [heads, ["---"] * len(heads), *rows]
        escaped = [
            [cell.replace("|", "\\|").replace("\n", " ") for cell in cells] for cells in lines
        ]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in escaped)
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        + "\n"
        for cells in lines
    )
