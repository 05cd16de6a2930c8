"""A captioned image, and the checks of its fields (`record_fields.py`)."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, NamedTuple

from ..record_fields import (
    KNOWN_FIELDS,
    LONG_CAPTION_FIELDS,
    NAME_FIELDS,
    PLAIN_CAPTION_FIELDS,
    SHORT_CAPTION_FIELDS,
    Modality,
    RawRecord,
    clean_text,
)
from ..validation_errors import ErrorCollector

if TYPE_CHECKING:  # image decoders are imported only when images are read
    from ..images.image_sources import ImageSource, PackedImage

_TEXT_ID = "id"
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


class _FieldNames(NamedTuple):
    """A record's field names by use, cached because most records of a source share theirs."""

    names: tuple[str, ...]
    captions: tuple[str, ...]
    long_captions: tuple[str, ...]
    repeated: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class CaptionedImage:
    """One image and its texts in one language.

    Attributes:
        image: Location of the image; None if images are not required and the record has none.
        name: Name of the image in its source; unique together with `lang`.
        group_id: Identifies what the image shows; images of one group show the same thing.
        captions: Texts that each describe the image: at least one, unless only images are read.
        long_captions: Longer texts that describe the image; may be empty.
        keywords: Keywords of the image; may be empty.
        lang: Language of the texts, BCP 47.
        place: Location of the record, for error messages; not compared.
        url: URL of the image; None if unknown; not compared.
    """

    image: ImageSource | None
    name: str
    group_id: str
    captions: tuple[str, ...]
    long_captions: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    lang: str = "en"
    place: str = field(default="", compare=False)
    url: str | None = field(default=None, compare=False)

    @property
    def path(self) -> Path:
        """File of the image.

        Raises:
            ValueError: The image is not in a file of its own.
        """
        if isinstance(self.image, Path):
            return self.image
        image = "no image" if self.image is None else f"a packed image, {self.image}"
        raise ValueError(f"{self.name} has {image}, not a file. Use open_image(record.image).")


class FoundFile(NamedTuple):
    """An image file that is about to be stored in columns.

    The path is a string, because creating a Path takes as long as all checks of the file together.
    """

    path: str
    size: int


class RecordRules(NamedTuple):
    """Rules for checking records.

    Attributes:
        image_dir: Folder of images in separate files; None if there is no such folder.
        require_images: Whether a record without an image is an error.
        ignore_fields: Names of fields to ignore, whether they are known or not; see `list_ignored`.
        modality: `image` or `text` if only images or texts are read, so records need not be pairs;
            None for both.
        caption_fields: Names of fields that every record must have, unless only images are read.
    """

    image_dir: Path | None
    require_images: bool = True
    ignore_fields: Collection[str] = ()
    modality: Modality | None = None
    caption_fields: Collection[str] = ()


def check_record(
    raw: RawRecord, errors: ErrorCollector, rules: RecordRules
) -> CaptionedImage | None:
    """Check the fields of a record; an image in a separate file becomes a `FoundFile`.

    An invalid record is returned with its valid fields, so checks across records include it.
    Returns None if the name or language cannot be read, or a text is not valid Unicode.
    """
    image_dir, require_images, ignore_fields, modality, caption_fields = rules
    problems: list[str] = []
    fields = raw.fields
    if ignore_fields:
        fields = {field: value for field, value in fields.items() if field not in ignore_fields}
    lang = _read_word(fields, "lang", problems, may_be_number=False) or "en"
    names = _sort_fields(tuple(fields))
    name = _read_name([fields[field] for field in names.names], problems)
    is_text = modality == "text" and not names.names and raw.packed is None
    if is_text:
        name = _read_word(fields, _TEXT_ID, problems)
    has_identity = not problems  # only identifying fields have been read so far
    image: FoundFile | PackedImage | None = raw.packed
    if has_identity and image is None and not is_text:
        image = _find_file(name, image_dir, problems, required=require_images)
    group_id = _read_word(fields, "group_id", problems)
    # A group may have several texts, so its id cannot name one of them.
    name = name or raw.default_name or (raw.text_name if is_text or group_id else None)
    if name is None and not require_images:
        problems.append("no 'file_name', 'image' or 'group_id' to name it by")
    if modality != "image":
        missing = [name for name in caption_fields if fields.get(name) in (None, [])]
        problems += [f"no {name!r}" for name in missing]
    captions = _read_captions(fields, names, problems, required=modality != "image")
    long_captions = _read_texts(fields, names.long_captions, problems)
    keywords = _read_texts(fields, ["keywords"], problems) if "keywords" in fields else []
    url = _read_word(fields, "url", problems) if "url" in fields else None
    unknown = (field for field in names.unknown if not (is_text and field == _TEXT_ID))
    problems += [f"unknown field {field!r}" for field in unknown]
    words = (name or "", group_id or "", lang, url or "", *captions, *long_captions, *keywords)
    is_storable = _is_storable("".join(words))
    if not is_storable:
        problems.append("a text has a lone surrogate (half a character)")
    for kind in problems:
        errors.add(kind, raw.place)
    if name is None or not has_identity or not is_storable:
        return None
    group_id = name if group_id is None else group_id
    texts = (tuple(captions), tuple(long_captions), tuple(keywords))
    return CaptionedImage(image, name, group_id, *texts, lang, raw.place, url)  # type: ignore[arg-type]


