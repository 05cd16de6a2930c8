"""Laws of planned batches: nothing lost, nothing doubled, within the budget, little padding."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_llm2clip.batching_llm2clip import (
    MAX_PADDING_SHARE,
    PASS_COST_TOKENS,
    plan_token_batches,
)

LENGTHS = st.lists(st.integers(1, 400), max_size=60)
BUDGETS = st.integers(1, 2000)


@given(LENGTHS, BUDGETS)
@settings(deadline=None)
def test_batches_cover_every_index_once(lengths: list[int], token_budget: int) -> None:
    batches = plan_token_batches(lengths, token_budget=token_budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batches)


@given(LENGTHS, BUDGETS)
@settings(deadline=None)
def test_a_batch_keeps_the_budget_or_is_one_text(lengths: list[int], token_budget: int) -> None:
    for batch in plan_token_batches(lengths, token_budget=token_budget):
        padded_size = len(batch) * max(lengths[index] for index in batch)
        assert padded_size <= token_budget or len(batch) == 1


@given(LENGTHS, BUDGETS)
@settings(deadline=None)
def test_padding_is_at_most_a_tenth_or_64_tokens(lengths: list[int], token_budget: int) -> None:
    for batch in plan_token_batches(lengths, token_budget=token_budget):
        padded_size = len(batch) * max(lengths[index] for index in batch)
        padding = padded_size - sum(lengths[index] for index in batch)
        assert padding <= max(MAX_PADDING_SHARE * padded_size, PASS_COST_TOKENS)


@given(LENGTHS, BUDGETS)
@settings(deadline=None)
def test_all_padding_is_at_most_a_tenth_of_all_tokens(
    lengths: list[int], token_budget: int
) -> None:
    batches = plan_token_batches(lengths, token_budget=token_budget)
    num_tokens = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert num_tokens - sum(lengths) <= MAX_PADDING_SHARE * num_tokens


@given(LENGTHS, BUDGETS)
@settings(deadline=None)
def test_longest_texts_come_first(lengths: list[int], token_budget: int) -> None:
    batches = plan_token_batches(lengths, token_budget=token_budget)
    planned = [lengths[index] for batch in batches for index in batch]
    assert planned == sorted(lengths, reverse=True)


def test_equal_lengths_fill_the_budget() -> None:
    # 100 texts of 10 tokens, 250 tokens a batch: 25 texts fit, so 4 batches and not one more.
    batches = plan_token_batches([10] * 100, token_budget=250)
    assert [len(batch) for batch in batches] == [25, 25, 25, 25]


def test_no_texts_give_no_batches() -> None:
    assert plan_token_batches([], token_budget=100) == []


def test_a_text_longer_than_the_budget_goes_alone() -> None:
    assert plan_token_batches([5, 500, 5], token_budget=100) == [[1], [0, 2]]
