"""An encoder that encodes each text and each image once, for all tasks and languages."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...encoding.batches import list_keys
from .encoder import EncodedTexts, Encoder, EncoderDescription

_ROWS_COPIED_AT_ONCE = 2**16


class OnceEncoder:
    """Encodes each text and each image once, and holds their embeddings.

    Args:
        encoder: The encoder.

    Attributes:
        encoded: How many texts and images were encoded so far.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoded = {"texts": 0, "images": 0}
        self._encoder = encoder
        self._texts, self._images = KnownRows(), KnownRows()
        self._is_truncated: dict[str, bool] = {}
        self._held: list[Any] = []  # images, so that no other gets the `id` of one in memory

    def describe(self) -> EncoderDescription:
        """Say what decides the embeddings."""
        return self._encoder.describe()

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts.

        Args:
            texts: At least one.
        """
        new = self._texts.list_new(texts)
        if new:
            encoded = self._encoder.encode_texts(new)
            self._texts.add(new, encoded.embeds)
            self.encoded["texts"] += len(new)
            if encoded.is_truncated is not None:
                self._is_truncated.update(zip(new, encoded.is_truncated.tolist(), strict=True))
        is_truncated = [self._is_truncated.get(text) for text in texts]
        known = None if None in is_truncated else torch.tensor(is_truncated)
        return EncodedTexts(self._texts.take(texts), known)

    def encode_images(self, images: Sequence[Any], *, names: Sequence[str]) -> Tensor:
        """Encode images, which are identified by their address, or themselves, and their name.

        Args:
            images: At least one.
            names: Their names in the dataset.
        """
        images = list(images)
        wanted = list(zip(list_keys(images), names, strict=True))
        image_of = dict(zip(wanted, images, strict=True))
        new = self._images.list_new(wanted)
        if new:
            embeds = self._encoder.encode_images(
                [image_of[key] for key in new], names=[name for _, name in new]
            )
            self._images.add(new, embeds)
            self._held += [image_of[key] for key in new]
            self.encoded["images"] += len(new)
        return self._images.take(wanted)

    def take_far_images(self) -> str | None:
        """Describe the images since the last call, if they are unlike those of the training.

        Only a model of this package knows which these were.
        """
        take = getattr(self._encoder, "take_far_images", None)
        return None if take is None else take()


class KnownRows:
    """Embeddings of inputs, in the blocks in which they were encoded."""

    def __init__(self) -> None:
        self._row_of: dict[Hashable, int] = {}
        self._blocks: list[Tensor] = []

    def list_new(self, inputs: Sequence[Any]) -> list[Any]:
        """List the different inputs that have no embedding yet.

        Args:
            inputs: Inputs, as often as they are given.
        """
        return [item for item in dict.fromkeys(inputs) if item not in self._row_of]

    def add(self, inputs: Sequence[Any], embeds: Tensor) -> None:
        """Add embeddings, which are not copied.

        Args:
            inputs: N different inputs without an embedding.
            embeds: (N, D).
        """
        first = len(self._row_of)
        self._row_of.update(zip(inputs, range(first, first + len(embeds)), strict=True))
        self._blocks.append(embeds)

    def take(self, inputs: Sequence[Any]) -> Tensor:
        """Return the embeddings of inputs; those of one whole block are not copied.

        Args:
            inputs: N inputs with embeddings, in any order.

        Returns:
            (N, D).
        """
        rows = torch.tensor([self._row_of[item] for item in inputs])
        found: Tensor | None = None
        start = 0
        for block in self._blocks:
            stop = start + len(block)
            if len(rows) == len(block) and torch.equal(rows, torch.arange(start, stop)):
                return block
            if found is None:
                found = block.new_empty(len(rows), block.shape[1])
            inside = ((rows >= start) & (rows < stop)).nonzero().flatten()
            for part in inside.split(_ROWS_COPIED_AT_ONCE):
                found[part] = block[rows[part] - start]
            start = stop
        assert found is not None
        return found
