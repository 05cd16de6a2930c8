"""Batches of texts that waste little on padding.

Travels to the Hub beside the weights, so that every way into the model encodes at the same speed.
"""

from __future__ import annotations

from collections.abc import Sequence

# A pass over the weights costs about as much as this many tokens; merging two small batches pays
# as long as it pads less than that.
PASS_COST_TOKENS = 64
MAX_PADDING_SHARE = 0.1


def plan_token_batches(lengths: Sequence[int], *, token_budget: int) -> list[list[int]]:
    """Group texts of like length into batches that fit a budget of tokens, padding included.

    Args:
        lengths: tokens of each text.
        token_budget: most tokens a batch may hold, padding included; a longer text goes alone.
    Returns: batches of indices into `lengths`, longest texts first, each index once. Of all tokens
        padding is at most a tenth; of a batch's it is at most a tenth, or 64 tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    num_tokens = all_padding = padding = 0
    for index in order:
        longest = lengths[batches[-1][0]] if batches else 0
        padded_size = longest * (len(batches[-1]) + 1) if batches else 0
        more = longest - lengths[index]
        allowed = max(MAX_PADDING_SHARE * padded_size, PASS_COST_TOKENS)
        if (
            batches
            and padded_size <= token_budget
            and padding + more <= allowed
            and all_padding + more <= MAX_PADDING_SHARE * (num_tokens + longest)
        ):
            batches[-1].append(index)
            padding += more
            all_padding += more
            num_tokens += longest
        else:
            batches.append([index])
            padding = 0
            num_tokens += lengths[index]
    return batches
