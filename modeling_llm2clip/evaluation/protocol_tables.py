"""What scores hang on, as rows of tables: the models, the data, and how each task was scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .labels import (
    SIDES,
    describe_amount,
    describe_languages,
    list_data,
    list_other_files,
    shorten_digests,
    shorten_fingerprint,
)
from .results import OWN_PACKAGE, Result

ABSENT = "–"


class Table(NamedTuple):
    """A table before it is drawn; every row is as long as `heads`."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def list_protocol_tables(results: Sequence[Result]) -> list[Table]:
    """Lay out everything that results which were told apart hang on."""
    return [_list_models(results), _list_data(results), _list_choices(results)]


def _list_models(results: Sequence[Result]) -> Table:
    heads = ["kind", "prompt", "max tokens", "padding", "letter case", "texts cut", "images",
             "activation", "dtype", "run on", "fingerprint"]  # fmt: skip
    is_mixed = len({result.versions.get(OWN_PACKAGE) for result in results}) > 1

    def describe(result: Result) -> list[str]:
        version = [str(result.versions.get(OWN_PACKAGE))] if is_mixed else []
        return [*_describe_model(result), *version]

    rows = _gather_tasks(results, lambda result: [result.model, result.set], describe)
    # Another version may score otherwise; one version of all needs no column.
    heads += ["scored by version"] if is_mixed else []
    return Table("what the scores hang on", ["model", "set", "tasks", *heads], rows)


def _list_data(results: Sequence[Result]) -> Table:
    heads = ["languages", "split", "samples", "excluded", "files", "digest"]
    rows = _gather_tasks(results, lambda result: [result.set], _describe_data)
    return Table("the data", ["set", "tasks", *heads], rows)


def _gather_tasks(
    results: Sequence[Result],
    name: Callable[[Result], list[str]],
    describe: Callable[[Result], list[str]],
) -> list[list[str]]:
    """One row for all tasks of which the same is to be said."""
    tasks_of: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, None]] = {}
    for result in results:
        key = (tuple(name(result)), tuple(describe(result)))
        tasks_of.setdefault(key, {})[result.task] = None
    return [[*names, ", ".join(tasks), *told] for (names, told), tasks in tasks_of.items()]


def _describe_model(result: Result) -> list[str]:
    model = result.protocol["model"]
    text, images = model["text"] or {}, model["images"] or {}
    counts = result.counts.get("languages", {"": result.counts}).values()
    cut = [count.get("texts_truncated") for count in counts]
    batch = result.run.get("batch_size")
    return [
        model["kind"],
        _write_prompt(text.get("prompt"), _list_templates(result)),
        str(text.get("max_tokens", ABSENT)),
        str(text.get("padding", ABSENT)),
        _write_case(text.get("lower_case")),
        ABSENT if None in cut else f"{sum(cut)} of {sum(c['texts'] for c in counts)}",
        _write_images(images),
        _write_activations(text, images),
        model["dtype"],
        f"{result.run['device']}, {batch} at a time" if batch else ABSENT,
        shorten_fingerprint(result),
    ]


def _describe_data(result: Result) -> list[str]:
    parts = list(list_data(result).values())
    return [
        describe_languages(result),
        ", ".join(dict.fromkeys(str(part.get("split", ABSENT)) for part in parts)),
        _write_amounts(list_data(result)),
        str(sum(map(_count_excluded, parts))),
        _write_files(parts),
        shorten_digests(result),
    ]


def _write_amounts(languages: Mapping[str, Mapping[str, Any]]) -> str:
    amounts = {lang: _write_amount(data) for lang, data in languages.items()}
    lang, first = next(iter(amounts.items()))
    is_same = len(set(amounts.values())) == 1
    return first if is_same else f"{first} ({lang}; other languages have other numbers)"


def _write_amount(data: Mapping[str, Any]) -> str:
    amount = describe_amount(data) or ABSENT
    return f"{amount}; captions alone were read" if data.get("with_images") is False else amount


def _count_excluded(data: Mapping[str, Any]) -> int:
    """Samples that were left out or, where these are not counted, their errors."""
    errors: Mapping[str, int] = data.get("excluded") or {}
    return int(data.get("skipped_samples", sum(errors.values())))


def _write_files(parts: Sequence[Mapping[str, Any]]) -> str:
    """Whether the files are those that were published, where that is known."""
    others = dict.fromkeys(name for part in parts for name in list_other_files(part))
    if others:
        return f"{', '.join(others)}: not as published"
    return "as published" if all(part.get("checksums") for part in parts) else "not compared"


def _list_choices(results: Sequence[Result]) -> Table:
    """Every choice of how a task is scored, once for all tasks that share it."""
    rows: dict[tuple[str, str], dict[str, None]] = {}
    for result in results:
        for name, value in _iterate_choices(result):
            others = [other for other in results if other.task == result.task]
            is_shared = all(dict(_iterate_choices(o)).get(name, value) == value for o in others)
            task = result.task if is_shared else f"{result.task} on {result.set}"
            rows.setdefault((name, value), {})[task] = None
    table = [[name, value, ", ".join(tasks)] for (name, value), tasks in sorted(rows.items())]
    return Table("how they were scored", ["choice", "taken", "tasks"], table)


def _iterate_choices(result: Result) -> Iterator[tuple[str, str]]:
    for name, value in result.protocol["task"].items():
        if name not in SIDES:
            told = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield name.replace("_", " "), told


def _list_templates(result: Result) -> list[str]:
    return [text for part in list_data(result).values() for text in part.get("templates", ())]


def _write_prompt(prompt: Any, templates: Sequence[str]) -> str:
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


def _write_case(lower_case: Any) -> str:
    if lower_case is None:
        return ABSENT
    if isinstance(lower_case, bool):
        return "lower" if lower_case else "as written"
    return str(lower_case)


def _write_images(images: Mapping[str, Any]) -> str:
    size = images.get("crop") or images.get("resize")
    if isinstance(size, Mapping):
        numbers = [value for value in size.values() if isinstance(value, int)]
        size = "x".join(map(str, numbers)) or size.get("size")
    if size is None and "max_num_patches" in images:
        size = f"{images['max_num_patches']} patches"
    parts = [size, images.get("interpolation"), images.get("mean") and
             f"mean {images['mean'][0]:.3g}"]  # fmt: skip
    return " ".join(str(part) for part in parts if part) or ABSENT


def _write_activations(*sides: Mapping[str, Any]) -> str:
    """Those of texts and images, once where they are the same."""
    found = dict.fromkeys(side["activation"] for side in sides if side.get("activation"))
    return ", ".join(found) or ABSENT
