"""Remembers embeddings, so that tasks and languages that share images or texts share their cost.

Every embedding of an evaluation comes through here, and none that is not finite goes further: NaN
is greater than nothing, so that a task that counts who is nearer would take it for right or for
wrong.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .encoder import EncodedTexts, Encoder, EncoderDescription

_SHOWN = 5


class RememberingEncoder:
    """Asks another encoder for each text and each image once.

    Attributes:
        encoded: how many texts and images it has asked for so far.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoded = {"texts": 0, "images": 0}
        self._encoder = encoder
        self._texts: dict[Hashable, Tensor] = {}
        self._is_cut: dict[str, bool] = {}
        self._images: dict[Hashable, Tensor] = {}

    def describe(self) -> EncoderDescription:
        """Say what decides the embeddings."""
        return self._encoder.describe()

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """As the encoder behind it; raises ValueError naming texts with non-finite embeddings."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            encoded = self._encoder.encode_texts(new)
            self._check_finite(encoded.embeds, new, unit="texts")
            self._texts.update(zip(new, encoded.embeds, strict=True))
            self.encoded["texts"] += len(new)
            if encoded.is_truncated is not None:
                self._is_cut.update(zip(new, encoded.is_truncated.tolist(), strict=True))
        is_truncated = [self._is_cut.get(text) for text in texts]
        known = None if None in is_truncated else torch.tensor(is_truncated)
        return EncodedTexts(torch.stack([self._texts[text] for text in texts]), known)

    def encode_images(self, images: Sequence[Any], *, names: Sequence[str]) -> Tensor:
        """As the encoder behind it; an image is known by its address and its name.

        Raises: ValueError naming images whose embeddings are not finite.
        """
        wanted = list(zip(images, names, strict=True))
        new = [pair for pair in dict.fromkeys(wanted) if pair not in self._images]
        if new:
            embeds = self._encoder.encode_images(
                [image for image, _ in new], names=[name for _, name in new]
            )
            self._check_finite(embeds, [name for _, name in new], unit="images")
            self._images.update(zip(new, embeds, strict=True))
            self.encoded["images"] += len(new)
        return torch.stack([self._images[pair] for pair in wanted])

    def _check_finite(self, embeds: Tensor, names: Sequence[str], *, unit: str) -> None:
        rows = (~embeds.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if rows:
            described = self.describe()
            raise ValueError(
                f"{described.source} gives {len(rows)} of {len(names)} {unit} embeddings with NaN "
                "or "
                f"infinity, in {described.dtype}: {[names[row] for row in rows[:_SHOWN]]}. Run it "
                "with dtype float32 (--dtype float32); if they stay, its weights are damaged."
            )
