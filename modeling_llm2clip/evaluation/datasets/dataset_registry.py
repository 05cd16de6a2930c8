"""The registry: every dataset by its name, what is known of it, and how it is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TypeAlias

from ..._suggestions import did_you_mean
from ...configs.data_config import DataConfig
from ...configs.evaluation_config import EvaluatedDataset
from ...data.configured_records import read_configured_records
from ...data.records.record_loading import fetch_dataset_folder
from ...data.records.record_table import RecordTable
from ...data.records.records import CaptionedImage
from ...data.remote.file_places import FilePlace
from ...data.remote.remote_files import is_remote
from .catalog import (
    compositional,
    cross_lingual,
    custom_folder,
    emoji,
    image_classification,
    long_captions,
    short_captions,
)
from .dataset_spec import DatasetSpec, EvaluationDataset, ReadRequest
from .retrieval_dataset import RetrievalDataset
from .validation import DatasetValidator, ReadingCache

DatasetSource: TypeAlias = str | Path | DatasetSpec | Sequence[CaptionedImage]

_SPECS: dict[str, DatasetSpec] = {
    spec.name: spec
    for group in (
        short_captions,
        long_captions,
        cross_lingual,
        image_classification,
        compositional,
        custom_folder,
        emoji,
    )
    for spec in group.DATASETS
}

_OWN = "folder"  # what one's own images under another name are read as
# Of two names, as difflib measures it: "emojis" and "coco2" are misspelled, "my-emoji" is not.
_TOO_CLOSE = 0.8
_NAME = re.compile(r"\w[\w.-]*")


def list_datasets() -> list[DatasetSpec]:
    """List the specs of all datasets by name."""
    return [_SPECS[name] for name in sorted(_SPECS)]


def find_dataset(name: str) -> DatasetSpec:
    """Find the spec of a dataset.

    Args:
        name: Its name.

    Raises:
        ValueError: There is no dataset of this name; the message lists all.
    """
    if name not in _SPECS:
        raise ValueError(
            f"There is no dataset {name!r}, and no folder of this name. Known: "
            f"{', '.join(sorted(_SPECS))}.{did_you_mean(name, _SPECS)}"
        )
    return _SPECS[name]


def parse_dataset(text: str | Path) -> EvaluatedDataset:
    """Read the name of a dataset and its folder as users write them.

    Args:
        text: `NAME` or `NAME=FOLDER` of a dataset; a folder, file or URL of one's own captioned
            images, or `NAME=` and such a place, with a name of one's own. What exists is a path,
            unless a dataset has this name.

    Raises:
        ValueError: There is neither a dataset nor a file of this name, or a name of one's own
            cannot be one, or resembles that of a dataset.
    """
    written = str(text)
    if written in _SPECS:
        return EvaluatedDataset(name=written)
    name, sign, folder = written.partition("=")
    is_url = is_remote(written) and not (sign and _NAME.fullmatch(name))  # a URL may have the sign
    if is_url or Path(written).exists():
        return EvaluatedDataset(name="folder", folder=written)
    if sign and not (name and folder):
        raise ValueError(f"{written!r} must be NAME=FOLDER.")
    found = EvaluatedDataset(name=name, folder=folder or None)
    _find_spec(found)
    return found


def resolve_dataset(
    source: DatasetSource | EvaluatedDataset, folder: str | Path | None = None
) -> tuple[DatasetSpec, str | Path | None]:
    """Find the spec and the folder of whatever names a dataset.

    Args:
        source: A name or path (see `parse_dataset`), a spec, or records.
        folder: Folder of a dataset that is given by name or spec.

    Raises:
        ValueError: There is no such dataset, or a folder is given twice.
    """
    if isinstance(source, DatasetSpec):
        return source, folder
    if isinstance(source, str | Path):
        source = EvaluatedDataset(name=source) if source in _SPECS else parse_dataset(source)
    if not isinstance(source, EvaluatedDataset):
        if not isinstance(source, list | tuple | RecordTable):
            raise ValueError(
                f"Got a {type(source).__name__}; give the name of a dataset, a folder, or a list "
                "of records."
            )
        return custom_folder.make_records_spec(source), folder
    if folder is not None and source.folder is not None:
        raise ValueError(f"Got two folders, {source.folder} and {folder}. Give one.")
    return _find_spec(source), source.folder if folder is None else folder


def _find_spec(source: EvaluatedDataset) -> DatasetSpec:
    """Find the spec of a dataset, or make one of one's own images under their name."""
    name = source.name
    if name in _SPECS or source.folder is None:
        return find_dataset(name)
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name}={source.folder}: there is no such path, and {name!r} cannot name a dataset: "
            "letters, digits, '_', '-' and '.'. Correct the path, or the name."
        )
    if close := get_close_matches(name.lower(), _SPECS, n=1, cutoff=_TOO_CLOSE):
        raise ValueError(
            f"{name}={source.folder}: {name!r} resembles the name of the dataset {close[0]}, whose "
            "files are its publisher's. Correct it, or give your own images another name."
        )
    return replace(_SPECS[_OWN], name=name)


