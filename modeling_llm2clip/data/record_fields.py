"""The fields of a record, the same in every format.

The fields are the same in a line of JSON, a row of Parquet and the JSON member of a tar sample. A
field that is null counts as absent.

| field | meaning |
| --- | --- |
| `image` or `file_name` | path of the image, relative to the folder of images |
| `captions`, `caption` or `text` | one or several texts that describe the image; required |
| `long_captions` | one or several longer texts |
| `keywords` | words that belong to the image |
| `group_id` | what the image shows; default: the image's name |
| `lang` | language of the texts, BCP 47; default: `en` |
| `url` | where the image came from; others' captions may be joined by it |
| `category`, `group`, `license`, `notes`, `source`, `style` | notes that training does not read |
| `shortIB_captions`, `shortSV_captions`, `shortLLA_captions` | as `captions` |
| `longIB_captions`, `longSV_captions`, `longLLA_captions` | as `long_captions` |

Images of one group are never each other's negatives. An image has one record per language. The last
two rows are the fields of published re-captionings of CC3M and CC12M.

In Parquet, `image` may hold the encoded image itself; in a tar shard, the image is a member. Then
`file_name` only names it.

Any other field is an error, because it may be a misspelled one. Fields named by `load_records(…,
ignore_fields=…)` are not read, known or not. Whitespace around texts is removed and a line break
inside becomes one space, because later stages take captions as single lines.

Data that are read for one modality alone need not be pairs: images may lack captions, or captions
images. A text without an image is then named by the field `id`, or else by its place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from .images.image_sources import PackedImage

# One side of the pairs: what is embedded, or alone read of records that need not be pairs.
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
    """The fields of a record that are not null, as its source has them, not yet checked.

    Attributes:
        place: Where the record is written, for errors.
        packed: The image, if the source holds it.
        default_name: Name of a record without `image` and `file_name`.
        text_name: Name of a text without an image that nothing else names, if only texts are read.
    """

    place: str
    fields: Mapping[str, Any]
    packed: PackedImage | None = None
    default_name: str | None = None
    text_name: str | None = None


def list_fields_read(names: Collection[str]) -> list[str]:
    """List the fields of records, but for notes, which training does not read."""
    known = KNOWN_FIELDS.intersection(names).difference(_NOTES)
    return sorted({"captions" if name in PLAIN_CAPTION_FIELDS else name for name in known})


def clean_text(text: str) -> str:
    """Strip a text, and replace each line break and the whitespace around it by one space."""
    # Most texts are clean. Those that are printable have no line breaks, and no spaces but " ".
    if text.isprintable() and text[:1] != " " and text[-1:] != " ":
        return text
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
