"""Laws of pooling masks, positions, pooling, and the checks of token ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modeling_llm2clip.heads_llm2clip import (
    build_pooling_mask,
    build_position_ids,
    mask_checked,
    mask_checked_in_graph,
    pool_tokens,
)

PREFIX, SUFFIX = [5, 6], [8]
RULES = {"prefix_ids": PREFIX, "suffix_ids": SUFFIX, "max_length": 8, "vocabulary_size": 100}


@st.composite
def padded_rows(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Lengths of a few texts, their padded width, and the number of unpooled tokens before them."""
    num_unpooled = draw(st.integers(0, 3))
    lengths = draw(st.lists(st.integers(num_unpooled + 1, 9), min_size=1, max_size=5))
    return lengths, max(lengths) + draw(st.integers(0, 3)), num_unpooled


def pad(rows: list[Tensor], width: int, *, side: str) -> tuple[Tensor, Tensor]:
    """Pad (length, …) rows with 99 to `width` on one side; return values and mask."""
    shape = (len(rows), width, *rows[0].shape[1:])
    values = torch.full(shape, 99, dtype=rows[0].dtype)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        values[number, where], mask[number, where] = row, 1
    return values, mask


def make_batch(
    case: tuple[list[int], int, int], side: str
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Make what is pooled of random rows, the rows padded, and the mask of what is pooled."""
    lengths, width, num_unpooled = case
    rows = [torch.randn(length, 4) for length in lengths]
    hidden, mask = pad(rows, width, side=side)
    parts = [row[num_unpooled:] for row in rows]
    return parts, hidden, build_pooling_mask(mask, num_unpooled=num_unpooled)


@pytest.mark.parametrize("side", ["left", "right"])
@given(padded_rows())
@settings(max_examples=30, deadline=None)
def test_each_pooling_is_what_plain_code_computes_of_the_pooled_tokens(
    side: str, case: tuple[list[int], int, int]
) -> None:
    parts, hidden, pooling_mask = make_batch(case, side)
    pooled = {
        name: pool_tokens(hidden, pooling_mask, pooling=name)
        for name in ("mean", "weighted_mean", "last_token", "cls")
    }
    weights = [torch.arange(1.0, len(part) + 1)[:, None] for part in parts]
    weighted = [(w * p).sum(0) / w.sum() for w, p in zip(weights, parts, strict=True)]
    # Sums of at most 12 float32 numbers in another order; the padding's 99 cancels out exactly.
    assert torch.allclose(pooled["mean"], torch.stack([p.mean(dim=0) for p in parts]), atol=1e-5)
    assert torch.allclose(pooled["weighted_mean"], torch.stack(weighted), atol=1e-5)
    assert torch.equal(pooled["last_token"], torch.stack([part[-1] for part in parts]))
    assert torch.equal(pooled["cls"], torch.stack([part[0] for part in parts]))


@pytest.mark.parametrize("side", ["left", "right"])
@given(padded_rows())
@settings(max_examples=30, deadline=None)
def test_padding_on_either_side_is_excluded_and_moves_no_position(
    side: str, case: tuple[list[int], int, int]
) -> None:
    lengths, width, num_unpooled = case
    _, mask = pad([torch.zeros(length) for length in lengths], width, side=side)
    chosen = build_pooling_mask(mask, num_unpooled=num_unpooled)
    positions = build_position_ids(mask)
    assert (positions >= 0).all()
    for row, length in enumerate(lengths):
        real = mask[row].nonzero().flatten()
        assert torch.equal(chosen[row].nonzero().flatten(), real[num_unpooled:])
        assert positions[row][real].tolist() == list(range(length))


@pytest.mark.parametrize("pooling", ["mean", "last_token"])
def test_half_precision_is_pooled_in_float32(pooling: str) -> None:
    # bfloat16 cannot count beyond 256, so the mean of 300 ones would be less than 1.
    hidden = torch.ones(1, 300, 2, dtype=torch.bfloat16)
    pooled = pool_tokens(hidden, torch.ones(1, 300, dtype=torch.bool), pooling=pooling)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, torch.ones(1, 2))


def test_autocast_does_not_affect_pooling() -> None:
    hidden = torch.linspace(0, 1, 300).reshape(1, 300, 1)
    mask = torch.ones(1, 300, dtype=torch.bool)
    wanted = pool_tokens(hidden, mask, pooling="mean")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pool_tokens(hidden, mask, pooling="mean"), wanted)


def check_token_rows(ids: Tensor, mask: Tensor, **rules: Any) -> None:
    mask_checked(ids, mask, None, num_unpooled=0, **rules)


def rows_of(*texts: list[int], side: str = "right") -> tuple[Tensor, Tensor]:
    width = max(len(text) for text in texts) + 1
    return pad([torch.tensor(text) for text in texts], width, side=side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([5, 6, *[1] * 6, 8], r"1 of 2 .* more than max_text_length=8 .*=8 at most.*row: 1"),
        ([5, 6], r"1 of 2 texts have no token to pool.*row: 1"),
        ([5, 6, 100, 8], r"1 of 2 texts have ids outside the vocabulary of 100.*row: 1"),
        ([5, 6, -1, 8], r"1 of 2 texts have ids outside the vocabulary of 100.*row: 1"),
        ([5, 7, 1, 8], r"1 of 2 .* do not begin .* prompt \[5, 6\].*row: 1 \(\[5, 7\]\)"),
        ([1, 5, 6, 8], r"1 of 2 .* do not begin .* prompt \[5, 6\].*row: 1 \(\[1, 5\]\)"),
        ([5, 6, 1, 9], r"1 of 2 texts do not end with the prompt's suffix \[8\].*row: 1 \(\[9\]\)"),
    ],
)
def test_a_text_that_cannot_come_from_the_models_tokenizer_is_named(
    text: list[int], message: str, side: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_token_rows(*rows_of([5, 6, 1, 8], text, side=side), **RULES)


def test_every_invalid_text_is_counted_and_a_row_of_padding_alone_is_one() -> None:
    ids, mask = rows_of([5, 6, 1, 8], [7, 6, 1, 8], [7, 7, 1, 8])
    with pytest.raises(ValueError, match=r"2 of 3 texts do not begin.*First invalid row: 1"):
        check_token_rows(ids, mask, **RULES)
    ids, mask = rows_of([5, 6, 1, 8], [5, 6, 1, 8])
    mask[1] = 0
    with pytest.raises(ValueError, match=r"1 of 2 texts have no token to pool"):
        check_token_rows(ids, mask, **RULES)


@pytest.mark.parametrize("suffix_ids", [[], [8]])
def test_a_mask_with_a_gap_is_rejected(suffix_ids: list[int]) -> None:
    # Real tokens are read as one contiguous run, so a gap would make padding count as real.
    ids = torch.tensor([[5, 6, 1, 99, 2, 8]])
    mask = torch.tensor([[1, 1, 1, 0, 1, 1]])
    with pytest.raises(ValueError, match=r"1 of 1 texts"):
        check_token_rows(ids, mask, **{**RULES, "suffix_ids": suffix_ids})


@pytest.mark.parametrize(
    ("ids", "mask", "error"),
    [
        (torch.tensor([5, 6, 1, 8]), torch.ones(4).long(), r"input_ids \(4,\).*shape \(texts, tok"),
        (torch.tensor([[5, 6, 1, 8]]), torch.ones(1, 3).long(), r"\(1, 4\).*attention_mask \(1, 3"),
        (torch.ones(1, 4), torch.ones(1, 4), "torch.float32.*project_caption_embeds"),
        (torch.ones(0, 5), torch.ones(0, 5), r"shape \(0, 5\). Pass at least one text"),
    ],
)
def test_ids_of_another_shape_or_dtype_are_rejected(ids: Tensor, mask: Tensor, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        check_token_rows(ids, mask, **RULES)


@pytest.mark.parametrize("has_mask", [True, False])
def test_the_operator_that_checks_is_registered_correctly(has_mask: bool) -> None:
    ids = torch.tensor([[1, 5, 2], [1, 6, 2]])
    mask = torch.ones_like(ids) if has_mask else None
    torch.library.opcheck(mask_checked_in_graph, (ids, mask, 0, [1], [2], 8, 10, 1))