def _is_storable(text: str) -> bool:
    try:
        return text.isprintable() or bool(text.encode())
    except UnicodeEncodeError:
        return False


@lru_cache(maxsize=1024)
def _sort_fields(fields: tuple[str, ...]) -> _FieldNames:
    plain = tuple(name for name in PLAIN_CAPTION_FIELDS if name in fields)
    return _FieldNames(
        names=tuple(name for name in NAME_FIELDS if name in fields),
        captions=tuple(name for name in SHORT_CAPTION_FIELDS if name in fields),
        long_captions=tuple(name for name in LONG_CAPTION_FIELDS if name in fields),
        repeated=plain[:2] if len(plain) > 1 else (),
        unknown=tuple(sorted(set(fields) - KNOWN_FIELDS)),
    )


def _read_captions(
    fields: Mapping[str, Any], names: _FieldNames, problems: list[str], *, required: bool
) -> list[str]:
    if names.repeated:
        name, other = names.repeated
        problems.append(f"both {name!r} and {other!r}")
        return []
    before = len(problems)
    captions = _read_texts(fields, names.captions, problems)
    if required and not captions and len(problems) == before:
        problems.append("no caption")
    return captions


def _read_texts(fields: Mapping[str, Any], names: Sequence[str], problems: list[str]) -> list[str]:
    """Read text fields; report each error once per field."""
    all_cleaned: list[str] = []
    for name in names:
        value = fields[name]
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all([isinstance(text, str) for text in texts]):
            problems.append(f"{name!r} is not a text or a list of texts")
            continue
        cleaned = [clean_text(text) for text in texts]
        if "" in cleaned:
            problems.append(f"blank {'keyword' if name == 'keywords' else 'caption'}")
        all_cleaned += cleaned
    return all_cleaned


def _read_word(
    fields: Mapping[str, Any], name: str, problems: list[str], *, may_be_number: bool = True
) -> str | None:
    """Read a non-blank text, or an integer as text, because many datasets number their groups."""
    value = fields.get(name)
    if may_be_number and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None:
        return None
    if isinstance(value, str) and value.strip():
        return value.strip()
    problems.append(f"{name!r} is not a non-blank text")
    return None


def _read_name(values: Sequence[Any], problems: list[str]) -> str | None:
    names = []
    for name in values:
        if not isinstance(name, str) or not name.strip():
            problems.append("'image' or 'file_name' is not a non-blank text")
            return None
        # Equal paths get one spelling: "./a.jpg" becomes "a.jpg".
        needs_normalizing = "./" in name or "//" in name or name[-1] in "/."
        names.append(PurePosixPath(name).as_posix() if needs_normalizing else name)
    if len(names) > 1 and names[0] != names[1]:
        problems.append("'image' and 'file_name' differ")
    return names[0] if names else None


def _find_file(
    name: str | None, image_dir: Path | None, problems: list[str], *, required: bool
) -> FoundFile | None:
    if name is not None and image_dir is not None:
        file = name if name[0] == "/" else f"{image_dir}/{name}"
        try:
            status = os.stat(file)  # noqa: PTH116
        except ValueError:  # the name has a null byte
            status = None
        except OSError as error:
            if error.errno not in _MISSING:  # a failing disk does not mean a missing image
                raise
            status = None
        if status is not None and S_ISREG(status.st_mode):
            return FoundFile(file, status.st_size)
    if required:
        problems.append("no image" if name is None else "image missing")
    return None
