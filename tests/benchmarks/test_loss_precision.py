"""The loss in emulated TF32: operands have 10 bits, and its errors are between those of others."""

from __future__ import annotations

import torch

from benchmarks.accuracy.loss_precision import KINDS, compare, draw_embeddings, round_to_tf32


def test_tf32_keeps_10_bits_of_the_mantissa_and_rounds_to_the_nearest() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 100
    rounded = round_to_tf32(values)
    assert ((rounded - values).abs() <= values.abs() * 2.0**-11).all()
    assert torch.equal(round_to_tf32(rounded), rounded)
    brief = values.half().float()  # float16 has 10 bits, too
    assert torch.equal(round_to_tf32(brief), brief)
    normal = values.abs() > 2.0**-14
    assert torch.equal(rounded[normal], values[normal].half().float())


def test_gradients_in_tf32_are_nearer_than_those_of_embeddings_in_bfloat16() -> None:
    for kind in KINDS:
        found = compare(*draw_embeddings(128, 256, kind))
        errors = [
            found[name]["gradient_error"] for name in ("float32", "tf32", "bfloat16 embeddings")
        ]
        assert errors == sorted(errors) and errors[0] < 1e-5 < errors[1] < 1e-3
