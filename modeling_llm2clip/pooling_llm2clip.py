"""Selects the tokens of each caption and pools them into its embedding.

Uploaded with the weights. Shapes: B texts, L tokens, D width of the LLM.
"""

from __future__ import annotations

import torch
from torch import Tensor


def build_position_ids(attention_mask: Tensor) -> Tensor:
    """Build positions that start at each text's first real token, so left padding has no effect.

    Args:
        attention_mask: (B, L), 1 at real tokens, which are contiguous.

    Returns:
        (B, L) int64; 0, 1, 2, … without left padding.
    """
    first_real = attention_mask.long().argmax(dim=1, keepdim=True)  # (B, 1)
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions - first_real).clamp(min=0)


def count_unpooled(
    prompt_length: int | None, *, num_prefix: int, num_suffix: int, suffix_ends_special: bool
) -> int:
    """Count the tokens before each caption that are not pooled: prompt prefix and instruction.

    Args:
        prompt_length: number of tokens of the instruction when it is tokenized alone, prompt
            included, as sentence-transformers counts them: without a special token at the end. None
            or 0 without an instruction.
        num_prefix: number of tokens of the prompt's prefix.
        num_suffix: number of tokens of the prompt's suffix.
        suffix_ends_special: whether the suffix ends with a special token.

    Raises:
        ValueError: `prompt_length` is shorter than the prompt.
    """
    if not prompt_length:
        return num_prefix
    num_instruction = int(prompt_length) - num_prefix - num_suffix + bool(suffix_ends_special)
    if num_instruction < 0:
        raise ValueError(
            f"prompt_length={prompt_length} is shorter than the model's own prompt "
            f"({num_prefix + num_suffix} tokens): it must be the length of the tokenized "
            "instruction, prefix and suffix included."
        )
    return num_prefix + num_instruction


def build_pooling_mask(attention_mask: Tensor, *, num_unpooled: int) -> Tensor:
    """Mark the tokens to pool: all real tokens except for the first `num_unpooled`.

    Args:
        attention_mask: (B, L), 1 at real tokens.
        num_unpooled: number of tokens of prompt and instruction before each caption.

    Returns:
        (B, L) bool.
    """
    real = attention_mask.bool()
    return real & (real.long().cumsum(dim=1) > num_unpooled)


def pool_tokens(hidden_states: Tensor, pooling_mask: Tensor, *, pooling: str) -> Tensor:
    """Pool the marked tokens in float32: their mean, or the last one.

    Args:
        hidden_states: (B, L, D) of any float dtype.
        pooling_mask: (B, L) bool, with at least one True per row.
        pooling: `"mean"` or `"last_token"`.

    Returns:
        (B, D) float32.
    """
    if pooling == "last_token":
        positions = torch.arange(pooling_mask.shape[1], device=pooling_mask.device)
        last = (positions * pooling_mask).argmax(dim=1)  # (B,)
        return hidden_states[torch.arange(last.shape[0], device=last.device), last].float()
    if pooling != "mean":
        raise ValueError(f"pooling={pooling!r} must be 'mean' or 'last_token'.")
    weights = pooling_mask.to(torch.float32)
    # One matrix product per row computes the masked sum without a (B, L, D) float32 copy. It runs
    # in float32 even under autocast.
    with torch.autocast(hidden_states.device.type, enabled=False):
        summed = torch.bmm(weights.unsqueeze(1), hidden_states.float()).squeeze(1)  # (B, D)
    return summed / weights.sum(dim=1, keepdim=True)


def mask_unpadded(input_ids: Tensor, *, pad_token_id: int | None) -> Tensor:
    """Build the mask of ids that came without one, in which every token is real.

    Args:
        input_ids: (B, L).
        pad_token_id: id of padding; None if it cannot be distinguished from text.

    Returns:
        (B, L) int64, all ones.

    Raises:
        ValueError: a row starts or ends with padding.
    """
    if pad_token_id is not None and input_ids.ndim == 2:
        ends = input_ids[:, :1], input_ids[:, -1:]
        padded = torch.cat(ends, dim=1).eq(pad_token_id).any(dim=1)
        _refuse(padded, input_ids, f"have padding (id {pad_token_id}) and no attention_mask; pass "
                "the attention_mask that the tokenizer returned")  # fmt: skip
    return torch.ones_like(input_ids)


