"""The report on results: tables for a terminal or Markdown, and what scores depend on.

There is a table for each question: a task, and for some tasks what is compared with what. A column
has the scores on one dataset, a row those of one model. Results that cannot be compared share no
table: they are refused.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections import UserList
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tabulate import tabulate

from .._suggestions import counted
from ..data.atomic_files import hash_json
from .metrics.scores import CONFIDENCE_LEVEL
from .results import OWN_PACKAGE, Result, find_differences, select_comparable
from .tasks.task_registry import find_task

_NOTE = f"[low, high]: {CONFIDENCE_LEVEL:.0%} confidence interval, by bootstrap over the test set."
_GAP = 2  # characters between columns
ABSENT = "–"
_SHOWN_OF_DIGEST = 8
_SHOWN_LANGUAGES = 3
_UNITS = ("images", "items", "captions", "classes")
# Choices of a task that are part of its title.
_SIDES = ("queries", "candidates")


class EvaluationResults(UserList[Result]):
    """Results of one or several models, printed as a table; they must be comparable."""

    def __repr__(self) -> str:
        return render_results(self, width=find_width())

    def _repr_markdown_(self) -> str:
        return render_results(self, style="markdown")


def find_width() -> int | None:
    """Return the width of the terminal in characters; None if the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def render_results(
    results: Sequence[Result],
    *,
    style: Literal["text", "markdown"] = "text",
    width: int | None = None,
    details: bool = False,
) -> str:
    """Render a table per question with intervals and chance, and tables of languages and lengths.

    A text that is wider than `width` characters is transposed, and if that is too wide as well, its
    cells are wrapped. Results that cannot be compared, such as those of two models of one name,
    raise ValueError.
    """
    results = list_comparable(results)
    tables = [*_list_scores(results), *(list_details(results) if details else ())]
    drawn = [_draw(table, style, width) for table in tables]
    if any("[" in cell for table in tables for row in table.rows for cell in row):
        drawn.append(f"{textwrap.fill(_NOTE, width or len(_NOTE))}\n")
    far = {  # once for all tasks
        f"{result.model} on {result.dataset}": result.run["far_images"]
        for result in results
        if "far_images" in result.run
    }
    for where, text in far.items():
        note = f"{where}: {text}"
        drawn.append(f"{textwrap.fill(note, width or len(note))}\n")
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
    """List the results, each once; raise ValueError if some cannot be compared."""
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
        then, now = map(select_comparable, (first.protocol, result.protocol))
        if differences := list(find_differences(then, now)):
            raise ValueError(
                f"{first.model} and {result.model} cannot be compared in {result.task} on "
                f"{result.dataset}: {differences[0]}. Evaluate both on the same data and in the "
                "same way."
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


def _draw(table: Table, style: str, width: int | None) -> str:
    title = table.title[0].upper() + table.title[1:]
    lines = [table.heads, *table.rows]
    if style == "markdown":
        heads, *rows = [
            [cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines
        ]
        drawn = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
        return f"**{title}**\n\n{drawn}\n"
    if width is None:
        return f"{title}\n\n{_draw_lines(lines)}"
    turned = [list(line) for line in zip(*lines, strict=True)]
    narrow = min(lines, turned, key=lambda shape: len(shape[0]))
    fitting = max(1, (width + _GAP) // len(narrow[0]) - _GAP)  # characters of a cell
    for shape, cell_width in ((lines, None), (turned, None), (narrow, fitting)):
        drawn = _draw_lines(shape, cell_width)
        if max(map(len, drawn.splitlines())) <= width:
            break
    return f"{textwrap.fill(title, width)}\n\n{drawn}"


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


class Table(NamedTuple):
    """A table before it is drawn; every row has the length of `heads`."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def label_dataset(result: Result, *, with_languages: bool = False) -> str:
    """Label the dataset of a result: its name, and what it lacks of what was published."""
    data = list_data(result)
    amounts = [amount for part in data.values() for amount in _list_amounts(part)]
    parts = [amount for amount in amounts if " of " in amount][:1]
    if any(map(_list_differing_files, data.values())):
        parts.append("files differ")
    label = f"{result.dataset} ({', '.join(parts)})" if parts else result.dataset
    is_english = set(data) <= {"en", "None"}
    return label if is_english or not with_languages else f"{label} [{_list_languages(data)}]"


def list_data(result: Result) -> dict[str, Mapping[str, Any]]:
    """List the protocols of a result's data by language, in the order of the languages."""
    data = result.protocol["data"]
    parts = data["languages"] if "languages" in data else {str(data.get("lang")): data}
    return {lang: parts[lang] for lang in sorted(parts)}


def list_sides(result: Result) -> list[str]:
    task = result.protocol["task"]
    return [f"{side}: {task[side]}" for side in _SIDES if side in task]


def list_details(results: Sequence[Result]) -> list[Table]:
    """Make the tables of everything that scores depend on."""
    heads = ["model type", "prompt", "max tokens", "padding", "case", "texts truncated", "images",
             "activation", "dtype", "run on", "fingerprint"]  # fmt: skip
    is_mixed = len({result.versions.get(OWN_PACKAGE) for result in results}) > 1

    def describe(result: Result) -> list[str]:
        version = [str(result.versions.get(OWN_PACKAGE))] if is_mixed else []
        return [*_describe_model(result), *version]

    models = _merge_tasks(results, lambda r: [r.model, label_dataset(r)], describe)
    # Another version may score otherwise; one version of all needs no column.
    heads += ["scored by version"] if is_mixed else []
    data_heads = ["languages", "split", "samples", "skipped", "files", "digest"]
    data = _merge_tasks(results, lambda r: [label_dataset(r)], _describe_data)
    return [
        Table("what the scores depend on", ["model", "dataset", "tasks", *heads], models),
        Table("the data", ["dataset", "tasks", *data_heads], data),
        _list_choices(results),
    ]


def _merge_tasks(
    results: Sequence[Result],
    name: Callable[[Result], list[str]],
    describe: Callable[[Result], list[str]],
) -> list[list[str]]:
    """Make one row for all tasks that have the same description."""
    tasks_of: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, None]] = {}
    for result in results:
        row = (tuple(name(result)), tuple(describe(result)))
        tasks_of.setdefault(row, {})[result.task] = None
    return [[*names, ", ".join(tasks), *cells] for (names, cells), tasks in tasks_of.items()]


def _describe_model(result: Result) -> list[str]:
    model = result.protocol["model"]
    text, images = model["text"] or {}, model["images"] or {}
    counts = result.counts.get("languages", {"": result.counts}).values()
    truncated = [count.get("texts_truncated") for count in counts]
    num_texts = sum(count["texts"] for count in counts)
    run, case, batches = result.run, text.get("lower_case"), ABSENT
    if "images_per_batch" in run:
        batches = f"{run['device']}, {run['images_per_batch']} images or "
        batches += f"{run['tokens_per_batch']:,} tokens at a time"
    return [
        model["model_type"],
        _format_prompt(text.get("prompt"), result),
        str(text.get("max_tokens", ABSENT)),
        str(text.get("padding", ABSENT)),
        {True: "lower", False: "as written", None: ABSENT}.get(case, str(case)),
        ABSENT if None in truncated else f"{sum(truncated)} of {num_texts}",
        _format_images(images),
        # That of texts and of images, once if they are the same.
        ", ".join(dict.fromkeys(s["activation"] for s in (text, images) if s.get("activation")))
        or ABSENT,
        model["dtype"],
        batches,
        hash_json(result.fingerprint)[:_SHOWN_OF_DIGEST],
    ]


def _describe_data(result: Result) -> list[str]:
    data = list_data(result)
    parts = list(data.values())
    digests = [str(part["digest"]) for part in parts]
    if len(digests) > _SHOWN_LANGUAGES:
        digests = [hash_json(digests)]
    return [
        _list_languages(data),
        ", ".join(dict.fromkeys(str(part.get("split", ABSENT)) for part in parts)),
        _describe_amounts(data),
        str(sum(int(part["skipped_samples"]) for part in parts)),
        _describe_files(parts),
        "+".join(digest[:_SHOWN_OF_DIGEST] for digest in digests),
    ]


def _list_choices(results: Sequence[Result]) -> Table:
    """List every choice of how a task is scored, once for all tasks that share it."""
    rows: dict[tuple[str, str], dict[str, None]] = {}
    for result in results:
        for name, value in _iterate_choices(result):
            others = [other for other in results if other.task == result.task]
            is_shared = all(dict(_iterate_choices(o)).get(name, value) == value for o in others)
            task = result.task if is_shared else f"{result.task} on {result.dataset}"
            rows.setdefault((name, value), {})[task] = None
    table = [[name, value, ", ".join(tasks)] for (name, value), tasks in sorted(rows.items())]
    return Table("how they were scored", ["choice", "taken", "tasks"], table)


def _iterate_choices(result: Result) -> Iterator[tuple[str, str]]:
    for name, value in result.protocol["task"].items():
        if name not in _SIDES:
            written = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield name.replace("_", " "), written


def _list_languages(data: Mapping[str, Any]) -> str:
    return f"{len(data)} languages" if len(data) > _SHOWN_LANGUAGES else "+".join(data)


def _list_amounts(data: Mapping[str, Any]) -> list[str]:
    """List how many there are, and of how many: `12 of 5,000 images`, `60 captions`."""
    published = data.get("published") or {}
    amounts = []
    for unit in _UNITS:
        if unit in data:
            have, wanted = data[unit], published.get(unit, data[unit])
            of = "" if have == wanted else f" of {wanted:,}"
            amounts.append(f"{have:,}{of} {unit}")
    return amounts


def _describe_amounts(languages: Mapping[str, Mapping[str, Any]]) -> str:
    amounts = {}
    for lang, data in languages.items():
        amount = ", ".join(_list_amounts(data)) or ABSENT
        if shared := data.get("captions_of_several_images"):
            amount += f"; {counted(shared, 'text')} of several images"
        is_captions_only = data.get("with_images") is False
        amounts[lang] = f"{amount}; only captions were read" if is_captions_only else amount
    lang, first = next(iter(amounts.items()))
    is_same = len(set(amounts.values())) == 1
    return first if is_same else f"{first} ({lang}; other languages have other numbers)"


def _list_differing_files(data: Mapping[str, Any]) -> list[str]:
    return [name for name, state in (data.get("checksums") or {}).items() if state != "published"]


def _describe_files(parts: Sequence[Mapping[str, Any]]) -> str:
    differing = dict.fromkeys(name for part in parts for name in _list_differing_files(part))
    if differing:
        return f"{', '.join(differing)}: not as published"
    return "as published" if all(part.get("checksums") for part in parts) else "not compared"


def _format_prompt(prompt: Any, result: Result) -> str:
    templates = [text for part in list_data(result).values() for text in part.get("templates", ())]
    parts = []
    if isinstance(prompt, Mapping):
        parts.append(f"{prompt['before']!r} … {prompt['after']!r}")
    elif prompt is not None:
        parts.append(repr(prompt))
    if len(templates) > 1:
        parts.append(f"{len(templates)} templates, {templates[0]!r} …")
    elif templates:
        parts.append(repr(templates[0]))
    return ", with ".join(parts) or "none"


def _format_images(images: Mapping[str, Any]) -> str:
    size = images.get("crop") or images.get("resize")
    if isinstance(size, Mapping):
        numbers = [value for value in size.values() if isinstance(value, int)]
        size = "x".join(map(str, numbers)) or size.get("size")
    if size is None and "max_num_patches" in images:
        size = f"{images['max_num_patches']} patches"
    parts = [size, images.get("interpolation"), images.get("mean") and
             f"mean {images['mean'][0]:.3g}"]  # fmt: skip
    return " ".join(str(part) for part in parts if part) or ABSENT
