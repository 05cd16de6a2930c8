"""Find datasets by name and load them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from ..._suggestions import did_you_mean
from ...configs.config_fields import DataConfig
from ...configs.evaluation_config import EvaluatedDataset
from ...data.records.record_loading import fetch_dataset_folder, read_configured_records
from ...data.records.record_table import RecordTable
from ...data.records.records import CaptionedImage
from ...data.remote.file_locations import FileLocation
from ...data.remote.remote_files import is_remote
from . import caption_readers, choice_dataset, classification_dataset, custom_folder
from .caption_readers import JsonCaptions, ParquetCaptions
from .dataset_spec import DatasetReading, DatasetSpec, DatasetType, EvaluationDataset, ReadingCache
from .retrieval_dataset import RetrievalDataset, build_retrieval_dataset

DatasetSource: TypeAlias = str | Path | DatasetSpec | Sequence[CaptionedImage]
Builder: TypeAlias = Callable[[DatasetReading], EvaluationDataset]

READERS: dict[str, Callable[..., Any]] = {
    "json": JsonCaptions,
    "parquet": ParquetCaptions,
    "coco": caption_readers.read_coco_captions,
    "coco-cn": caption_readers.read_coco_cn,
    "emoji": caption_readers.read_emoji,
    "flickr30k-cn": caption_readers.read_flickr30k_cn,
    "multi30k": caption_readers.read_multi30k,
    "urban1k": caption_readers.read_urban1k,
    "image-folder": classification_dataset.read_image_folder,
    "imagenet": classification_dataset.read_imagenet,
    "sugarcrepe": choice_dataset.read_sugarcrepe,
    "sugarcrepe-text": choice_dataset.read_sugarcrepe_text,
    "winoground": choice_dataset.read_winoground,
}
_BUILDERS: dict[DatasetType, Builder] = {
    "retrieval": build_retrieval_dataset,
    "captions": build_retrieval_dataset,
    "classification": classification_dataset.build_classification_dataset,
    "choice": choice_dataset.build_choice_dataset,
}

_ON_HUB = "hub:"
_OWN = "folder"  # spec of the user's own images, whatever name they are given
# By difflib's similarity, "emojis" and "coco2" are too close to a known name, but "my-emoji" isn't.
_TOO_CLOSE = 0.8
_NAME = re.compile(r"\w[\w.-]*")


def read_specs(text: str) -> dict[str, DatasetSpec]:
    """Parse specs from YAML text, by name; see `published_datasets.yaml`."""
    content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {
        name: DatasetSpec(**{**_freeze(fields), "name": name, "read": _find_reader(fields["read"])})
        for name, fields in content.items()
    }


def _find_reader(described: str | Mapping[str, Any]) -> Callable[..., Any]:
    if isinstance(described, str):
        return READERS[described]
    [(name, options)] = described.items()
    options = {**_freeze(options)}
    if "otherwise" in options:
        options["otherwise"] = _find_reader(options["otherwise"])
    reader = READERS[name]
    return reader(**options) if isinstance(reader, type) else partial(reader, **options)


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _freeze(inner) for name, inner in value.items()}
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


_SPECS = {
    **read_specs((Path(__file__).parent / "published_datasets.yaml").read_text("utf-8")),
    **{spec.name: spec for spec in custom_folder.DATASETS},
}


def list_datasets() -> list[DatasetSpec]:
    return [_SPECS[name] for name in sorted(_SPECS)]


def find_dataset(name: str) -> DatasetSpec:
    if name not in _SPECS:
        raise ValueError(
            f"There is no dataset or folder named {name!r}. Known datasets: "
            f"{', '.join(sorted(_SPECS))}.{did_you_mean(name, _SPECS)}"
        )
    return _SPECS[name]


def parse_dataset(text: str | Path) -> EvaluatedDataset:
    """Parse a dataset's name and folder as users write them.

    Known datasets are written as `NAME` or `NAME=FOLDER`. The user's own captioned images are
    written as a folder, file or URL, which may also follow `NAME=`; the name must not resemble a
    known dataset's. A known name takes precedence over a path with the same name.
    """
    written = str(text)
    if written in _SPECS:
        if Path(written).exists():
            warnings.warn(
                f"{written} is both a dataset and a path; the dataset is used. To use the path, "
                f"write ./{written}.",
                stacklevel=2,
            )
        return EvaluatedDataset(name=written)
    name, sign, folder = written.partition("=")
    is_url = is_remote(written) and not (sign and _NAME.fullmatch(name))  # a URL may contain "="
    if is_url or Path(written).exists():
        return EvaluatedDataset(name="folder", folder=written)
    if sign and not (name and folder):
        raise ValueError(f"{written!r} must be NAME=FOLDER.")
    dataset = EvaluatedDataset(name=name, folder=folder or None)
    _find_spec(dataset)
    return dataset


def resolve_dataset(
    source: DatasetSource | EvaluatedDataset, folder: str | Path | None = None
) -> tuple[DatasetSpec, str | Path | None]:
    """Find the spec and folder of a dataset given by name, path, spec or records."""
    if isinstance(source, DatasetSpec):
        return source, folder
    if isinstance(source, str | Path):
        source = EvaluatedDataset(name=source) if source in _SPECS else parse_dataset(source)
    if not isinstance(source, EvaluatedDataset):
        if not isinstance(source, list | tuple | RecordTable):
            raise ValueError(
                f"A dataset must be a name, a folder, or a list of records, not a "
                f"{type(source).__name__}."
            )
        return custom_folder.make_records_spec(source), folder
    if folder is not None and source.folder is not None:
        raise ValueError(f"Got two folders, {source.folder} and {folder}. Pass only one.")
    return _find_spec(source), source.folder if folder is None else folder


def _find_spec(source: EvaluatedDataset) -> DatasetSpec:
    """Find the spec of a known dataset, or make one for the user's own images."""
    name = source.name
    if name in _SPECS or source.folder is None:
        return find_dataset(name)
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name}={source.folder}: there is no such path, and {name!r} cannot be a dataset name "
            "(letters, digits, '_', '-' and '.'). Correct the path or the name."
        )
    if close := get_close_matches(name.lower(), _SPECS, n=1, cutoff=_TOO_CLOSE):
        raise ValueError(
            f"{name}={source.folder}: {name!r} is too similar to the dataset name {close[0]}. "
            "Correct the spelling, or choose another name for your own images."
        )
    return replace(_SPECS[_OWN], name=name)


