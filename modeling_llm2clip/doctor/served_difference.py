"""Finds the error of a server from its embeddings and the model's own.

Shapes: N texts or images, P `projection_dim`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model_folders.golden_embeddings import find_tolerance, measure_distances
from .served_variants import Variant

# A variant explains embeddings that it comes this much closer to than the model's own are: servers
# prepare inputs by other library code, so that not every digit agrees.
_EXPLAINED = 0.1
# Below this share of its own distance for one input, an error is computed for all.
_PROMISING = 0.5
# What remains between two computations in float32.
_ROUNDING = find_tolerance(torch.float32, other_machine=True)
# Rounding errors of two machines are of one size, and not equal.
_AS_MUCH = 3.0
# The weights are rounded alike everywhere, so that half precision moves embeddings about where it
# moves them here. Measured on tiny models of three families: cosines of the errors 0.5 to 0.7 for
# the right dtype, at most 0.1 for the other one and for 8-bit weights.
_SAME_ERROR = 0.4
# int8 of unit embeddings; other inputs and other errors are further off.
_QUANTIZED = 0.05
_MOST_DECIMALS = 5
_DECIMALS = " decimals"
_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARED_SHOWN = 20  # characters that two texts have in common, from which on they are mentioned
_ROWS_SHOWN = 3


@dataclass(frozen=True)
class Comparison:
    """Embeddings of a server beside the model's own.

    Args:
        served: (N, any width) float32, as they came.
        wanted: (N, P) float32 of unit length.
        inputs: N texts or images.
        tolerance: Largest harmless distance.
        list_variants: Lists the errors to look for.
        encode_in_half: Returns the model's own embeddings in each half precision.
        in_sequence: True if each input was sent alone, after the reply to the one before it. Then
            errors within the tolerance of half precision are looked for, too.
    """

    served: Tensor
    wanted: Tensor
    inputs: Sequence[Any]
    tolerance: float
    list_variants: Callable[[], Iterable[Variant]]
    encode_in_half: Callable[[], dict[str, Tensor]]
    in_sequence: bool = False

    @property
    def same_width(self) -> bool:
        return self.served.shape == self.wanted.shape

    def measure(self, *, directions: bool = False) -> float:
        """Return the largest distance, of `directions` alone; infinite if the widths differ."""
        if not self.same_width:
            return float("inf")
        served = F.normalize(self.served, dim=-1) if directions else self.served
        return float(measure_distances(served, self.wanted).max())

    def explain(self) -> str | None:
        """Return one or two sentences on the difference and its cause; None if there is none."""
        if (distance := self.measure()) <= self.tolerance:
            return _find_closer(self) if self.in_sequence and distance > _ROUNDING else None
        finders = (_find_broken, _find_crosstalk, _find_length, _find_rounded)
        return next(filter(None, (find(self) for find in finders)), None) or _find_cause(self)

    def find_variants(self) -> list[tuple[float, str]]:
        """Compute each variant until one fits; return distances and names, nearest first."""
        found = []
        if self.served.shape[1] < self.wanted.shape[1]:
            part = F.normalize(self.wanted[:, : self.served.shape[1]], dim=-1)
            name = f"only the first {self.served.shape[1]} dimensions are returned"
            found.append((self._measure_from(part, range(len(part))), name))
        for variant in self.list_variants():
            distance = self._measure_variant(variant)
            found.append((distance, variant.name))
            if distance <= _ROUNDING:
                break
        return sorted(one for one in found if one[0] < float("inf"))

    def _measure_variant(self, variant: Variant) -> float:
        """Return the distance from a variant's embeddings; infinite if the widths differ.

        The input that differs most goes first; the others are computed only if it comes near.
        """
        rows = list(range(len(self.served)))
        if variant.of_batch:
            return self._measure_from(variant.compute(self.inputs), rows)
        direction = F.normalize(self.served, dim=-1)
        own = torch.full((len(rows),), torch.inf)
        if self.same_width:
            own = measure_distances(direction, self.wanted)
        worst = int(own.argmax())
        distance = self._measure_from(variant.compute([self.inputs[worst]]), [worst])
        rows.remove(worst)
        if not rows or distance > max(_ROUNDING, _PROMISING * min(float(own[worst]), 2.0)):
            return distance
        others = variant.compute([self.inputs[row] for row in rows])
        return max(distance, self._measure_from(others, rows))

    def _measure_from(self, embeds: Tensor, rows: Sequence[int]) -> float:
        direction = F.normalize(self.served[list(rows)], dim=-1)
        if embeds.shape != direction.shape:
            return float("inf")
        return float(measure_distances(direction, embeds).max())

    def describe_distance(self) -> str:
        if not self.same_width:
            return (
                f"the embeddings have {self.served.shape[1]} dimensions, the model's have "
                f"{self.wanted.shape[1]}"
            )
        distances = measure_distances(self.served, self.wanted)
        wrong = int((~(distances <= self.tolerance)).sum())
        return (
            f"{wrong} of {len(distances)} embeddings differ by up to {float(distances.max()):.1e} "
            f"(allowed: {self.tolerance:.2g})"
        )


def _find_rounded(compared: Comparison) -> str | None:
    """Name the rounding of the values if it alone explains the difference."""
    rounding = find_rounding(compared.served)
    if rounding is None or not compared.same_width:
        return None
    if rounding in _HALF:
        rounded = compared.wanted.to(_HALF[rounding]).float()
    elif rounding.endswith(_DECIMALS):
        rounded = compared.wanted.round(decimals=int(rounding.removesuffix(_DECIMALS)))
    else:
        return None
    by = float(measure_distances(rounded, compared.wanted).max())
    # Values near the middle of two steps may be rounded to the other one.
    if compared.measure() > 1.5 * by + _ROUNDING:
        return None
    return f"{compared.describe_distance()}: the values are rounded to {rounding}."


def _find_cause(compared: Comparison) -> str:
    """Name the variant, or the dtype, that gives these embeddings."""
    found, moved = compared.find_variants(), compared.measure(directions=True)
    distance, name = found[0] if found else (float("inf"), "")
    # In half precision the tolerance may be larger than what an error costs.
    if distance <= max(_EXPLAINED * min(moved, 2.0), min(compared.tolerance, moved / 2)):
        lengths, note = compared.served.norm(dim=-1), ""
        if float((lengths - 1).abs().max()) > max(compared.tolerance, 1e-3):
            note = f", and lengths are {lengths.min():.3g} to {lengths.max():.3g}, not 1"
        within = f"which gives them within {distance:.1e}{note}"
        return f"{compared.describe_distance()}: {name} ({within})."
    if (dtype := _find_half_precision(compared)) is not None:
        return (
            f"{compared.describe_distance()}, as computing in {dtype} moves them here: the server "
            f"computes in less than float32. If it is meant to, give --served-dtype {dtype}."
        )
    nearest = f"; the nearest: {name} (still {distance:.1e} apart)" if found else ""
    return f"{compared.describe_distance()}. No known error gives them{nearest}."


def _find_half_precision(compared: Comparison) -> str | None:
    """Return the dtype that moves embeddings as far, and in the same direction.

    It takes several embeddings, because a single one may move in that direction by chance.
    """
    if not compared.same_width or len(compared.wanted) < 2:
        return None
    error = F.normalize(compared.served, dim=-1) - compared.wanted  # (N, P)
    for dtype, embeds in compared.encode_in_half().items():
        wanted = embeds - compared.wanted
        ratio = float(error.norm() / wanted.norm().clamp(min=_ROUNDING))
        alike = float(F.cosine_similarity(error.flatten(), wanted.flatten(), dim=0))
        if 1 / _AS_MUCH <= ratio <= _AS_MUCH and alike >= _SAME_ERROR:
            return dtype
    return None


def _find_closer(compared: Comparison) -> str | None:
    """Name the variant that explains a difference which rounding could explain, too."""
    own = compared.measure(directions=True)
    found = compared.find_variants()
    if not found or found[0][0] > _EXPLAINED * own:
        return None
    distance, name = found[0]
    return (
        f"embeddings differ by up to {own:.1e}, which {compared.tolerance:.2g} allows, but {name} "
        f"gives them within {distance:.1e}."
    )


def find_rounding(served: Tensor) -> str | None:
    """Return what values, (N, width) float32, are rounded to; None if they have all digits."""
    values = served[served.isfinite()]
    if bool((values == values.round()).all()):
        return "integers"
    for name, dtype in _HALF.items():
        if bool((values == values.to(dtype).float()).all()):
            return name
    for decimals in range(1, _MOST_DECIMALS + 1):
        scaled = values.double() * 10**decimals
        # float32 holds 7 digits: less than a hundredth of the last decimal.
        if bool(((scaled - scaled.round()).abs() < 0.01).all()):
            return f"{decimals}{_DECIMALS}"
    return None


def _find_broken(compared: Comparison) -> str | None:
    """Detect NaN, zeros, and one embedding for all inputs."""
    served, wanted = compared.served, compared.wanted
    broken = (~served.isfinite()).any(dim=1)
    if broken.any():
        return f"{int(broken.sum())} of {len(served)} embeddings have NaN or infinity."
    if (served.norm(dim=-1) == 0).any():
        return f"{int((served.norm(dim=-1) == 0).sum())} of {len(served)} embeddings are zero."
    if len(served) < 2 or float((wanted - wanted[:1]).norm(dim=-1).max()) <= compared.tolerance:
        return None
    if float((served - served[:1]).norm(dim=-1).max()) > compared.tolerance:
        return None
    return f"all {len(served)} inputs have one embedding: requests or rows are mixed up."


def _find_crosstalk(compared: Comparison) -> str | None:
    """Detect inputs that have the embedding of another."""
    served, wanted = compared.served, compared.wanted
    if not compared.same_width:
        return None
    own = measure_distances(served, wanted)
    swapped = []
    for row in (own > compared.tolerance).nonzero().flatten().tolist():
        distances = (wanted - served[row]).norm(dim=-1)
        nearest = int(distances.argmin())
        if nearest != row and float(distances[nearest]) <= compared.tolerance:
            swapped.append((row, nearest))
    if not swapped:
        return None
    # A change of inputs can make two of them one, such as a text and the same in lowercase.
    found = compared.find_variants()
    if found and found[0][0] <= _ROUNDING:
        return f"{compared.describe_distance()}: {found[0][1]}."
    shown = [
        f"{_name(compared.inputs[row], row)} has that of "
        f"{_name(compared.inputs[nearest], nearest)}"
        + _describe_shared(compared.inputs[row], compared.inputs[nearest])
        for row, nearest in swapped[:_ROWS_SHOWN]
    ]
    more = f"; and {len(swapped) - _ROWS_SHOWN} more" if len(swapped) > _ROWS_SHOWN else ""
    cause = (
        "Each was sent alone, so that a cache, or a change of the inputs, takes them for the same."
        if compared.in_sequence
        else "Rows or requests are mixed up (cross-talk)."
    )
    return (
        f"{len(swapped)} of {len(served)} inputs have another input's embedding: "
        f"{'; '.join(shown)}{more}. {cause}"
    )


def _name(one: Any, row: int) -> str:
    if not isinstance(one, str):
        return f"image {row}"
    return repr(one if len(one) <= 32 else f"{one[:24]}… ({len(one)} characters)")


def _describe_shared(first: Any, second: Any) -> str:
    """Return a note on the characters that two texts begin or end with in common."""
    if not isinstance(first, str) or not isinstance(second, str):
        return ""
    for place, one, other in (
        ("first", first, second),
        ("last", first[::-1], second[::-1]),
    ):
        pairs = zip(one, other, strict=False)  # of other lengths
        count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if count >= _SHARED_SHOWN:
            return f" (the {place} {count} characters are the same)"
    return ""


def _find_length(compared: Comparison) -> str | None:
    if not compared.same_width:
        return None
    lengths, direction = compared.served.norm(dim=-1), compared.measure(directions=True)
    if find_rounding(compared.served) == "integers" and direction <= _QUANTIZED:
        return "the values are integers: embeddings are quantized, where float was asked for."
    if direction > compared.tolerance:
        return None
    return (
        f"embeddings are not normalized: lengths are {float(lengths.min()):.3g} to "
        f"{float(lengths.max()):.3g}, not 1. Their directions are right."
    )
