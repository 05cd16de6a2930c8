"""Compares the embeddings of a server with the model's own, and names the cause of a difference.

Shapes: N texts or images, P `projection_dim`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._suggestions import list_first
from ..encoding.encode import encode_images, encode_texts
from ..model_folders.golden_embeddings import find_tolerance, measure_distances
from ..model_folders.model_loading import load_model
from .model_under_test import ModelUnderTest
from .served_causes import embed_inputs, list_causes

# A cause explains embeddings that it comes this much closer to than the model's own are: servers
# prepare inputs by other library code, so that not every digit agrees.
_EXPLAINED = 0.1
# Below this share of its own distance for one input, a cause is computed for all.
_PROMISING = 0.5
# Largest distance between two computations in float32.
_ROUNDING = find_tolerance(torch.float32, other_machine=True)
# Rounding errors of two machines are of one size, and not equal.
_AS_MUCH = 3.0
# The weights are rounded alike everywhere, so that half precision moves embeddings about where it
# moves them here. Measured on tiny models of three families: cosines of the errors 0.5 to 0.7 for
# the right dtype, at most 0.1 for the other one and for 8-bit weights.
_SAME_ERROR = 0.4
# int8 of unit embeddings; other inputs and other errors are further off.
_QUANTIZED = 0.05
# Most values of bfloat16 are values of float16, too.
_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# How values may be rounded, and how far they are from that at most: float32 holds 7 digits, less
# than a hundredth of the last decimal.
_ROUNDINGS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "integers": (torch.round, 0),
    "bfloat16": (lambda values: values.bfloat16().to(values.dtype), 0),
    "float16": (lambda values: values.half().to(values.dtype), 0),
    **{
        f"{decimals} decimals": (partial(torch.round, decimals=decimals), 0.01 * 10**-decimals)
        for decimals in range(1, 6)
    },
}


def encode(tested: ModelUnderTest, inputs: Sequence[Any]) -> Tensor:
    """Encode texts or images with the model itself; (N, P) float32 of unit length."""
    run: Any = encode_texts if isinstance(inputs[0], str) else encode_images
    embeds: Tensor = run(tested.model, tested.processor, list(inputs))
    return embeds


@dataclass(frozen=True)
class Comparison:
    """Embeddings of a server beside the model's own.

    Args:
        tested: The model.
        inputs: N texts or images.
        served: (N, any width) float32, as they came.
        expected: (N, P) float32 of unit length.
        tolerance: Largest harmless distance.
        in_sequence: True if each input was sent alone, after the reply to the one before it. Then
            errors within the tolerance of half precision are looked for, too.
    """

    tested: ModelUnderTest
    inputs: Sequence[Any]
    served: Tensor
    expected: Tensor
    tolerance: float
    in_sequence: bool = False

    def measure(self, expected: Tensor, *, directions: bool = False) -> Tensor:
        """Return the distance of each row, (N,), infinite if the widths differ."""
        if self.served.shape != expected.shape:
            return torch.full((len(self.served),), torch.inf)
        served = F.normalize(self.served, dim=-1) if directions else self.served
        return measure_distances(served, expected)

    def explain(self) -> str | None:
        """Return one or two sentences on the difference and its cause; None if there is none."""
        distances = self.measure(self.expected)
        distance, count = float(distances.max()), int((distances > self.tolerance).sum())
        if distance <= self.tolerance:
            if not self.in_sequence or distance <= _ROUNDING:
                return None
            cause = self._find_cause()
            return cause and f"embeddings differ by {distance:.1e}, which is allowed, but {cause}."
        if (broken := self._find_broken()) is not None:
            return broken
        text = (
            f"{count} of {len(distances)} embeddings differ by up to {distance:.1e} (allowed: "
            f"{self.tolerance:.2g})"
        )
        if distance == torch.inf:
            width, full = self.served.shape[1], self.expected.shape[1]
            text = f"the embeddings have {width} dimensions, the model's have {full}"
            part = F.normalize(self.expected[:, :width], dim=-1)
            if float(self.measure(part, directions=True).max()) <= self.tolerance:
                return f"{text}: only the first {width} dimensions are returned."
        if (cause := self._find_cause()) is not None:
            return f"{text}: {cause}."
        if (crosstalk := self._find_crosstalk()) is not None:
            return crosstalk
        if (dtype := self._find_half_precision()) is not None:
            return (
                f"{text}, as computing in {dtype} moves them here: the server computes in less "
                f"than the model's precision. If it is meant to, give --served-dtype {dtype}."
            )
        return f"{text}. No known error gives them."

    def _find_broken(self) -> str | None:
        """Detect what the values themselves show: NaN, other lengths, rounding."""
        served, lengths = self.served, self.served.norm(dim=-1)
        if not served.isfinite().all():
            count = int((~served.isfinite()).any(dim=1).sum())
            return f"{count} of {len(served)} embeddings have NaN or infinity."
        if (lengths == 0).any():
            return f"{int((lengths == 0).sum())} of {len(served)} embeddings are zero."
        if len(served) > 1 and (served == served[0]).all():
            return f"all {len(served)} inputs have one embedding: requests or rows are mixed up."
        direction = float(self.measure(self.expected, directions=True).max())
        rounding = find_rounding(served)
        if rounding == "integers" and direction <= _QUANTIZED:
            return "the values are integers: embeddings are quantized, where float was asked for."
        if direction <= self.tolerance:
            return (
                f"embeddings are not normalized: lengths are {float(lengths.min()):.3g} to "
                f"{float(lengths.max()):.3g}, not 1. Their directions are right."
            )
        rounded = self.expected if rounding is None else _ROUNDINGS[rounding][0](self.expected)
        moved = float(measure_distances(rounded, self.expected).max()) + _ROUNDING
        # Values near the middle of two steps may be rounded to the other one.
        if rounding not in (None, "integers") and direction <= 1.5 * moved:
            return f"embeddings differ by {direction:.1e}: the values are rounded to {rounding}."
        return None

    def _find_cause(self) -> str | None:
        """Name the cause that gives these embeddings, and how closely it does.

        The model's own embeddings are computed as those of the causes are: in half precision
        another order of computing is as far away as some causes.
        """
        causes = list_causes(self.tested, self.inputs)
        before = self.measure(embed_inputs(self.tested, next(causes)[1]), directions=True)
        worst, moved = int(before.argmax()), float(before.max())
        direction = F.normalize(self.served, dim=-1)
        best, best_name = torch.inf, ""
        for name, read in causes:
            # The input that differs most goes first; the others only if it comes near.
            first = embed_inputs(self.tested, [read[worst]])
            if first.shape[1] != direction.shape[1]:
                continue
            distance = float(measure_distances(direction[worst, None], first))
            if distance > max(_ROUNDING, _PROMISING * min(moved, 2.0)):
                continue
            distance = float(measure_distances(direction, embed_inputs(self.tested, read)).max())
            if distance < best:
                best, best_name = distance, name
            if best <= _ROUNDING:
                break
        allowed = _EXPLAINED * min(moved, 2.0)
        if float(self.measure(self.expected).max()) > self.tolerance:
            # In half precision an error may change embeddings by less than the tolerance.
            allowed = max(allowed, min(self.tolerance, moved / 2))
        if best > allowed:
            return None
        lengths, note = self.served.norm(dim=-1), ""
        if float((lengths - 1).abs().max()) > max(self.tolerance, 1e-3):
            note = f", and lengths are {lengths.min():.3g} to {lengths.max():.3g}, not 1"
        return f"{best_name} (which gives them within {best:.1e}{note})"

    def _find_crosstalk(self) -> str | None:
        """Detect inputs that have the embedding of another."""
        if self.served.shape != self.expected.shape:
            return None
        swapped = []
        for row in (self.measure(self.expected) > self.tolerance).nonzero().flatten().tolist():
            distances = (self.expected - self.served[row]).norm(dim=-1)
            nearest = int(distances.argmin())
            if nearest != row and float(distances[nearest]) <= self.tolerance:
                swapped.append(f"{self._name(row)} has that of {self._name(nearest)}")
        if not swapped:
            return None
        cause = (
            "Each was sent alone, so that a cache, or a change of the inputs, takes them for the "
            "same."
            if self.in_sequence
            else "Rows or requests are mixed up (cross-talk)."
        )
        return (
            f"{len(swapped)} of {len(self.served)} inputs have another input's embedding: "
            f"{list_first(swapped, '; ')}. {cause}"
        )

    def _name(self, row: int) -> str:
        value = self.inputs[row]
        if not isinstance(value, str):
            return f"image {row}"
        return repr(value if len(value) <= 32 else f"{value[:24]}… ({len(value)} characters)")

    def _find_half_precision(self) -> str | None:
        """Return the dtype that moves embeddings as far, and in the same direction.

        It takes several embeddings, because a single one may move in that direction by chance.
        """
        if self.served.shape != self.expected.shape or len(self.expected) < 2:
            return None
        error = F.normalize(self.served, dim=-1) - self.expected  # (N, P)
        for name, dtype in _HALF.items():
            if dtype == self.tested.model.dtype:
                continue
            model, processor = load_model(
                self.tested.folder, device=self.tested.device, dtype=dtype
            )
            rounded = ModelUnderTest(
                self.tested.folder, self.tested.device, model=model, processor=processor
            )
            change = encode(rounded, self.inputs) - self.expected
            ratio = float(error.norm() / change.norm().clamp(min=_ROUNDING))
            cosine = float(F.cosine_similarity(error.flatten(), change.flatten(), dim=0))
            if 1 / _AS_MUCH <= ratio <= _AS_MUCH and cosine >= _SAME_ERROR:
                return name
        return None


def find_rounding(served: Tensor) -> str | None:
    """Return what values, (N, width) float32, are rounded to; None if they have all digits."""
    values = served[served.isfinite()].double()
    for name, (round_values, most) in _ROUNDINGS.items():
        if bool(((values - round_values(values)).abs() <= most).all()):
            return name
    return None