def check_token_rows(
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    prefix_ids: list[int],
    suffix_ids: list[int],
    max_length: int,
    vocabulary_size: int,
    num_unpooled: int = 0,
) -> None:
    """Check that token ids can come from the model's own tokenizer.

    Args:
        input_ids: (B, L) int64, padded on either side.
        attention_mask: (B, L), 1 at real tokens.
        prefix_ids: ids of the prompt's prefix, with which every text must begin.
        suffix_ids: ids of the prompt's suffix, with which every text must end.
        max_length: maximum number of real tokens per text.
        vocabulary_size: number of rows of the LLM's embedding table.
        num_unpooled: number of tokens of prompt and instruction, after which every text must have a
            token of its own.

    Raises:
        ValueError: a row is invalid. The message shows the first such row and what to do.
    """
    if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} and attention_mask "
            f"{tuple(attention_mask.shape)} must both have shape (texts, tokens)."
        )
    if 0 in input_ids.shape:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: give at least one text.")
    if input_ids.is_floating_point():
        raise ValueError(
            f"input_ids must be integers, got {input_ids.dtype}. Pass precomputed embeddings "
            "to project_caption_embeds instead."
        )
    lengths = attention_mask.long().sum(dim=1)  # (B,)
    first_real = attention_mask.long().argmax(dim=1)  # (B,)
    last_real = attention_mask.shape[1] - 1 - attention_mask.flip(1).long().argmax(dim=1)
    _refuse((last_real - first_real + 1 != lengths) & (lengths > 0), attention_mask,
            "have a gap in their attention_mask: real tokens must be contiguous")  # fmt: skip
    _refuse(lengths > max_length, lengths, f"have more than max_text_length={max_length} tokens; "
            f"tokenize with truncation=True and max_length={max_length} at most, or raise "
            "max_text_length in the config")  # fmt: skip
    least = len(prefix_ids) + len(suffix_ids) - bool(suffix_ids)
    _refuse(lengths <= least, lengths, "have no token to pool: the text is empty")
    if num_unpooled > len(prefix_ids):
        _refuse(lengths <= num_unpooled + len(suffix_ids), lengths, "have nothing after their "
                f"instruction: the text is blank, or the {num_unpooled} tokens of prompt and "
                "instruction leave no room for it. Shorten the instruction, or raise the maximum "
                "length (max_text_length, sentence-transformers' max_seq_length)")  # fmt: skip
    _refuse((input_ids < 0).any(dim=1) | (input_ids >= vocabulary_size).any(dim=1), input_ids,
            f"have ids outside the vocabulary of {vocabulary_size}; use the tokenizer or "
            "processor that is saved with the model")  # fmt: skip
    _check_piece(input_ids, first_real, prefix_ids, where="begin with the model's prompt")
    _check_piece(input_ids, first_real + lengths - len(suffix_ids), suffix_ids,
                 where="end with the prompt's suffix")  # fmt: skip


def _check_piece(input_ids: Tensor, starts: Tensor, piece: list[int], *, where: str) -> None:
    if not piece:
        return
    wanted = torch.tensor(piece, device=input_ids.device)
    columns = starts.unsqueeze(1) + torch.arange(len(piece), device=input_ids.device)
    found = input_ids.gather(1, columns.clamp(0, input_ids.shape[1] - 1))  # (B, len(piece))
    _refuse((found != wanted).any(dim=1), found, f"do not {where} {piece}; use the tokenizer or "
            "processor that is saved with the model")  # fmt: skip


def _refuse(is_bad: Tensor, found: Tensor, complaint: str) -> None:
    if is_bad.any():
        row = int(is_bad.long().argmax())
        raise ValueError(
            f"{int(is_bad.sum())} of {len(is_bad)} texts {complaint}. "
            f"First bad row: {row} ({found[row].tolist()})."
        )
