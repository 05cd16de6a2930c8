"""Map captions to images by explicit pairs, without assuming a fixed number of captions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._suggestions import counted, list_first


@dataclass(frozen=True)
class PositiveLists:
    """The positives of every query, concatenated (compressed sparse rows).

    Attributes:
        offsets: (Q + 1,) int64; the positives of query q are members[offsets[q] : offsets[q + 1]].
        members: (num_pairs,) int64, rows of the positives in the other modality, ascending within a
            query.
        pairs: (num_pairs,) int64, index of each member's pair in the correspondence.
    """

    offsets: Tensor
    members: Tensor
    pairs: Tensor

    @property
    def counts(self) -> Tensor:
        """Number of positives per row, (Q,) int64."""
        return self.offsets.diff()

    def of(self, query: int) -> Tensor:
        """Return the positives of one query."""
        return self.members[int(self.offsets[query]) : int(self.offsets[query + 1])]


@dataclass(frozen=True, eq=False)
class Correspondence:
    """Pairs of rows: which texts describe which images.

    An image may have several texts, and a text several images.

    Attributes:
        image_of_pair: (num_pairs,) int64, the image of each pair.
        text_of_pair: (num_pairs,) int64, the text of each pair.
    """

    num_images: int
    num_texts: int
    image_of_pair: Tensor
    text_of_pair: Tensor

    def __post_init__(self) -> None:
        image, text = self.image_of_pair, self.text_of_pair
        for side, rows, num_rows in (
            ("image", image, self.num_images), ("text", text, self.num_texts),
        ):  # fmt: skip
            if rows.dtype != torch.int64 or rows.ndim != 1 or rows.shape != image.shape:
                raise ValueError(
                    f"{side}_of_pair is {rows.dtype} {tuple(rows.shape)}; it must be torch.int64 "
                    "with one row number per pair."
                )
            if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= num_rows:
                raise ValueError(
                    f"{side}_of_pair must have at least one row, from 0 to {num_rows - 1}; got "
                    f"{list_first(rows.unique().tolist()) or 'none'}."
                )
        pairs, counts = (image * self.num_texts + text).unique(return_counts=True)
        if len(repeated := pairs[counts > 1].tolist()):
            named = [divmod(pair, self.num_texts) for pair in repeated]
            raise ValueError(f"{counted(len(named), 'repeated pair')}: {list_first(named)}.")
        images, texts = (
            list_first((torch.bincount(rows, minlength=number) == 0).nonzero().flatten().tolist())
            for rows, number in ((image, self.num_images), (text, self.num_texts))
        )
        if images or texts:
            raise ValueError(
                f"Some rows have no match. Images without a text: {images or 'none'}; texts "
                f"without an image: {texts or 'none'}."
            )

    @classmethod
    def from_group_ids(
        cls, image_group_ids: Sequence[Hashable], text_group_ids: Sequence[Hashable]
    ) -> Correspondence:
        """Pair every image with every text of the same group."""
        number_of: dict[Hashable, int] = {}
        images, texts = (
            torch.tensor([number_of.setdefault(g, len(number_of)) for g in ids], dtype=torch.int64)
            for ids in (image_group_ids, text_group_ids)
        )
        of_group = _list_positives(texts, torch.arange(len(texts)), len(number_of))
        # Images sorted by group, each paired with all texts of its group.
        by_group = images.argsort(stable=True)
        counts = of_group.counts[images[by_group]]
        image_of_pair = by_group.repeat_interleave(counts)
        first_pair = (counts.cumsum(0) - counts).repeat_interleave(counts)
        places = torch.arange(len(image_of_pair)) - first_pair
        text_of_pair = of_group.members[of_group.offsets[images[image_of_pair]] + places]
        return cls(len(images), len(texts), image_of_pair, text_of_pair)

    @classmethod
    def from_image_of_text(
        cls, image_of_text: Sequence[int] | Tensor, num_images: int
    ) -> Correspondence:
        """Pair every text with the one image it describes."""
        images = torch.as_tensor(image_of_text, dtype=torch.int64)
        return cls(num_images, len(images), images, torch.arange(len(images)))

    @property
    def image_of_text(self) -> Tensor:
        """Image of each text, (num_texts,) int64; the last image if a text has several."""
        images = torch.zeros(self.num_texts, dtype=torch.int64)
        images[self.text_of_pair] = self.image_of_pair
        return images

    def texts_of_images(self) -> PositiveLists:
        """Return the texts of every image: the positives of i2t retrieval."""
        return _list_positives(self.image_of_pair, self.text_of_pair, self.num_images)

    def images_of_texts(self) -> PositiveLists:
        """Return the images of every text: the positives of t2i retrieval."""
        return _list_positives(self.text_of_pair, self.image_of_pair, self.num_texts)


def _list_positives(queries: Tensor, members: Tensor, num_queries: int) -> PositiveLists:
    by_member = members.argsort(stable=True)
    pairs = by_member[queries[by_member].argsort(stable=True)]
    offsets = torch.zeros(num_queries + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(queries, minlength=num_queries).cumsum(0)
    return PositiveLists(offsets, members[pairs], pairs)
