"""Which caption belongs to which image, said pair by pair and never by a reshape."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class PositiveLists:
    """The positives of every query, one list after the other (compressed sparse rows).

    Attributes:
        offsets: (Q + 1,) int64; the positives of query q are members[offsets[q] : offsets[q + 1]].
        members: (num_pairs,) int64, rows of the other side, ascending within a query.
        pairs: (num_pairs,) int64, where each member's pair stands in the correspondence.
    """

    offsets: Tensor
    members: Tensor
    pairs: Tensor

    @property
    def counts(self) -> Tensor:
        """(Q,) int64, how many positives each query has; at least one."""
        return self.offsets.diff()

    def of(self, query: int) -> Tensor:
        """Rows of the other side that are positives of one query."""
        return self.members[int(self.offsets[query]) : int(self.offsets[query + 1])]


@dataclass(frozen=True, eq=False)
class Correspondence:
    """Which texts describe which images: a set of pairs of rows.

    Several texts may belong to one image and several images to one text.

    Attributes:
        num_images, num_texts: rows of the two sides.
        image_of_pair, text_of_pair: (num_pairs,) int64; pair p says that row image_of_pair[p] of
            the images and row text_of_pair[p] of the texts belong together.
    Raises: ValueError, with all errors at once, for rows out of range, a pair that is there twice,
        an image without a text, or a text without an image.
    """

    num_images: int
    num_texts: int
    image_of_pair: Tensor
    text_of_pair: Tensor

    def __post_init__(self) -> None:
        image, text = self.image_of_pair, self.text_of_pair
        if image.shape != text.shape or image.ndim != 1:
            raise ValueError(
                f"image_of_pair {tuple(image.shape)} and text_of_pair {tuple(text.shape)} must be "
                "two lists of one length, one number each a pair."
            )
        for name, rows in (("image_of_pair", image), ("text_of_pair", text)):
            if rows.dtype != torch.int64:
                raise ValueError(f"{name} is {rows.dtype}; row numbers are torch.int64.")
        errors = [
            *_find_errors("image", image, self.num_images, other="text"),
            *_find_errors("text", text, self.num_texts, other="image"),
        ]
        # Numbers out of range would make two pairs look like one.
        errors = errors or self._find_repeated_pairs()
        if errors:
            raise ValueError("Images and texts do not correspond: " + "; ".join(errors) + ".")

    @classmethod
    def from_group_ids(
        cls, image_group_ids: Sequence[Hashable], text_group_ids: Sequence[Hashable]
    ) -> Correspondence:
        """Pair every image with every text of the same group."""
        images_of_group = _rows_of(image_group_ids)
        texts_of_group = _rows_of(text_group_ids)
        pairs = [
            pair
            for group_id, images in images_of_group.items()
            for pair in product(images, texts_of_group.get(group_id, ()))
        ]
        lonely = [
            f"{len(group_ids)} group ids only {side} have: {_name_some(group_ids)}"
            for side, group_ids in (
                (
                    "images",
                    [group_id for group_id in images_of_group if group_id not in texts_of_group],
                ),
                (
                    "texts",
                    [group_id for group_id in texts_of_group if group_id not in images_of_group],
                ),
            )
            if group_ids
        ]
        if lonely:
            raise ValueError("Images and texts do not correspond: " + "; ".join(lonely) + ".")
        rows = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
        return cls(len(image_group_ids), len(text_group_ids), rows[:, 0], rows[:, 1])

    @classmethod
    def from_image_of_text(
        cls, image_of_text: Sequence[int] | Tensor, num_images: int
    ) -> Correspondence:
        """Pair every text with the one image it describes.

        Args:
            image_of_text: (num_texts,) whole numbers, a row of the images for every text.
        """
        images = torch.as_tensor(image_of_text, dtype=torch.int64)
        return cls(num_images, len(images), images, torch.arange(len(images)))

    @property
    def num_pairs(self) -> int:
        """How many images and texts belong together."""
        return len(self.image_of_pair)

    def texts_of_images(self) -> PositiveLists:
        """For every image its texts: the positives of image to text retrieval."""
        return _list_positives(self.image_of_pair, self.text_of_pair, self.num_images)

    def images_of_texts(self) -> PositiveLists:
        """For every text its images: the positives of text to image retrieval."""
        return _list_positives(self.text_of_pair, self.image_of_pair, self.num_texts)

    def _find_repeated_pairs(self) -> list[str]:
        codes = self.image_of_pair * self.num_texts + self.text_of_pair
        distinct, counts = codes.unique(return_counts=True)
        repeated = distinct[counts > 1].tolist()
        named = [divmod(code, self.num_texts) for code in repeated]
        return [f"{len(named)} pairs stand there twice: {_name_some(named)}"] if named else []


def _list_positives(queries: Tensor, members: Tensor, num_queries: int) -> PositiveLists:
    by_member = members.argsort(stable=True)
    pairs = by_member[queries[by_member].argsort(stable=True)]
    offsets = torch.zeros(num_queries + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(queries, minlength=num_queries).cumsum(0)
    return PositiveLists(offsets, members[pairs], pairs)


def _find_errors(side: str, rows: Tensor, num_rows: int, *, other: str) -> list[str]:
    if num_rows < 1:
        return [f"there is no {side}"]
    outside = rows[(rows < 0) | (rows >= num_rows)]
    if len(outside):
        named = _name_some(outside.unique().tolist())
        return [f"{side} rows outside 0 … {num_rows - 1}: {named}"]
    lonely = (torch.bincount(rows, minlength=num_rows) == 0).nonzero().flatten().tolist()
    return [f"{len(lonely)} {side}s have no {other}: rows {_name_some(lonely)}"] if lonely else []


def _rows_of(group_ids: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    rows: dict[Hashable, list[int]] = {}
    for row, group_id in enumerate(group_ids):
        rows.setdefault(group_id, []).append(row)
    return rows


def _name_some(names: Sequence[object]) -> str:
    shown = ", ".join(map(repr, names[:_NAMED_AT_MOST]))
    return shown + (", …" if len(names) > _NAMED_AT_MOST else "")
