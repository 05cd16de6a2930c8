"""The registry of datasets: specs by name, and how one is loaded."""

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
from ...configs.data_config import DataConfig
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
_OWN = "folder"  # the dataset that one's own images under another name are read as
# Of two names, as difflib measures it: "emojis" and "coco2" are misspelled, "my-emoji" is not.
_TOO_CLOSE = 0.8
_NAME = re.compile(r"\w[\w.-]*")


def read_specs(text: str) -> dict[str, DatasetSpec]:
    """Read the specs of a YAML text by name; see `published_datasets.yaml`."""
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
            f"There is no dataset {name!r}, and no folder of this name. Known: "
            f"{', '.join(sorted(_SPECS))}.{did_you_mean(name, _SPECS)}"
        )
    return _SPECS[name]


def parse_dataset(text: str | Path) -> EvaluatedDataset:
    """Read the name of a dataset and its folder as users write them.

    That is `NAME` or `NAME=FOLDER` of a dataset; a folder, file or URL of one's own captioned
    images; or `NAME=` and such a place, with a name of one's own that resembles no dataset's. An
    existing path is taken as a path, unless it is the name of a dataset.
    """
    written = str(text)
    if written in _SPECS:
        if Path(written).exists():
            warnings.warn(
                f"{written} is taken for the dataset of this name. For what is at this path, give "
                f"./{written}.",
                stacklevel=2,
            )
        return EvaluatedDataset(name=written)
    name, sign, folder = written.partition("=")
    is_url = is_remote(written) and not (sign and _NAME.fullmatch(name))  # a URL may have the sign
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
    """Find the spec and the folder of a dataset, given by name, path, spec or records."""
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
    source: DatasetSource, folder: str | Path | None = None, **options: Any
) -> tuple[str, ...]:
    """Find the languages of a dataset; the options are those of its reading."""
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
    show_progress: bool = False,
    cache: ReadingCache | None = None,
) -> EvaluationDataset:
    """Load a dataset as its publisher ships it; nothing is skipped without being counted.

    Args:
        source: Name of a dataset, also as `NAME=FOLDER`; a folder or file of captioned images;
            records; or a spec.
        folder: Folder of the publisher's files, or `hub:owner/name@commit` for Parquet files on the
            Hub. Default: the folder in `source`; none for records and datasets in the package.
        image_dir: Folder of the images. Default: `folder`.
        lang: Language of the texts; required if there are several.
        skip_invalid: Skip invalid samples and count them in `protocol["skipped"]`, and accept
            counts other than the published ones, in `protocol["differences_from_published"]`.
        require_images: Read images. If not, only captions are read, and `images` is empty.
        check_images: Decode every image now, before a model waits for it. None: with
            `skip_invalid`, and where there are other errors, which are then reported together.
        class_names: Of a classification: class to name, or names in the order of the classes.
            Default: those of the dataset. Names that repeat, as some of ImageNet do, are in
            `protocol["repeated_class_names"]`, and their images count as wrong.
        templates: Of a classification: prompts with one `{}`. Default: those of the dataset.
        ignore_fields: Of one's own data: fields that are not read, known or not.
        show_progress: Show a progress bar while images are decoded.
        cache: Give the same one for every language of a folder, which is then read once.

    Returns:
        A `RetrievalDataset`, `ClassificationDataset` or `ChoiceDataset`. Of a retrieval dataset,
        training takes the `records`.

    Raises:
        DataValidationError: Samples are invalid; all errors are reported at once.
        ValueError: A name or language is unknown, a file is missing, or no sample is left.

    Examples:
        >>> dataset = load_dataset("my-images")
        >>> dataset = load_dataset(load_records("my-images"))
        >>> dataset = load_dataset("coco", "my-coco")  # doctest: +SKIP
    """
    spec, folder = resolve_dataset(source, folder)
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
        show_progress=show_progress,
        cache=cache or ReadingCache(),
    )
    # Where files are on this machine changes no score, and the protocol is published.
    is_on_hub = str(folder).startswith(_ON_HUB)
    reading.notes["source"] = str(folder) if is_on_hub else spec.origin
    reading.lang = _choose_language(reading, lang)
    return _BUILDERS[spec.dataset_type](reading)


def read_data(
    data: str | Path, config: DataConfig | None = None, *, require_images: bool
) -> Sequence[CaptionedImage]:
    """Read the captioned images of a training stage, from any source.

    That is a source of `load_records`, or `NAME` or `NAME=FOLDER` of a dataset with captions.
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
) -> FileLocation | None:
    """Find the folder of a dataset, fetched if it is on the Hub: one language, or all for None."""
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
    if str(folder).startswith(_ON_HUB):
        return fetch_dataset_folder(str(folder), spec.hub_files.format(lang=lang or "*"))
    if is_remote(str(folder)):
        return str(folder)
    if not Path(folder).exists():
        raise ValueError(
            f"{spec.name}: {folder} does not exist. Give a folder with {spec.files}, from "
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
    place = _find_folder(spec, folder, lang=lang)
    if image_dir is not None and not Path(image_dir).is_dir():
        raise ValueError(
            f"image_dir={str(image_dir)!r} is not a folder. Give the folder of the images."
        )
    images = None if image_dir is None else Path(image_dir)
    return DatasetReading(spec=spec, folder=place, image_dir=images, **options)


def _choose_language(reading: DatasetReading, lang: str | None) -> str:
    """Choose the language, which must be named if there are several."""
    spec = reading.spec
    languages = spec.languages if spec.find_languages is None else spec.find_languages(reading)
    if lang is None and len(languages) > 1:
        raise ValueError(f"{spec.name} has several languages. Choose one: {', '.join(languages)}.")
    # Class names may be given in any language.
    is_free = reading.class_names is not None
    if languages and lang is not None and lang not in languages and not is_free:
        raise ValueError(f"{spec.name} has no language {lang!r}. It has {', '.join(languages)}.")
    return lang or (languages or ("en",))[0]
