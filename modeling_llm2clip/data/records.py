"""One captioned image, and the fields that describe it in every format.

The schema, the same for a line of JSON, a row of Parquet, and the JSON member of a tar sample. An
absent field and one that is null are the same.

| field | meaning |
| --- | --- |
| `image` or `file_name` | the image: its path, relative to the folder of images. In Parquet `image`
may hold the encoded image itself, in a tar shard the image is a member; `file_name` then only names
it | | `captions`, `caption` or `text` | one text or a list of them, each of which describes the
image; required | | `long_captions` | one longer text or a list of them; optional | | `keywords` |
words that belong to the image; optional | | `group_id` | what is shown: images of one group show
the same thing and are never each other's negatives; default: the image's name | | `lang` |
language of the texts, BCP 47; default `en`. An image has one record per language | | `category`,
`group`, `license`, `notes`, `source`, `style` | notes; optional, kept out of training | |
`shortIB_captions`, `shortSV_captions`, `shortLLA_captions` | as `captions`: what published
re-captionings of CC3M and CC12M call theirs | | `longIB_captions`, `longSV_captions`,
`longLLA_captions` | as `long_captions`: the same |

Any other field is an error: it may be a misspelt one. `load_records(…, ignored_fields=…)` names
those that are meant to be there. Texts lose the white space around them, and a line break inside
becomes one space, because captions are one line to every later stage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .image_sources import ImageSource, PackedImage
from .validation_errors import ErrorCollector

_CAPTIONS = ("captions", "caption", "text")
_SHORT_CAPTIONS = ("shortIB_captions", "shortSV_captions", "shortLLA_captions")
_LONG_CAPTIONS = ("long_captions", "longIB_captions", "longSV_captions", "longLLA_captions")
CAPTION_FIELDS = frozenset((*_CAPTIONS, *_SHORT_CAPTIONS))
_NAMES = ("image", "file_name")
_NOTES = ("category", "group", "license", "notes", "source", "style")
KNOWN_FIELDS = frozenset(
    (
        *_NAMES,
        *_CAPTIONS,
        *_SHORT_CAPTIONS,
        *_LONG_CAPTIONS,
        *_NOTES,
        "keywords",
        "group_id",
        "lang",
    )
)


@dataclass(frozen=True)
class CaptionedImage:
    """One image and its texts in one language.

    Attributes:
        image: where it lies; None when it was read without asking for images and has none.
        name: the image's name within its source; with `lang` it is unique.
        group_id: what is shown: images of one group show the same thing.
        captions: texts, each of which describes the image; at least one.
        long_captions: longer texts that do so; may be empty.
        keywords: words that belong to the image; may be empty.
        lang: language of the texts, BCP 47.
        place: where the record is written, for errors; two records that differ in it alone are
            equal.
    """

    image: ImageSource | None
    name: str
    group_id: str
    captions: tuple[str, ...]
    long_captions: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    lang: str = "en"
    place: str = field(default="", compare=False)

    @property
    def path(self) -> Path:
        """The image's file.

        Raises: ValueError when it has none of its own.
        """
        if isinstance(self.image, Path):
            return self.image
        found = "no image" if self.image is None else f"a packed image, {self.image}"
        raise ValueError(f"{self.name} has {found}, not a file. Use open_image(record.image).")


@dataclass(frozen=True)
class RawRecord:
    """The fields of one record as its source has them, not yet checked.

    Attributes:
        place: where the record is written, for errors.
        fields: as in the schema, without those that are null.
        packed: the image where the source holds it itself.
        default_name: what to call a record that has no `image` and no `file_name`.
    """

    place: str
    fields: Mapping[str, Any]
    packed: PackedImage | None = None
    default_name: str | None = None


def read_captioned_folder(folder: str | Path) -> list[CaptionedImage]:
    """Read a folder of images with a `captions.jsonl`: `load_records` by its first name."""
    # Readers build the records of this file, so they are imported when called.
    from .record_loading import load_records

    return load_records(folder)


def build_record(
    raw: RawRecord,
    errors: ErrorCollector,
    *,
    images: Path | None,
    require_images: bool,
    ignored_fields: Collection[str] = (),
) -> CaptionedImage | None:
    """Check the fields and make a record of them; None when it has no name or language.

    A record with errors is made of what is left, so that the checks that compare records see it.

    Args:
        raw: what the source has.
        errors: gets every error of this record.
        images: folder of images that are files; None when there is none.
        require_images: whether a record without an image is an error.
        ignored_fields: names of fields that are known to be there and not used.
    """
    found: list[str] = []
    lang = _read_word(raw.fields, "lang", found) or "en"
    name = _read_name(raw.fields, found)
    has_identity = not found
    image: ImageSource | None = raw.packed
    if has_identity and image is None:
        image = _find_file(name, images, found, required=require_images)
    group_id = _read_word(raw.fields, "group_id", found)
    name = name or raw.default_name or group_id
    if name is None and not require_images:
        found.append("no 'file_name', 'image' or 'group_id' to name it by")
    captions = _read_captions(raw.fields, found)
    long_captions = _read_all_texts(raw.fields, _LONG_CAPTIONS, found)
    keywords = _read_texts(raw.fields, "keywords", found)
    unknown = sorted(set(raw.fields) - KNOWN_FIELDS - set(ignored_fields))
    found += [f"unknown field {field!r}" for field in unknown]
    for kind in found:
        errors.add(kind, raw.place)
    if name is None or not has_identity:
        return None
    return CaptionedImage(
        image=image,
        name=name,
        group_id=name if group_id is None else group_id,
        captions=tuple(captions),
        long_captions=tuple(long_captions),
        keywords=tuple(keywords),
        lang=lang,
        place=raw.place,
    )


def hash_records(records: Sequence[CaptionedImage]) -> str:
    """SHA-256 of the names, group ids, languages and texts of a dataset, in its order."""
    digest = hashlib.sha256()
    for r in records:
        line = json.dumps([r.name, r.group_id, r.lang, r.captions, r.long_captions])
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def clean_text(text: str) -> str:
    """Strip a text and make each line break inside, with the space around it, one space."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _read_captions(fields: Mapping[str, Any], found: list[str]) -> list[str]:
    given = [name for name in _CAPTIONS if name in fields]
    if len(given) > 1:
        found.append(f"both {given[0]!r} and {given[1]!r}")
        return []
    before = len(found)
    captions = _read_all_texts(fields, (*given, *_SHORT_CAPTIONS), found)
    if not captions and len(found) == before:
        found.append("no caption")
    return captions


