"""Remembers vectors, so that tasks and languages that share pictures or texts share their cost.

Every vector of an evaluation comes through here, and none that is not finite goes further: NaN is
greater than nothing, so that a task that counts who is nearer would take it for right or for wrong.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .encoder import Description, EncodedTexts, Encoder

_SHOWN = 5


class RememberingEncoder:
    """Asks another encoder for each text and each picture once.

    Attributes:
        encoded: how many texts and pictures it has asked for so far.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoded = {"texts": 0, "pictures": 0}
        self._encoder = encoder
        self._texts: dict[Hashable, Tensor] = {}
        self._is_cut: dict[str, bool] = {}
        self._pictures: dict[Hashable, Tensor] = {}

    def describe(self) -> Description:
        """Say what decides the vectors."""
        return self._encoder.describe()

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """As the encoder behind it; raises ValueError naming texts whose vectors are not finite."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            encoded = self._encoder.encode_texts(new)
            self._check_finite(encoded.embeds, new, unit="texts")
            self._texts.update(zip(new, encoded.embeds, strict=True))
            self.encoded["texts"] += len(new)
            if encoded.is_cut is not None:
                self._is_cut.update(zip(new, encoded.is_cut.tolist(), strict=True))
        is_cut = [self._is_cut.get(text) for text in texts]
        known = None if None in is_cut else torch.tensor(is_cut)
        return EncodedTexts(torch.stack([self._texts[text] for text in texts]), known)

    def encode_pictures(self, pictures: Sequence[Any], *, names: Sequence[str]) -> Tensor:
        """As the encoder behind it; a picture is known by its address and its name.

        Raises: ValueError naming pictures whose vectors are not finite.
        """
        wanted = list(zip(pictures, names, strict=True))
        new = [pair for pair in dict.fromkeys(wanted) if pair not in self._pictures]
        if new:
            embeds = self._encoder.encode_pictures(
                [picture for picture, _ in new], names=[name for _, name in new]
            )
            self._check_finite(embeds, [name for _, name in new], unit="pictures")
            self._pictures.update(zip(new, embeds, strict=True))
            self.encoded["pictures"] += len(new)
        return torch.stack([self._pictures[pair] for pair in wanted])

    def _check_finite(self, embeds: Tensor, names: Sequence[str], *, unit: str) -> None:
        rows = (~embeds.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if rows:
            described = self.describe()
            raise ValueError(
                f"{described.source} gives {len(rows)} of {len(names)} {unit} vectors with NaN or "
                f"infinity, in {described.dtype}: {[names[row] for row in rows[:_SHOWN]]}. Run it "
                "with dtype float32 (--dtype float32); if they stay, its weights are damaged."
            )
