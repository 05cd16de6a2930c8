"""Embeddings as rows of unit length, made a few rows at a time from whatever they are stored as."""

from __future__ import annotations

import torch
from torch import Tensor

# Shorter embeddings keep their direction and get a length below 1, as in F.normalize.
_SHORTEST = 1e-12


class UnitRows:
    """Rows of embeddings in unit length, without a second copy of them all.

    Args:
        name: what the embeddings are called in errors.
        embeds: (N, P) of any float dtype, on any device.
        device: where rows are wanted.
        rows_at_a_time: how many are held in float64 while lengths are taken.
    Raises: ValueError naming the first row with a NaN or an infinity.
    """

    def __init__(
        self, name: str, embeds: Tensor, *, device: torch.device, rows_at_a_time: int
    ) -> None:
        self.width = embeds.shape[1]
        self._embeds = embeds
        self._device = device
        inverses = []
        for start in range(0, len(embeds), rows_at_a_time):
            rows = embeds[start : start + rows_at_a_time]
            lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
            if not lengths.isfinite().all():
                row = start + int((~lengths.isfinite()).long().argmax())
                raise ValueError(
                    f"{name} row {row} has a NaN or an infinity. Find out which input made it "
                    "before anything is ranked."
                )
            inverses.append(lengths.clamp(min=_SHORTEST).reciprocal())
        self._inverse_lengths = torch.cat(inverses).to(device)  # (N,) float64

    def write(self, start: int, buffer: Tensor) -> Tensor:
        """Write the rows from `start` on into a float32 buffer, as many as it or they have.

        Returns: the part of the buffer that was written.
        """
        stop = min(start + len(buffer), len(self._embeds))
        rows = self._embeds[start:stop].to(self._device)
        scales = self._inverse_lengths[start:stop, None].float()
        return torch.mul(rows, scales, out=buffer[: stop - start])

    def take(self, rows: Tensor) -> Tensor:
        """Return the rows of these numbers, (len(rows), P) float64."""
        taken = self._embeds[rows.to(self._embeds.device)].to(self._device, torch.float64)
        return taken.mul_(self._inverse_lengths[rows.to(self._device), None])