def _read_all_texts(fields: Mapping[str, Any], names: Iterable[str], found: list[str]) -> list[str]:
    return [text for name in names for text in _read_texts(fields, name, found)]


def _read_texts(fields: Mapping[str, Any], name: str, found: list[str]) -> list[str]:
    """Read a field that is one text or a list of texts; an error is told once a field."""
    value = fields.get(name, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        found.append(f"{name!r} is not a text or a list of texts")
        return []
    cleaned = [clean_text(text) for text in texts]
    if not all(cleaned):
        kind = "keyword" if name == "keywords" else "caption"
        found.append(f"blank {kind}")
    return cleaned


def _read_word(fields: Mapping[str, Any], name: str, found: list[str]) -> str | None:
    """Read a non-blank text; an integer becomes one, since many datasets number their groups."""
    value = fields.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None:
        return None
    if isinstance(value, str) and value.strip():
        return value.strip()
    found.append(f"{name!r} is not a non-blank text")
    return None


def _read_name(fields: Mapping[str, Any], found: list[str]) -> str | None:
    given = [fields[field] for field in _NAMES if field in fields]
    if not all(isinstance(name, str) and name.strip() for name in given):
        found.append("'image' or 'file_name' is not a non-blank text")
        return None
    names = [PurePosixPath(name).as_posix() for name in given]  # "./a.jpg" is "a.jpg"
    if len(set(names)) > 1:
        found.append("'image' and 'file_name' differ")
    return names[0] if names else None


def _find_file(
    name: str | None, images: Path | None, found: list[str], *, required: bool
) -> Path | None:
    if name is not None and images is not None and (images / name).is_file():
        return images / name
    if required:
        found.append("no image" if name is None else "image missing")
    return None
