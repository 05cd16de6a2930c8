"""What a set is once it is read: images, texts, and what belongs to what, in plain tuples.

A set knows no model. It carries its `protocol`: every choice that was made on the way from the
publisher's files, as values that JSON can hold, so that a score never stands without them. Keys
that every protocol has:

| key | meaning |
| --- | --- |
| `set`, `split`, `lang` | which part of which data set |
| `source` | `files`, `package`, or `hub:owner/name@commit` |
| `images`, `captions` (or `items`, `classes`) | counts of what is in the set |
| `with_images` | of a retrieval set: False where its captions alone were read |
| `published` | the counts that the publisher gives; empty where none are known |
| `excluded` | kind of error to how many there were; empty unless exclusion was asked for |
| `skipped_samples` | how many images, items or lines were left out for them, each once |

Where they apply there are also `texts`, how a text was taken from its field; `checksums`, whether
the files are those that were published; `differences_from_published`, counts that were taken as
they are because errors were to be excluded; `images_without_a_record`, files that lie in a folder
of one's own and are not used.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ...data.caption_groups import CaptionGroup
from ...data.image_sources import ImageSource
from ..metrics.correspondence import Correspondence

ChoiceForm: TypeAlias = Literal["image", "images", "text"]


@dataclass(frozen=True)
class RetrievalDataset:
    """Images and captions that look for each other.

    Attributes:
        name: as in the registry.
        images: where they lie; empty when the set was read, or is published, without them.
        image_names: one an image, all different; there even when the images are not.
        captions: one line each; a text may stand twice, for two images.
        correspondence: which caption belongs to which image.
        lang: language of the captions, BCP 47.
        protocol: every choice that was made; see the top of this file.
        image_group_ids: one per image: what it shows; empty where the names say it.
    """

    name: str
    images: tuple[ImageSource, ...]
    image_names: tuple[str, ...]
    captions: tuple[str, ...]
    correspondence: Correspondence
    lang: str
    protocol: Mapping[str, Any]
    image_group_ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        found = (self.correspondence.num_images, self.correspondence.num_texts)
        wanted = (len(self.image_names), len(self.captions))
        if found != wanted:
            raise ValueError(
                f"{self.name}: the correspondence is of {found[0]} images and {found[1]} "
                f"captions, the set has {wanted[0]} and {wanted[1]}."
            )
        if self.image_group_ids and len(self.image_group_ids) != len(self.image_names):
            raise ValueError(
                f"{self.name}: {len(self.image_group_ids)} group ids and "
                f"{len(self.image_names)} names of images."
            )
        _check_images(self.name, self.images, self.image_names)

    def group_captions(self) -> list[CaptionGroup]:
        """The captions of each image, in the set's order: what a text encoder alone is asked.

        A text that an image has twice is there once, or it would find itself. Images that share
        all their captions are one group, called as the first of them.
        """
        texts = self.correspondence.texts_of_images()
        groups: dict[tuple[int, ...], CaptionGroup] = {}
        for image, name in enumerate(self.image_names):
            rows = tuple(texts.of(image).tolist())
            captions = tuple(dict.fromkeys(self.captions[row] for row in rows))
            groups.setdefault(rows, CaptionGroup(name, captions))
        return list(groups.values())


@dataclass(frozen=True)
class ClassificationDataset:
    """Images of which each belongs to one class.

    Attributes:
        name: as in the registry.
        images: where they lie; at least one.
        image_names: one an image, all different.
        labels: one an image: the row of its class in `class_names`.
        class_names: as they stand in a prompt; all different, in more than capitals, unless
            `protocol` names those that are not in `repeated_class_names`: images of these tie,
            and a tie is a wrong answer.
        templates: prompts with one `{}` where the class name goes.
        lang: language of class names and templates, BCP 47.
        protocol: every choice that was made; see the top of this file.
    """

    name: str
    images: tuple[ImageSource, ...]
    image_names: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    lang: str
    protocol: Mapping[str, Any]

    def __post_init__(self) -> None:
        _check_images(self.name, self.images, self.image_names)
        if not len(self.images) == len(self.labels) > 0:
            raise ValueError(
                f"{self.name}: {len(self.images)} images and {len(self.labels)} labels; there "
                "must be one label an image, and at least one."
            )
        if not (min(self.labels) >= 0 and max(self.labels) < len(self.class_names)):
            raise ValueError(
                f"{self.name}: labels from {min(self.labels)} to {max(self.labels)} do not fit "
                f"{len(self.class_names)} classes, counted from 0."
            )
        repeated = find_repeated(self.class_names, same=fold_class_name)
        if repeated != self.protocol.get("repeated_class_names", []):
            raise ValueError(
                f"{self.name}: class names repeat: {repeated[:5]}. An image of one could not be "
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
        captions: two texts. In form `images` the first belongs to the first image, the second
            to the second; in the other forms the first is true and the second is false.
        images: two in form `images`, one in form `image`, none in form `text`.
        anchor: in form `text`, another true caption of the same image, which stands for it.
    """

    name: str
    category: str
    captions: tuple[str, str]
    images: tuple[ImageSource, ...] = ()
    anchor: str | None = None


_NUM_IMAGES: Mapping[ChoiceForm, int] = {"image": 1, "images": 2, "text": 0}


@dataclass(frozen=True)
class ChoiceDataset:
    """Questions that only a model which reads word order and relations answers.

    Attributes:
        name: as in the registry.
        form: `image`: one image, a true and a false caption (SugarCrepe); `images`: two of
            each (Winoground); `text`: a caption of the image in place of the image.
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
        if self.form not in _NUM_IMAGES:
            raise ValueError(f"{self.name}: form={self.form!r} is none of {list(_NUM_IMAGES)}.")
        if not self.items:
            raise ValueError(f"{self.name}: there are no items.")
        wanted = (_NUM_IMAGES[self.form], self.form == "text")
        for item in self.items:
            if (len(item.images), item.anchor is not None) != wanted:
                raise ValueError(
                    f"{self.name}: item {item.name} has {len(item.images)} images and anchor "
                    f"{item.anchor!r}; form {self.form!r} has {wanted[0]} images and "
                    f"{'an' if wanted[1] else 'no'} anchor."
                )


EvaluationSet: TypeAlias = RetrievalDataset | ClassificationDataset | ChoiceDataset


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


def _check_images(
    set_name: str, images: tuple[ImageSource, ...], image_names: tuple[str, ...]
) -> None:
    if images and len(images) != len(image_names):
        raise ValueError(
            f"{set_name}: {len(images)} images and {len(image_names)} names of images."
        )
    if repeated := find_repeated(image_names):
        raise ValueError(f"{set_name}: names of images repeat: {repeated[:5]}.")