def find_languages(
    source: DatasetSource, folder: str | Path | None = None, **options: Any
) -> tuple[str, ...]:
    """Find the languages of a dataset; `options` are fields of `DatasetReading`."""
    spec, folder = resolve_dataset(source, folder)
    if spec.find_languages is None:  # no folder is needed
        return spec.languages
    return spec.find_languages(_open(spec, folder, **options))


def load_dataset(
    source: DatasetSource,
    folder: str | Path | None = None,
    *,
    image_dir: str | Path | None = None,
    lang: str | None = None,
    skip_invalid: bool = False,
    require_images: bool = True,
    check_images: bool | None = True,
    class_names: Mapping[str, str] | Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    ignore_fields: Collection[str] = (),
    caption_fields: Sequence[str] | None = None,
    show_progress: bool = False,
    cache: ReadingCache | None = None,
) -> EvaluationDataset:
    """Load a dataset from its publisher's files; every skipped sample is counted.

    Args:
        source: Name of a dataset, or `NAME=FOLDER`; a folder or file of captioned images; records;
            or a spec.
        folder: Folder of the publisher's files, or `hub:owner/name@commit` for Parquet files on the
            Hub. Default: the folder in `source`, or none for records and built-in datasets.
        image_dir: Folder of the images. Default: `folder`.
        lang: Language of the texts; required if there are several.
        skip_invalid: Skip invalid samples and count them in `protocol["skipped"]`. Counts that
            differ from the published ones are accepted and recorded in
            `protocol["differences_from_published"]`.
        require_images: Whether to read images. If False, only captions are read, and `images` is
            empty.
        check_images: Whether to decode every image now instead of when a model needs it. None
            decodes them if `skip_invalid` is set, or if there are other errors to report.
        class_names: For classification, a mapping from class to name, or names in class order.
            Default: the dataset's own. Repeated names, which ImageNet also has, are listed in
            `protocol["repeated_class_names"]`, and their images count as wrong.
        templates: For classification, prompts with one `{}` each. Default: the dataset's own.
        ignore_fields: For a folder of your own data, fields to ignore, whether known or not.
        caption_fields: For a folder of your own data, fields of the captions to read, as in
            `load_records`.
        show_progress: Show a progress bar while images are decoded.
        cache: Pass the same cache for every language to read the folder only once.

    Returns:
        A `RetrievalDataset`, `ClassificationDataset` or `ChoiceDataset`. Training takes the
        `records` of a retrieval dataset.

    Raises:
        DataValidationError: Samples are invalid; the error lists all of them.
        ValueError: A name or language is unknown, a file is missing, or no sample is left.

    Examples:
        >>> dataset = load_dataset("my-images")
        >>> dataset = load_dataset(load_records("my-images"))
        >>> dataset = load_dataset("coco", "my-coco")  # doctest: +SKIP
    """
    spec, folder = resolve_dataset(source, folder)
    # `evaluate` passes specs: its options are for all datasets, which may include folders.
    if spec is not source and spec.origin == "records" and (caption_fields or ignore_fields):
        raise ValueError(
            "caption_fields and ignore_fields have no effect on records in memory, which are "
            "already read. Pass them to load_records."
        )
    reading = _open(
        spec,
        folder,
        image_dir=image_dir,
        lang=lang,
        skip_invalid=skip_invalid,
        require_images=require_images,
        check_images=check_images,
        class_names=class_names,
        templates=templates,
        ignore_fields=ignore_fields,
        caption_fields=None if caption_fields is None else tuple(caption_fields),
        show_progress=show_progress,
        cache=cache or ReadingCache(),
    )
    # A local path does not affect the scores, and the protocol may be published.
    reading.notes["source"] = str(folder) if str(folder).startswith(_ON_HUB) else spec.origin
    reading.lang = _choose_language(reading, lang)
    return _BUILDERS[spec.dataset_type](reading)


