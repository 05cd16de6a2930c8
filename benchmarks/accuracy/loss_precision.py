"""What the products of the contrastive loss lose in TF32, beside float32 and float64, on a CPU.

    python -m benchmarks.accuracy.loss_precision

A product in TF32 rounds its operands to 10 bits of the mantissa and sums in float32. Here, a CPU
rounds the same operands, of the logits and of both products of the backward pass. Embeddings are
random, in a cone, as those of CLIP: cosines of pairs and of others have the given means. The
inverse temperature is 100, the largest allowed. Errors are those from float64 on the same
embeddings. For comparison, `bfloat16 embeddings` rounds only the embeddings, once, before products
in float64: that is about what a training under autocast does to them in any case.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shared.provenance import describe_run, write_result

SCALE = 100.0
_DROPPED_BITS = 23 - 10  # of the mantissa
# Mean cosines: of a pair, of an image and another's text.
KINDS = {"early": (0.2, 0.15), "late": (0.28, 0.15)}


def round_to_tf32(values: Tensor) -> Tensor:
    """Round float32 values to the nearest with 10 bits of the mantissa, ties to even.

    Args:
        values: Finite, float32.
    """
    bits = values.contiguous().view(torch.int32)
    half = (1 << (_DROPPED_BITS - 1)) - 1 + ((bits >> _DROPPED_BITS) & 1)
    return ((bits + half) & -(1 << _DROPPED_BITS)).view(torch.float32)


def keep(values: Tensor) -> Tensor:
    """Return operands as they are."""
    return values


class RoundedProduct(torch.autograd.Function):
    """Product of a matrix and another's transpose, whose operands are rounded, also backward."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, rounded: Callable[..., Tensor]) -> Tensor:
        """Compute the product of rounded operands."""
        ctx.save_for_backward(left, right)
        ctx.rounded = rounded
        return rounded(left) @ rounded(right).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Compute both gradients from rounded operands."""
        left, right = (ctx.rounded(side) for side in ctx.saved_tensors)
        gradient = ctx.rounded(gradients[0])
        return gradient @ right, gradient.T @ left, None


def draw_embeddings(count: int, width: int, kind: str, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw unit images and texts, (count, width) float32.

    Args:
        count: Number of pairs.
        width: Of the embeddings.
        kind: In `KINDS`.
        seed: Of the random numbers.
    """
    pair, other = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, width, generator=generator), dim=1)

    shared = other**0.5 * draw(1) + (pair - other) ** 0.5 * draw(count)
    sides = [F.normalize(shared + (1 - pair) ** 0.5 * draw(count), dim=1) for _ in range(2)]
    return sides[0], sides[1]


def compute(images: Tensor, texts: Tensor, rounded: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Compute logits, loss and gradients in the dtype of the embeddings.

    Args:
        images: (N, D), unit length.
        texts: (N, D), row i is the text of image i.
        rounded: Rounds operands of products.
    """
    scale = torch.tensor([SCALE], dtype=images.dtype, requires_grad=True)
    sides = [side.clone().requires_grad_() for side in (images, texts)]
    logits = RoundedProduct.apply(scale * sides[0], sides[1], rounded)
    labels = torch.arange(len(images))
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    gradients = torch.autograd.grad(loss, [*sides, scale])
    names = ("images", "texts", "scale")
    return {
        "logits": logits.detach(),
        "loss": loss.detach(),
        **dict(zip(names, gradients, strict=True)),
    }


def compare(images: Tensor, texts: Tensor) -> dict[str, dict[str, float]]:
    """Compare arithmetics with float64 on the same embeddings.

    Args:
        images: (N, D) float32, unit length.
        texts: (N, D) float32.
    """
    exact = compute(images.double(), texts.double(), keep)
    brief = [side.bfloat16().double() for side in (images, texts)]
    return {
        "float32": measure(compute(images, texts, keep), exact),
        "tf32": measure(compute(images, texts, round_to_tf32), exact),
        "bfloat16 embeddings": measure(compute(*brief, keep), exact),
    }


def measure(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Measure errors: the largest of a logit, and relative ones of loss and gradients.

    Args:
        found: Of `compute`.
        exact: The same in float64.
    """
    errors = {name: found[name].double() - exact[name] for name in exact}
    relative = {name: float(errors[name].norm() / exact[name].norm()) for name in exact}
    return {
        "largest_logit_error": float(errors["logits"].abs().max()),
        "loss": float(exact["loss"]),
        "loss_error": relative["loss"],
        "gradient_error": max(relative["images"], relative["texts"]),
        "scale_gradient_error": relative["scale"],
    }


def main() -> None:
    """Compare on every kind of embeddings, and write the errors."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1280)
    output = Path(__file__).parents[1] / "results" / "loss_precision.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    size = {"count": arguments.count, "width": arguments.width}
    runs = [
        {
            "kind": kind,
            "cosines": KINDS[kind],
            "errors": compare(*draw_embeddings(**size, kind=kind)),
        }
        for kind in KINDS
    ]
    write_result(arguments.output, {**describe_run("torch"), **size, "scale": SCALE, "runs": runs})


if __name__ == "__main__":
    main()
