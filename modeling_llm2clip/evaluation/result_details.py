"""What results say besides their scores: which data, which models, how they were scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..data.atomic_files import hash_json
from .results import OWN_PACKAGE, Result

ABSENT = "–"
_SHOWN_OF_DIGEST = 8
_SHOWN_LANGUAGES = 3
_UNITS = ("images", "items", "captions", "classes")
# Choices of a task that are part of its title.
_SIDES = ("queries", "candidates")


class Table(NamedTuple):
    """A table before it is drawn; every row has the length of `heads`."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def label_dataset(result: Result, *, with_languages: bool = False) -> str:
    """Label the dataset of a result: its name, and what it lacks of what was published.

    Args:
        result: The result.
        with_languages: Also name the languages, unless there is only English.
    """
    parts = []
    if (amount := _describe_first_amount(result)) and " of " in amount:
        parts.append(amount)
    if any(map(_list_differing_files, list_data(result).values())):
        parts.append("files differ")
    label = f"{result.dataset} ({', '.join(parts)})" if parts else result.dataset
    is_english = set(list_data(result)) <= {"en", "None"}
    return label if is_english or not with_languages else f"{label} [{_list_languages(result)}]"


def list_data(result: Result) -> dict[str, Mapping[str, Any]]:
    """List the protocols of a result's data by language, in the order of the languages.

    Args:
        result: The result.
    """
    data = result.protocol["data"]
    parts = data["languages"] if "languages" in data else {str(data.get("lang")): data}
    return {lang: parts[lang] for lang in sorted(parts)}


def list_sides(result: Result) -> list[str]:
    """List what is compared with what, if the task says it.

    Args:
        result: The result.
    """
    task = result.protocol["task"]
    return [f"{side}: {task[side]}" for side in _SIDES if side in task]


def list_details(results: Sequence[Result]) -> list[Table]:
    """Make the tables of everything that scores depend on.

    Args:
        results: Results that can be compared.
    """
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
    batch = result.run.get("batch_size")
    return [
        model["model_type"],
        _format_prompt(text.get("prompt"), result),
        str(text.get("max_tokens", ABSENT)),
        str(text.get("padding", ABSENT)),
        _format_case(text.get("lower_case")),
        ABSENT if None in truncated else f"{sum(truncated)} of {num_texts}",
        _format_images(images),
        # That of texts and of images, once if they are the same.
        ", ".join(dict.fromkeys(s["activation"] for s in (text, images) if s.get("activation")))
        or ABSENT,
        model["dtype"],
        f"{result.run['device']}, {batch} at a time" if batch else ABSENT,
        hash_json(result.fingerprint)[:_SHOWN_OF_DIGEST],
    ]


def _describe_data(result: Result) -> list[str]:
    parts = list(list_data(result).values())
    return [
        _list_languages(result),
        ", ".join(dict.fromkeys(str(part.get("split", ABSENT)) for part in parts)),
        _describe_amounts(list_data(result)),
        str(sum(int(part["skipped_samples"]) for part in parts)),
        _describe_files(parts),
        _shorten_digests(result),
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


def _list_languages(result: Result) -> str:
    """List the languages, or say how many there are."""
    languages = list_data(result)
    if len(languages) > _SHOWN_LANGUAGES:
        return f"{len(languages)} languages"
    return "+".join(languages)


def _shorten_digests(result: Result) -> str:
    """Shorten the digest of each language, or that of all if there are many."""
    digests = [str(data["digest"]) for data in list_data(result).values()]
    if len(digests) > _SHOWN_LANGUAGES:
        digests = [hash_json(digests)]
    return "+".join(digest[:_SHOWN_OF_DIGEST] for digest in digests)


def _describe_amount(data: Mapping[str, Any], units: Iterable[str] = _UNITS) -> str:
    """Say how much there is, and of how much: `12 of 5,000 images, 60 of 25,000 captions`."""
    published = data.get("published") or {}
    amounts = []
    for unit in units:
        if unit not in data:
            continue
        have, wanted = data[unit], published.get(unit, data[unit])
        of = "" if have == wanted else f" of {wanted:,}"
        amounts.append(f"{have:,}{of} {unit}")
    return ", ".join(amounts)


def _describe_first_amount(result: Result) -> str:
    """Say how many images, items or captions; of the first language that lacks some."""
    found = []
    for data in list_data(result).values():
        units = [unit for unit in _UNITS if unit in data]
        published = data.get("published") or {}
        lacking = [unit for unit in units if data[unit] != published.get(unit, data[unit])]
        found.append(_describe_amount(data, (lacking or units)[:1]))
    return next((amount for amount in found if " of " in amount), found[0])


def _describe_amounts(languages: Mapping[str, Mapping[str, Any]]) -> str:
    amounts = {}
    for lang, data in languages.items():
        amount = _describe_amount(data) or ABSENT
        is_captions_only = data.get("with_images") is False
        amounts[lang] = f"{amount}; only captions were read" if is_captions_only else amount
    lang, first = next(iter(amounts.items()))
    is_same = len(set(amounts.values())) == 1
    return first if is_same else f"{first} ({lang}; other languages have other numbers)"


def _list_differing_files(data: Mapping[str, Any]) -> list[str]:
    """List the files that are not the published ones."""
    return [name for name, state in (data.get("checksums") or {}).items() if state != "published"]


def _describe_files(parts: Sequence[Mapping[str, Any]]) -> str:
    """Say whether the files are the published ones, if that is known."""
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


def _format_case(lower_case: Any) -> str:
    if isinstance(lower_case, bool):
        return "lower" if lower_case else "as written"
    return ABSENT if lower_case is None else str(lower_case)


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