def read_data(
    data: str | Path, config: DataConfig | None = None, *, require_images: bool
) -> Sequence[CaptionedImage]:
    """Read the captioned images of a training stage.

    The source is anything `load_records` reads, or the `NAME` or `NAME=FOLDER` of a dataset with
    captions.
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
            f"{spec.name} is a {spec.dataset_type} dataset, but training needs captions of images. "
            "Use another dataset, or a folder of captioned images."
        )
    if (config.ignore_fields or config.caption_fields) and spec not in custom_folder.DATASETS:
        raise ValueError(
            f"{data}: a known dataset has its own fields, so ignore_fields and caption_fields have "
            "no effect. Leave them out."
        )
    records: list[CaptionedImage] = []
    shared: dict[str, Any] = {
        "image_dir": config.image_dir,
        "require_images": require_images,
        "ignore_fields": config.ignore_fields,
        "caption_fields": config.caption_fields,
        "cache": ReadingCache(),
    }
    for lang in find_languages(spec, folder, **shared):
        dataset = load_dataset(
            spec, folder, lang=lang, check_images=check_images, show_progress=True, **shared
        )
        assert isinstance(dataset, RetrievalDataset)
        records += dataset.records
    return records


def _find_folder(
    spec: DatasetSpec, folder: str | Path | None, *, lang: str | None = None
) -> FileLocation | None:
    """Find a dataset's folder; fetch Hub files for one language, or for all if `lang` is None."""
    if spec.origin != "files":
        if folder is not None:
            raise ValueError(
                f"{spec.name} takes no folder, but got {folder}. Leave it out, or choose another "
                "name for your own images."
            )
        return None
    if folder is None:
        raise ValueError(
            f"{spec.name} needs a folder with {spec.files}. Download them from {spec.source}."
        )
    if str(folder).startswith(_ON_HUB):
        return fetch_dataset_folder(str(folder), spec.hub_files.format(lang=lang or "*"))
    if is_remote(str(folder)):
        return str(folder)
    if not Path(folder).exists():
        raise ValueError(
            f"{spec.name}: {folder} does not exist. Pass a folder with {spec.files}, from "
            f"{spec.source}."
        )
    return Path(folder)


def _open(
    spec: DatasetSpec,
    folder: str | Path | None,
    *,
    image_dir: str | Path | None = None,
    lang: str | None = None,
    **options: Any,
) -> DatasetReading:
    data_folder = _find_folder(spec, folder, lang=lang)
    if image_dir is not None and not Path(image_dir).is_dir():
        raise ValueError(
            f"image_dir={str(image_dir)!r} is not a folder. Pass the folder of the images."
        )
    images = None if image_dir is None else Path(image_dir)
    return DatasetReading(spec=spec, folder=data_folder, image_dir=images, **options)


def _choose_language(reading: DatasetReading, lang: str | None) -> str:
    """Return the requested language or the only one; raise ValueError if there are several."""
    spec = reading.spec
    languages = spec.languages if spec.find_languages is None else spec.find_languages(reading)
    if lang is None and len(languages) > 1:
        raise ValueError(f"{spec.name} has several languages. Choose one: {', '.join(languages)}.")
    # Custom class names may be in any language.
    is_custom = reading.class_names is not None
    if languages and lang is not None and lang not in languages and not is_custom:
        raise ValueError(
            f"{spec.name} has no language {lang!r}. Choose from {', '.join(languages)}."
        )
    return lang or (languages or ("en",))[0]
