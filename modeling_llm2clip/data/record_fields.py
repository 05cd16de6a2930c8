"""The fields of a record, the same in every format.

A record is a line of JSON, a row of Parquet, or the JSON member of a tar sample. A null field is
treated as absent.

| field | meaning |
| --- | --- |
| `image` or `file_name` | path of the image, relative to the folder of images |
| `captions`, `caption` or `text` | one or more texts that describe the image; required |
| `long_captions` | one or more longer texts |
| `keywords` | keywords of the image |
| `group_id` | what the image shows; default: the image's name |
| `lang` | language of the texts, BCP 47; default: `en` |
| `url` | source of the image; published captions can be joined by it |
| `category`, `group`, `license`, `notes`, `source`, `style` | notes that training does not read |
| `shortIB_captions`, `shortSV_captions`, `shortLLA_captions` | like `captions` |
| `longIB_captions`, `longSV_captions`, `longLLA_captions` | like `long_captions` |

Images of one group are never each other's negatives. An image has one record per language. The last
two rows are fields of published re-captionings of CC3M and CC12M.

In Parquet, `image` may hold the encoded image itself; in a tar shard, the image is a member. In
both cases, `file_name` is only a name.

Any other field is an error, because its name may be a misspelling. Fields listed in
`load_records(…, ignore_fields=…)` are not read, known or not. With `caption_fields=…`, every record
must have these captions, and no other captions are read. Whitespace around texts is stripped and
inner line breaks become one space, because later stages expect captions to be single lines.

Data read for only one modality need not be pairs: images may lack captions, and captions may lack
images. A text without an image is then named by its field `id`, or else by its location.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from .._suggestions import did_you_mean

if TYPE_CHECKING:
    from .images.image_sources import PackedImage

# One side of the pairs: the one to embed, or the only one to read from records without pairs.
Modality: TypeAlias = Literal["text", "image"]
PLAIN_CAPTION_FIELDS = ("captions", "caption", "text")
_SHORT_CAPTIONS = ("shortIB_captions", "shortSV_captions", "shortLLA_captions")
LONG_CAPTION_FIELDS = ("long_captions", "longIB_captions", "longSV_captions", "longLLA_captions")
SHORT_CAPTION_FIELDS = (*PLAIN_CAPTION_FIELDS, *_SHORT_CAPTIONS)
CAPTION_FIELDS = frozenset(SHORT_CAPTION_FIELDS)
NAME_FIELDS = ("image", "file_name")
_NOTES = ("category", "group", "license", "notes", "source", "style")
KNOWN_FIELDS = frozenset(
    (
        *NAME_FIELDS,
        *PLAIN_CAPTION_FIELDS,
        *_SHORT_CAPTIONS,
        *LONG_CAPTION_FIELDS,
        *_NOTES,
        "keywords",
        "group_id",
        "lang",
        "url",
    )
)


class RawRecord(NamedTuple):
    """The non-null fields of a record as stored in its source, not yet checked.

    Attributes:
        place: Location of the record, for error messages.
        fields: Its non-null fields.
        packed: The image, if the source itself contains it.
        default_name: Name for a record without `image` and `file_name`.
        text_name: Name for a text without an image or any other name, if only texts are read.
    """

    place: str
    fields: Mapping[str, Any]
    packed: PackedImage | None = None
    default_name: str | None = None
    text_name: str | None = None


def list_ignored(
    ignore_fields: Collection[str], caption_fields: Collection[str] | None
) -> list[str]:
    """List the fields not to read: `ignore_fields`, and all captions except the chosen ones."""
    if caption_fields is None:
        return sorted(ignore_fields)
    fields = (*SHORT_CAPTION_FIELDS, *LONG_CAPTION_FIELDS)
    for name in caption_fields:
        if name not in fields or name in ignore_fields:
            raise ValueError(
                f"caption_fields: {name} is not a field of captions, or is also in ignore_fields."
                f"{did_you_mean(name, fields)} The fields are {', '.join(fields)}."
            )
    if not {*caption_fields} & CAPTION_FIELDS:
        raise ValueError(
            f"caption_fields: one field must hold short captions, not only {[*caption_fields]}. "
            f"Add one of {', '.join(SHORT_CAPTION_FIELDS)}."
        )
    return sorted({*ignore_fields, *fields} - {*caption_fields})


def list_fields_read(names: Collection[str]) -> list[str]:
    """List the known fields among some fields, except for notes, which training does not read."""
    known = KNOWN_FIELDS.intersection(names).difference(_NOTES)
    return sorted({"captions" if name in PLAIN_CAPTION_FIELDS else name for name in known})


def clean_text(text: str) -> str:
    """Strip a text and replace each line break, and the whitespace around it, with one space."""
    # Most texts are clean. A printable text has no line breaks, and no whitespace other than " ".
    if text.isprintable() and text[:1] != " " and text[-1:] != " ":
        return text
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
