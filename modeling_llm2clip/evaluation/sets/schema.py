"""What a set is once it is read: pictures, texts, and what belongs to what, in plain tuples.

A set knows no model. It carries its `protocol`: every choice that was made on the way from the
publisher's files, as values that JSON can hold, so that a score never stands without them. Keys
that every protocol has:

| key | meaning |
| --- | --- |
| `set`, `split`, `lang` | which part of which data set |
| `source` | `files`, `package`, or `hub:owner/name@commit` |
| `pictures`, `captions` (or `items`, `classes`) | counts of what is in the set |
| `with_pictures` | of a retrieval set: False where its captions alone were read |
| `published` | the counts that the publisher gives; empty where none are known |
| `excluded` | kind of fault to how many there were; empty unless exclusion was asked for |
| `excluded_samples` | how many pictures, items or lines were left out for them, each once |

Where they apply there are also `texts`, how a text was taken from its field; `checksums`, whether
the files are those that were published; `differences_from_published`, counts that were taken as
they are because faults were to be excluded; `pictures_without_a_record`, files that lie in a folder
of one's own and are not used.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ...data.caption_groups import CaptionGroup
from ...data.pictures import Picture
from ..metrics.correspondence import Correspondence

ChoiceForm: TypeAlias = Literal["picture", "pictures", "text"]


@dataclass(frozen=True)
class RetrievalSet:
    """Pictures and captions that look for each other.

    Attributes:
        name: as in the registry.
        pictures: where they lie; empty when the set was read, or is published, without them.
        picture_names: one a picture, all different; there even when the pictures are not.
        captions: one line each; a text may stand twice, for two pictures.
        correspondence: which caption belongs to which picture.
        lang: language of the captions, BCP 47.
        protocol: every choice that was made; see the top of this file.
        picture_keys: one a picture: what it shows; empty where the names say it.
    """

    name: str
    pictures: tuple[Picture, ...]
    picture_names: tuple[str, ...]
    captions: tuple[str, ...]
    correspondence: Correspondence
    lang: str
    protocol: Mapping[str, Any]
    picture_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        found = (self.correspondence.num_images, self.correspondence.num_texts)
        wanted = (len(self.picture_names), len(self.captions))
        if found != wanted:
            raise ValueError(
                f"{self.name}: the correspondence is of {found[0]} pictures and {found[1]} "
                f"captions, the set has {wanted[0]} and {wanted[1]}."
            )
        if self.picture_keys and len(self.picture_keys) != len(self.picture_names):
            raise ValueError(
                f"{self.name}: {len(self.picture_keys)} keys and {len(self.picture_names)} names "
                "of pictures."
            )
        _check_pictures(self.name, self.pictures, self.picture_names)

    def group_captions(self) -> list[CaptionGroup]:
        """The captions of each picture, in the set's order: what a text encoder alone is asked.

        A text that a picture has twice is there once, or it would find itself. Pictures that share
        all their captions are one group, called as the first of them.
        """
        texts = self.correspondence.texts_of_images()
        groups: dict[tuple[int, ...], CaptionGroup] = {}
        for image, name in enumerate(self.picture_names):
            rows = tuple(texts.of(image).tolist())
            captions = tuple(dict.fromkeys(self.captions[row] for row in rows))
            groups.setdefault(rows, CaptionGroup(name, captions))
        return list(groups.values())


@dataclass(frozen=True)
class ClassificationSet:
    """Pictures of which each belongs to one class.

    Attributes:
        name: as in the registry.
        pictures: where they lie; at least one.
        picture_names: one a picture, all different.
        labels: one a picture: the row of its class in `class_names`.
        class_names: as they stand in a prompt; all different, in more than capitals, unless
            `protocol` names those that are not in `repeated_class_names`: pictures of these tie,
            and a tie is a wrong answer.
        templates: prompts with one `{}` where the class name goes.
        lang: language of class names and templates, BCP 47.
        protocol: every choice that was made; see the top of this file.
    """

    name: str
    pictures: tuple[Picture, ...]
    picture_names: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    lang: str
    protocol: Mapping[str, Any]

    def __post_init__(self) -> None:
        _check_pictures(self.name, self.pictures, self.picture_names)
        if not len(self.pictures) == len(self.labels) > 0:
            raise ValueError(
                f"{self.name}: {len(self.pictures)} pictures and {len(self.labels)} labels; there "
                "must be one label a picture, and at least one."
            )
        if not (min(self.labels) >= 0 and max(self.labels) < len(self.class_names)):
            raise ValueError(
                f"{self.name}: labels from {min(self.labels)} to {max(self.labels)} do not fit "
                f"{len(self.class_names)} classes, counted from 0."
            )
        repeated = find_repeated(self.class_names, same=fold_class_name)
        if repeated != self.protocol.get("repeated_class_names", []):
            raise ValueError(
                f"{self.name}: class names repeat: {repeated[:5]}. A picture of one could not be "
                "told from one of the other; give each class a name of its own, or list them in "
                'protocol["repeated_class_names"].'
            )
        broken = [text for text in self.templates if text.count("{}") != 1]
        if broken or not self.templates:
            raise ValueError(
                f"{self.name}: templates without exactly one {{}}: {broken[:5] or 'none given'}."
            )


@dataclass(frozen=True)
class ChoiceItem:
    """One question of a compositional set.

    Attributes:
        name: what it is called within the set.
        category: what was changed between the two captions; scores are also told for each.
        captions: two texts. In form `pictures` the first belongs to the first picture, the second
            to the second; in the other forms the first is true and the second is false.
        pictures: two in form `pictures`, one in form `picture`, none in form `text`.
        anchor: in form `text`, another true caption of the same picture, which stands for it.
    """

    name: str
    category: str
    captions: tuple[str, str]
    pictures: tuple[Picture, ...] = ()
    anchor: str | None = None


_NUM_PICTURES: Mapping[ChoiceForm, int] = {"picture": 1, "pictures": 2, "text": 0}


@dataclass(frozen=True)
class ChoiceSet:
    """Questions that only a model which reads word order and relations answers.

    Attributes:
        name: as in the registry.
        form: `picture`: one picture, a true and a false caption (SugarCrepe); `pictures`: two of
            each (Winoground); `text`: a caption of the picture in place of the picture.
        items: at least one.
        lang: language of the captions, BCP 47.
        protocol: every choice that was made; see the top of this file.
    """

    name: str
    form: ChoiceForm
    items: tuple[ChoiceItem, ...]
    lang: str
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.form not in _NUM_PICTURES:
            raise ValueError(f"{self.name}: form={self.form!r} is none of {list(_NUM_PICTURES)}.")
        if not self.items:
            raise ValueError(f"{self.name}: there are no items.")
        wanted = (_NUM_PICTURES[self.form], self.form == "text")
        for item in self.items:
            if (len(item.pictures), item.anchor is not None) != wanted:
                raise ValueError(
                    f"{self.name}: item {item.name} has {len(item.pictures)} pictures and anchor "
                    f"{item.anchor!r}; form {self.form!r} has {wanted[0]} pictures and "
                    f"{'an' if wanted[1] else 'no'} anchor."
                )


EvaluationSet: TypeAlias = RetrievalSet | ClassificationSet | ChoiceSet


def find_repeated(names: tuple[str, ...], *, same: Callable[[str], str] = str) -> list[str]:
    """The names that stand there more than once, each once, in their order.

    Args:
        same: names of which it makes the same are one name.
    """
    seen: set[str] = set()
    repeated: dict[str, str] = {}
    for name in names:
        folded = same(name)
        if folded in seen:
            repeated.setdefault(folded, name)
        seen.add(folded)
    return list(repeated.values())


def fold_class_name(name: str) -> str:
    """The name as the most forgetful of the models reads it: NFC, lower case, single blanks.

    CLIP and SigLIP know no capitals, so `Cat` and `cat` are one class to them.
    """
    return " ".join(unicodedata.normalize("NFC", name).lower().split())


def _check_pictures(
    set_name: str, pictures: tuple[Picture, ...], picture_names: tuple[str, ...]
) -> None:
    if pictures and len(pictures) != len(picture_names):
        raise ValueError(
            f"{set_name}: {len(pictures)} pictures and {len(picture_names)} names of pictures."
        )
    if repeated := find_repeated(picture_names):
        raise ValueError(f"{set_name}: names of pictures repeat: {repeated[:5]}.")
