"""The registry: every set by its name, what is known of it, and how it is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..._suggestions import did_you_mean
from ...data.record_loading import fetch_dataset_folder, find_example_data
from .catalog import compositional as choices
from .catalog import cross_lingual, long_captions, short_captions
from .catalog import custom_folder as own
from .catalog import image_classification as classification
from .dataset_spec import DatasetSpec, ReadRequest
from .schema import EvaluationSet
from .validation import DatasetValidator, ReadingCache

_CARDS: dict[str, DatasetSpec] = {
    card.name: card
    for card in (
        *short_captions.DATASETS,
        *long_captions.DATASETS,
        *cross_lingual.DATASETS,
        *classification.DATASETS,
        *choices.DATASETS,
        *own.DATASETS,
    )
}


def list_datasets() -> list[DatasetSpec]:
    """Every card, sorted by name."""
    return [_CARDS[name] for name in sorted(_CARDS)]


def find_dataset(name: str) -> DatasetSpec:
    """The card of a set.

    Raises: ValueError for an unknown name, listing the known ones.
    """
    if name not in _CARDS:
        raise ValueError(
            f"There is no set {name!r}. Known: {', '.join(sorted(_CARDS))}."
            f"{did_you_mean(name, _CARDS)}"
        )
    return _CARDS[name]


def find_languages(
    name: str | DatasetSpec,
    folder: str | Path | None = None,
    *,
    ignore_fields: Collection[str] = (),
    image_dir: str | Path | None = None,
    require_images: bool = True,
    cache: ReadingCache | None = None,
) -> tuple[str, ...]:
    """The languages that a set has: as its card says, or as the folder has.

    The arguments are those of `load_dataset`.
    """
    card = find_dataset(name) if isinstance(name, str) else name
    if card.find_languages is None:
        return card.languages
    request = ReadRequest(
        find_folder(card, folder),
        image_dir=_find_images(image_dir),
        ignore_fields=tuple(ignore_fields),
        require_images=require_images,
    )
    return card.find_languages(request, DatasetValidator(card.name, cache=cache))


def load_dataset(
    name: str | DatasetSpec,
    folder: str | Path | None = None,
    *,
    image_dir: str | Path | None = None,
    lang: str | None = None,
    skip_invalid: bool = False,
    require_images: bool = True,
    check_images: bool = True,
    class_names: Mapping[str, str] | Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    allow_repeated_class_names: bool = False,
    ignore_fields: Collection[str] = (),
    show_progress: bool = False,
    cache: ReadingCache | None = None,
) -> EvaluationSet:
    """Read a set as its publisher ships it; nothing is skipped that is not counted.

    Args:
        name: of a card, or a card of one's own.
        folder: the publisher's files, or `hub:owner/name@commit` for Parquet files on the Hub;
            None for a set that the package holds.
        image_dir: folder of the images, where they do not lie in `folder`.
        lang: which language; needed where there are several.
        skip_invalid: leave invalid samples out and count them in `protocol["excluded"]`, and take
            other counts than the published ones, in `protocol["differences_from_published"]`.
        require_images: False reads captions alone; then `images` is empty.
        check_images: decode every image now, not when a model waits for it.
        class_names: of a classification: class to name, or names in the order of the classes.
        templates: of a classification: prompts with one `{}`; default: the card's.
        allow_repeated_class_names: of a classification: keep classes that share a name and list
            them in `protocol["repeated_class_names"]`; their images count as wrong. Some of the
            published names of ImageNet repeat.
        ignore_fields: of a folder of one's own: further fields, which are not used.
        show_progress: show a bar while images are decoded.
        cache: give the same one for every language of a folder, which is then read once, and its
            images decoded once.
    Raises:
        DataValidationError: every error at once, and how many of each kind.
        ValueError: an unknown name or language, a missing file, nothing left.
    """
    card = find_dataset(name) if isinstance(name, str) else name
    place = find_folder(card, folder, lang=lang)
    request = ReadRequest(
        folder=place,
        image_dir=_find_images(image_dir),
        require_images=require_images,
        check_images=check_images,
        class_names=_freeze(class_names),
        templates=None if templates is None else tuple(templates),
        allow_repeated_class_names=allow_repeated_class_names,
        ignore_fields=tuple(ignore_fields),
        show_progress=show_progress,
    )
    intake = DatasetValidator(f"{card.name} in {place}", exclude=skip_invalid, cache=cache)
    intake.notes["source"] = _describe_source(card, folder)
    return card.build(card, _choose_language(card, request, intake, lang), intake)


def find_folder(card: DatasetSpec, folder: str | Path | None, *, lang: str | None = None) -> Path:
    """The folder of a set, fetched where it lies on the Hub: one language, or all for None.

    Raises: ValueError when it is missing, or given for a set that the package holds.
    """
    if card.is_embedded:
        if folder is not None:
            raise ValueError(f"{card.name} is in the package and takes no folder; got {folder}.")
        return find_example_data()
    if folder is None:
        raise ValueError(
            f"{card.name} needs a folder with {card.files}. Get it from {card.source}."
        )
    if str(folder).startswith("hub:"):
        return fetch_dataset_folder(str(folder), card.hub_files.format(lang=lang or "*"))
    if not Path(folder).exists():
        raise ValueError(
            f"{card.name}: {folder} does not exist. Give a folder with {card.files}, from "
            f"{card.source}."
        )
    return Path(folder)


def _find_images(image_dir: str | Path | None) -> Path | None:
    if image_dir is not None and not Path(image_dir).is_dir():
        raise ValueError(
            f"image_dir={str(image_dir)!r} is not a folder. Give the folder of images."
        )
    return None if image_dir is None else Path(image_dir)


def _freeze(
    class_names: Mapping[str, str] | Sequence[str] | None,
) -> Mapping[str, str] | tuple[str, ...] | None:
    if class_names is None or isinstance(class_names, Mapping):
        return class_names
    return tuple(class_names)


def _choose_language(
    card: DatasetSpec, request: ReadRequest, intake: DatasetValidator, lang: str | None
) -> ReadRequest:
    """Settle the language, which may only be left open where there is one."""
    languages = card.languages
    if card.find_languages is not None:
        languages = card.find_languages(request, intake)
    if lang is None and len(languages) > 1:
        raise ValueError(f"{card.name} has several languages. Choose one: {', '.join(languages)}.")
    # Class names may be given in any language.
    is_free = request.class_names is not None
    if languages and lang is not None and lang not in languages and not is_free:
        raise ValueError(f"{card.name} has no language {lang!r}. It has {', '.join(languages)}.")
    return replace(request, lang=lang or (languages or ("en",))[0])


def _describe_source(card: DatasetSpec, folder: str | Path | None) -> str:
    if card.is_embedded:
        return "package"
    return str(folder) if str(folder).startswith("hub:") else "files"