def find_languages(
    source: DatasetSource,
    folder: str | Path | None = None,
    *,
    ignore_fields: Collection[str] = (),
    image_dir: str | Path | None = None,
    require_images: bool = True,
    cache: ReadingCache | None = None,
) -> tuple[str, ...]:
    """Find the languages of a dataset: those of its spec, or those of the folder.

    Args:
        source: As in `load_dataset`, like all arguments.
        folder: Its folder.
        ignore_fields: Further fields of one's own data.
        image_dir: Folder of the images.
        require_images: Whether images are read.
        cache: What other readings of the same folder found.
    """
    spec, folder = resolve_dataset(source, folder)
    if spec.find_languages is None:
        return spec.languages
    request = ReadRequest(
        folder=_find_folder(spec, folder),
        image_dir=_find_image_dir(image_dir),
        ignore_fields=tuple(ignore_fields),
        require_images=require_images,
    )
    return spec.find_languages(request, DatasetValidator(spec.name, cache=cache))


def load_dataset(
    source: DatasetSource,
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
    allow_distractors: bool = False,
    ignore_fields: Collection[str] = (),
    show_progress: bool = False,
    cache: ReadingCache | None = None,
) -> EvaluationDataset:
    """Load a dataset as its publisher ships it; nothing is skipped without being counted.

    Args:
        source: Name of a dataset, also as `NAME=FOLDER`; a folder or file of captioned images;
            records; or a spec.
        folder: Folder of the publisher's files, or `hub:owner/name@commit` for Parquet files on the
            Hub. Default: the one in `source`; none for records and what the package contains.
        image_dir: Folder of the images. Default: `folder`.
        lang: Language of the texts; required if there are several.
        skip_invalid: Skip invalid samples and count them in `protocol["skipped"]`, and accept
            counts other than the published ones, in `protocol["differences_from_published"]`.
        require_images: Read images. If not, only captions are read, and `images` is empty.
        check_images: Decode every image now, before a model waits for it.
        class_names: Of a classification: class to name, or names in the order of the classes.
            Default: those of the dataset.
        templates: Of a classification: prompts with one `{}`. Default: those of the dataset.
        allow_repeated_class_names: Of a classification: keep classes that share a name and list
            them in `protocol["repeated_class_names"]`; their images count as wrong. Some of the
            published names of ImageNet repeat.
        allow_distractors: Of one's own data: images without captions and captions without images
            are candidates that no query asks for, counted in `protocol["distractors"]`. Such an
            image has `captions: []`, such a caption a `group_id` and no image.
        ignore_fields: Of one's own data: further fields, which are not read and not errors.
        show_progress: Show a progress bar while images are decoded.
        cache: Give the same one for every language of a folder, which is then read once.

    Returns:
        A `RetrievalDataset`, `ClassificationDataset` or `ChoiceDataset`. Of a retrieval dataset,
        `records` are what training takes.

    Raises:
        DataValidationError: Samples are invalid; all errors are reported at once.
        ValueError: A name or language is unknown, a file is missing, or no sample is left.

    Examples:
        >>> dataset = load_dataset("my-images")
        >>> dataset = load_dataset(load_records("my-images"))
        >>> dataset = load_dataset("coco", "my-coco")  # doctest: +SKIP
    """
    spec, folder = resolve_dataset(source, folder)
    place = _find_folder(spec, folder, lang=lang)
    request = ReadRequest(
        folder=place,
        image_dir=_find_image_dir(image_dir),
        require_images=require_images,
        check_images=check_images,
        class_names=_freeze(class_names),
        templates=None if templates is None else tuple(templates),
        allow_repeated_class_names=allow_repeated_class_names,
        allow_distractors=_require_own(spec, allow_distractors),
        ignore_fields=tuple(ignore_fields),
        show_progress=show_progress,
    )
    name = spec.name if place is None else f"{spec.name} in {place}"
    validator = DatasetValidator(name, skip_invalid=skip_invalid, cache=cache)
    # Where files are on this machine changes no score, and the protocol is published.
    validator.notes["source"] = str(folder) if _is_on_hub(folder) else spec.origin
    return spec.build(spec, _choose_language(spec, request, validator, lang), validator)


