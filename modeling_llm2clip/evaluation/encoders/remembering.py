"""Remembers vectors, so that tasks and languages that share pictures or texts share their cost."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .encoder import Description, EncodedTexts, Encoder


class RememberingEncoder:
    """Asks another encoder for each text and each picture once."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._texts: dict[Hashable, Tensor] = {}
        self._is_cut: dict[str, bool] = {}
        self._pictures: dict[Hashable, Tensor] = {}

    def describe(self) -> Description:
        """Say what decides the vectors."""
        return self._encoder.describe()

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """As the encoder behind it."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            encoded = self._encoder.encode_texts(new)
            self._texts.update(zip(new, encoded.embeds, strict=True))
            if encoded.is_cut is not None:
                self._is_cut.update(zip(new, encoded.is_cut.tolist(), strict=True))
        is_cut = [self._is_cut.get(text) for text in texts]
        known = None if None in is_cut else torch.tensor(is_cut)
        return EncodedTexts(torch.stack([self._texts[text] for text in texts]), known)

    def encode_pictures(self, pictures: Sequence[Any], *, names: Sequence[str]) -> Tensor:
        """As the encoder behind it; a picture is known by its address and its name."""
        wanted = list(zip(pictures, names, strict=True))
        new = [pair for pair in dict.fromkeys(wanted) if pair not in self._pictures]
        if new:
            embeds = self._encoder.encode_pictures(
                [picture for picture, _ in new], names=[name for _, name in new]
            )
            self._pictures.update(zip(new, embeds, strict=True))
        return torch.stack([self._pictures[pair] for pair in wanted])
