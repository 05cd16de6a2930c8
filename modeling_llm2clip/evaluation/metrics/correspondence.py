"""The correspondence of captions and images, stated pair by pair and never by a reshape."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._suggestions import counted, list_first


@dataclass(frozen=True)
class PositiveLists:
    """The positives of every query, one list after the other (compressed sparse rows).

    Attributes:
        offsets: (Q + 1,) int64; the positives of query q are members[offsets[q] : offsets[q + 1]].
        members: (num_pairs,) int64, rows of the other side, ascending within a query.
        pairs: (num_pairs,) int64, position of each member's pair in the correspondence.
    """

    offsets: Tensor
    members: Tensor
    pairs: Tensor

    @property
    def counts(self) -> Tensor:
        """(Q,) int64, number of positives of each row; 0 for a distractor."""
        return self.offsets.diff()

    def of(self, query: int) -> Tensor:
        """Return the positives of one query."""
        return self.members[int(self.offsets[query]) : int(self.offsets[query + 1])]


@dataclass(frozen=True, eq=False)
class Correspondence:
    """Pairs of rows: the texts that describe each image.

    Several texts may belong to one image and several images to one text. Distractors are images
    without a text and texts without an image: candidates, but not queries.

    Attributes:
        image_of_pair: (num_pairs,) int64, the image of each pair.
        text_of_pair: (num_pairs,) int64, the text of each pair.
    """

    num_images: int
    num_texts: int
    image_of_pair: Tensor
    text_of_pair: Tensor
    allows_distractors: bool = False

    def __post_init__(self) -> None:
        image, text = self.image_of_pair, self.text_of_pair
        if image.shape != text.shape or image.ndim != 1:
            raise ValueError(
                f"image_of_pair {tuple(image.shape)} and text_of_pair {tuple(text.shape)} must be "
                "two lists of equal length, with one number for each pair."
            )
        for name, rows in (("image_of_pair", image), ("text_of_pair", text)):
            if rows.dtype != torch.int64:
                raise ValueError(f"{name} is {rows.dtype}; row numbers must be torch.int64.")
        errors = [
            *_find_errors("image", image, self.num_images),
            *_find_errors("text", text, self.num_texts),
        ]
        if not errors and not len(image):
            errors = ["no image has a text"]
        if not errors and not self.allows_distractors:
            errors = [
                *_find_lonely("image", image, self.num_images, other="text"),
                *_find_lonely("text", text, self.num_texts, other="image"),
            ]
        # Numbers out of range would make two pairs look like one.
        errors = errors or self._find_repeated_pairs()
        if errors:
            raise ValueError("Images and texts do not correspond: " + "; ".join(errors) + ".")

    @classmethod
    def from_group_ids(
        cls,
        image_group_ids: Sequence[Hashable],
        text_group_ids: Sequence[Hashable],
        *,
        allows_distractors: bool = False,
    ) -> Correspondence:
        """Pair every image with every text of the same group."""
        number_of: dict[Hashable, int] = {}
        images, texts = (
            torch.tensor([number_of.setdefault(g, len(number_of)) for g in ids], dtype=torch.int64)
            for ids in (image_group_ids, text_group_ids)
        )
        groups = [*number_of]
        of_group = _list_positives(texts, torch.arange(len(texts)), len(groups))
        num_images = torch.bincount(images, minlength=len(groups))
        lonely = [
            (side, [groups[number] for number in (counts == 0).nonzero().flatten().tolist()])
            for side, counts in (("images", of_group.counts), ("texts", num_images))
        ]
        errors = [
            f"{counted(len(ids), 'group id')} only among the {side}: {list_first(map(repr, ids))}"
            for side, ids in lonely
            if ids
        ]
        if errors and not allows_distractors:
            raise ValueError("Images and texts do not correspond: " + "; ".join(errors) + ".")
        # Images by group; each with all texts of its group.
        by_group = images.argsort(stable=True)
        counts = of_group.counts[images[by_group]]
        image_of_pair = by_group.repeat_interleave(counts)
        first_pair = (counts.cumsum(0) - counts).repeat_interleave(counts)
        places = torch.arange(len(image_of_pair)) - first_pair
        text_of_pair = of_group.members[of_group.offsets[images[image_of_pair]] + places]
        return cls(len(images), len(texts), image_of_pair, text_of_pair, allows_distractors)

    @classmethod
    def from_image_of_text(
        cls, image_of_text: Sequence[int] | Tensor, num_images: int
    ) -> Correspondence:
        """Pair every text with the one image it describes."""
        images = torch.as_tensor(image_of_text, dtype=torch.int64)
        return cls(num_images, len(images), images, torch.arange(len(images)))

    @property
    def num_pairs(self) -> int:
        """Number of pairs of an image and a text."""
        return len(self.image_of_pair)

    @property
    def image_of_text(self) -> Tensor:
        """Image of each text, of several the last, (num_texts,) int64; 0 for a distractor."""
        images = torch.zeros(self.num_texts, dtype=torch.int64)
        images[self.text_of_pair] = self.image_of_pair
        return images

    def list_distractors(self) -> tuple[Tensor, Tensor]:
        """List the images without a text, and the texts without an image, as ascending rows."""
        images, texts = (
            (torch.bincount(rows, minlength=number) == 0).nonzero().flatten()
            for rows, number in (
                (self.image_of_pair, self.num_images), (self.text_of_pair, self.num_texts),
            )
        )  # fmt: skip
        return images, texts

    def texts_of_images(self) -> PositiveLists:
        """List the texts of every image: the positives of i2t retrieval."""
        return _list_positives(self.image_of_pair, self.text_of_pair, self.num_images)

    def images_of_texts(self) -> PositiveLists:
        """List the images of every text: the positives of t2i retrieval."""
        return _list_positives(self.text_of_pair, self.image_of_pair, self.num_texts)

    def _find_repeated_pairs(self) -> list[str]:
        codes = self.image_of_pair * self.num_texts + self.text_of_pair
        distinct, counts = codes.unique(return_counts=True)
        repeated = distinct[counts > 1].tolist()
        named = [divmod(code, self.num_texts) for code in repeated]
        return [f"{counted(len(named), 'repeated pair')}: {list_first(named)}"] if named else []


def _list_positives(queries: Tensor, members: Tensor, num_queries: int) -> PositiveLists:
    by_member = members.argsort(stable=True)
    pairs = by_member[queries[by_member].argsort(stable=True)]
    offsets = torch.zeros(num_queries + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(queries, minlength=num_queries).cumsum(0)
    return PositiveLists(offsets, members[pairs], pairs)


def _find_errors(side: str, rows: Tensor, num_rows: int) -> list[str]:
    if num_rows < 1:
        return [f"there is no {side}"]
    outside = rows[(rows < 0) | (rows >= num_rows)]
    listed = list_first(outside.unique().tolist())
    return [f"{side} rows outside 0 … {num_rows - 1}: {listed}"] if listed else []


def _find_lonely(side: str, rows: Tensor, num_rows: int, *, other: str) -> list[str]:
    lonely = (torch.bincount(rows, minlength=num_rows) == 0).nonzero().flatten().tolist()
    count = counted(len(lonely), side)
    return [f"{count} without {other}: rows {list_first(lonely)}"] if lonely else []