def _require_own(spec: DatasetSpec, allow_distractors: bool) -> bool:
    """Raise ValueError if a published dataset is to be read with distractors."""
    if allow_distractors and not spec.takes_distractors:
        raise ValueError(
            f"{spec.name} is a published dataset, whose scores are those of its own images and "
            "captions. Leave allow_distractors out."
        )
    return allow_distractors


def read_data(
    data: str | Path, config: DataConfig | None = None, *, require_images: bool
) -> Sequence[CaptionedImage]:
    """Read the captioned images of a training stage, from any source.

    Args:
        data: A source of `load_records`, or `NAME` or `NAME=FOLDER` of a dataset with captions.
        config: How it is read.
        require_images: Whether a record without its image is an error.

    Raises:
        DataValidationError: Records are invalid; all errors are reported at once.
        ValueError: There is no such data, or the dataset has no captions of images.
    """
    config = config or DataConfig()
    check_images = bool(config.check_images)
    require_images = require_images or check_images
    if str(data).partition("=")[0] not in _SPECS or Path(data).exists():
        return read_configured_records(
            data, config, require_images=require_images, check_images=check_images
        )
    spec, folder = resolve_dataset(data)
    if spec.dataset_type not in ("retrieval", "captions"):
        raise ValueError(
            f"{spec.name} is a {spec.dataset_type} dataset, and training takes captions of images. "
            "Give another dataset, or a folder of captioned images."
        )
    records: list[CaptionedImage] = []
    cache = ReadingCache()
    for lang in find_languages(
        spec, folder, image_dir=config.image_dir, require_images=require_images, cache=cache
    ):
        dataset = load_dataset(
            spec,
            folder,
            image_dir=config.image_dir,
            lang=lang,
            require_images=require_images,
            check_images=check_images,
            ignore_fields=config.ignore_fields,
            show_progress=True,
            cache=cache,
        )
        assert isinstance(dataset, RetrievalDataset)
        records += dataset.records
    return records


def _find_folder(
    spec: DatasetSpec, folder: str | Path | None, *, lang: str | None = None
) -> FilePlace | None:
    """Find the folder of a dataset, fetched if it is on the Hub: one language, or all for None.

    Raises:
        ValueError: The folder is missing, or given for a dataset that needs none.
    """
    if spec.origin != "files":
        if folder is not None:
            raise ValueError(
                f"{spec.name} needs no folder; got {folder}. Leave it out, or give your own images "
                "another name."
            )
        return None
    if folder is None:
        raise ValueError(
            f"{spec.name} needs a folder with {spec.files}. Get it from {spec.source}."
        )
    if _is_on_hub(folder):
        return fetch_dataset_folder(str(folder), spec.hub_files.format(lang=lang or "*"))
    if is_remote(str(folder)):
        return str(folder)
    if not Path(folder).exists():
        raise ValueError(
            f"{spec.name}: {folder} does not exist. Give a folder with {spec.files}, from "
            f"{spec.source}."
        )
    return Path(folder)


def _is_on_hub(folder: str | Path | None) -> bool:
    return str(folder).startswith("hub:")


def _find_image_dir(image_dir: str | Path | None) -> Path | None:
    if image_dir is not None and not Path(image_dir).is_dir():
        raise ValueError(
            f"image_dir={str(image_dir)!r} is not a folder. Give the folder of the images."
        )
    return None if image_dir is None else Path(image_dir)


def _freeze(
    class_names: Mapping[str, str] | Sequence[str] | None,
) -> Mapping[str, str] | tuple[str, ...] | None:
    if class_names is None or isinstance(class_names, Mapping):
        return class_names
    return tuple(class_names)


def _choose_language(
    spec: DatasetSpec, request: ReadRequest, validator: DatasetValidator, lang: str | None
) -> ReadRequest:
    """Set the language, which may only be left open if there is one."""
    languages = spec.languages
    if spec.find_languages is not None:
        languages = spec.find_languages(request, validator)
    if lang is None and len(languages) > 1:
        raise ValueError(f"{spec.name} has several languages. Choose one: {', '.join(languages)}.")
    # Class names may be given in any language.
    is_free = request.class_names is not None
    if languages and lang is not None and lang not in languages and not is_free:
        raise ValueError(f"{spec.name} has no language {lang!r}. It has {', '.join(languages)}.")
    return replace(request, lang=lang or (languages or ("en",))[0])
