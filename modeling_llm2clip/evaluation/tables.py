"""Several results side by side, as text or Markdown.

A column holds the scores of one data set as it was read, told by its digest: two languages of one
set, or two counts of excluded samples, are two columns, and their headings say in what they differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .contamination import FIELD as TRAINED_ON
from .contamination import write_trained
from .results import Result, list_digests
from .tasks.registry import find_task

STYLES = ("text", "markdown")
_ABSENT = "–"
_SHOWN_OF_DIGEST = 8
_SHOWN_LANGUAGES = 3


def render_results(results: Sequence[Result], *, style: str = "text") -> str:
    """Draw a table a task, a table of languages, and what each model's scores hang on.

    Args:
        results: of any models, sets and tasks.
        style: `"text"` for a terminal, `"markdown"` for a document.
    """
    if style not in STYLES:
        raise ValueError(f"style={style!r} is none of {STYLES}.")
    results = _tell_data_apart(results)
    parts = []
    for task in dict.fromkeys(result.task for result in results):
        of_task = [result for result in results if result.task == task]
        parts.append(_title(find_task(task).title, style) + _draw_task(task, of_task, style))
        for name in dict.fromkeys(result.set for result in of_task):
            chosen = [result for result in of_task if result.set == name]
            if "languages" in chosen[0].scores:
                title = f"{name}, text to picture R@1 by language"
                parts.append(_title(title, style) + _draw_languages(chosen, style))
            if "buckets" in chosen[0].scores:
                title = f"{name}, R@1 by length in CLIP's tokens"
                parts.append(_title(title, style) + _draw_lengths(chosen, style))
    parts.append(_title("what the scores hang on", style) + _draw_protocols(results, style))
    return "\n".join(parts)


def _tell_data_apart(results: Sequence[Result]) -> list[Result]:
    """The results, `set` longer where one task has results on several data of one set."""
    data_of: dict[tuple[str, str], dict[tuple[str, ...], str]] = {}
    for result in results:
        data_of.setdefault((result.task, result.set), {})[list_digests(result)] = _describe_data(
            result
        )
    told = []
    for result in results:
        known = data_of[result.task, result.set]
        digests = list_digests(result)
        parts = [known[digests]]
        if Counter(known.values())[known[digests]] > 1:
            parts.append("+".join(digest[:_SHOWN_OF_DIGEST] for digest in digests))
        is_alone = len(known) == 1
        told.append(
            result if is_alone else replace(result, set=f"{result.set} ({', '.join(parts)})")
        )
    return told


def _describe_data(result: Result) -> str:
    """Languages or how many there are, and how much there is, as in `en, 1000 pictures`."""
    data = result.protocol["data"]
    languages = data.get("languages")
    lang = data.get("lang") if languages is None else "+".join(sorted(languages)[:_SHOWN_LANGUAGES])
    if languages is not None and len(languages) > _SHOWN_LANGUAGES:
        lang = f"{len(languages)} languages"
    first = data if languages is None else next(iter(languages.values()))
    unit = next((name for name in ("pictures", "items", "captions") if first.get(name)), None)
    return ", ".join(filter(None, [lang, unit and f"{first[unit]} {unit}"])) or "other data"


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
    rows.append(["mean", *(_percent(_find(r.scores["mean"], path)) for r in results), _ABSENT])
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


def _draw_protocols(results: Sequence[Result], style: str) -> str:
    heads = ["model", "set", "tasks", "kind", "prompt", "max tokens", "texts cut", "pictures",
             "activation", "dtype", "excluded", "trained on"]  # fmt: skip
    tasks_of: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        key = (result.model, result.set, *_describe(result))
        tasks_of.setdefault(key, []).append(result.task)
    rows = [
        [model, name, ", ".join(tasks), *described]
        for (model, name, *described), tasks in tasks_of.items()
    ]
    return _draw(heads, rows, style)


def _describe(result: Result) -> list[str]:
    model = result.protocol["model"]
    text, pictures = model["text"] or {}, model["pictures"] or {}
    data = result.protocol["data"]
    parts = data.get("languages", {"": data}).values()
    excluded = sum(map(_count_excluded, parts))
    counts = result.counts.get("languages", {"": result.counts}).values()
    cut = [count.get("texts_cut") for count in counts]
    return [
        model["kind"],
        _write_prompt(text.get("prompt")),
        str(text.get("max_tokens", _ABSENT)),
        _ABSENT if None in cut else f"{sum(cut)} of {sum(c['texts'] for c in counts)}",
        _write_pictures(pictures),
        _write_activations(text, pictures),
        model["dtype"],
        str(excluded),
        ", ".join(dict.fromkeys(write_trained(part.get(TRAINED_ON)) for part in parts)),
    ]


def _count_excluded(data: Mapping[str, Any]) -> int:
    """Samples that were left out; earlier results have only the faults."""
    faults: Mapping[str, int] = data.get("excluded") or {}
    return int(data.get("excluded_samples", sum(faults.values())))


def _write_prompt(prompt: Any) -> str:
    if isinstance(prompt, Mapping):
        return f"{prompt['before']!r} … {prompt['after']!r}"
    return "none" if prompt is None else repr(prompt)


def _write_pictures(pictures: Mapping[str, Any]) -> str:
    size = pictures.get("crop") or pictures.get("resize")
    if isinstance(size, Mapping):
        numbers = [value for value in size.values() if isinstance(value, int)]
        size = "x".join(map(str, numbers)) or size.get("size")
    if size is None and "max_num_patches" in pictures:
        size = f"{pictures['max_num_patches']} patches"
    parts = [size, pictures.get("interpolation"), pictures.get("mean") and
             f"mean {pictures['mean'][0]:.3g}"]  # fmt: skip
    return " ".join(str(part) for part in parts if part) or _ABSENT


def _write_activations(*sides: Mapping[str, Any]) -> str:
    """Those of texts and pictures, once where they are the same."""
    found = dict.fromkeys(side["activation"] for side in sides if side.get("activation"))
    return ", ".join(found) or _ABSENT


def _find(scores: Mapping[str, Any], path: Iterable[str]) -> float | None:
    value: Any = scores
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value if isinstance(value, int | float) else None


def _percent(share: float | None) -> str:
    return _ABSENT if share is None else f"{100 * share:.1f} %"


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
