"""Encodes many captions: duplicates once, by length, in batches of a token budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from ..packing_llm2clip import plan_token_batches
from ..processing_llm2clip import LLM2CLIPProcessor, clean_list
from .eval_mode import eval_mode
from .float32 import float32_as_such
from .precision import LoweredLayers, LowerPrecision

# The model itself cuts a batch into smaller pieces on a processor.
TOKEN_BUDGETS = {"cpu": 4096}
DEFAULT_TOKEN_BUDGET = 16384


@dataclass(frozen=True)
class EncodedCaptions:
    """Embeddings of captions, and what was done to get them.

    Attributes:
        caption_embeds: (N, D) float32 on the CPU, in the order of the captions; not projected.
        num_distinct: captions that were really computed.
        num_truncated: captions cut at the model's maximum length.
        num_tokens, num_padding: tokens computed, and padding among them.
    """

    caption_embeds: Tensor
    num_distinct: int
    num_truncated: int
    num_tokens: int
    num_padding: int


def encode_captions(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    captions: Iterable[str],
    *,
    token_budget: int | None = None,
    precision: LowerPrecision | None = None,
    show_progress: bool = False,
) -> EncodedCaptions:
    """Compute the caption embeddings that `project_caption_embeds` takes, without dropout.

    Args:
        captions: any number of non-blank texts, one at least.
        token_budget: most tokens in a batch, padding included; default by device.
        precision: run the LLM's later layers in it; None for the dtype of the weights.
            `recorded_precision.read_precision` gives what was once chosen for the model, if
            anything was.
    Raises: ValueError for what is no list of captions, or naming every blank or non-text one.
    """
    captions = clean_list(captions)
    distinct = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    ids, num_truncated = processor.list_ids(list(distinct))
    # Tokens cost about the same each; captions do not, and the longest come first.
    num_own = sum(map(len, ids))
    progress = tqdm(total=num_own, unit=" tokens", unit_scale=True, disable=not show_progress)
    embeddings, num_tokens = encode_token_ids(
        model,
        processor,
        ids,
        token_budget=token_budget,
        precision=precision,
        on_batch=progress.update,
    )
    progress.close()
    index = torch.tensor([distinct[caption] for caption in captions])
    return EncodedCaptions(
        caption_embeds=embeddings[index],
        num_distinct=len(distinct),
        num_truncated=num_truncated,
        num_tokens=num_tokens,
        num_padding=num_tokens - num_own,
    )


@torch.inference_mode()
def encode_token_ids(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    ids: Sequence[Sequence[int]],
    *,
    token_budget: int | None = None,
    precision: LowerPrecision | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> tuple[Tensor, int]:
    """Compute the embeddings of tokenized captions, longest first, without dropout or TF32.

    Args:
        ids: from the processor's `list_ids`.
        token_budget, precision: as `encode_captions`.
        on_batch: told after each batch how many tokens its captions had, without padding.
    Returns: (N, D) float32 on the CPU in the order of the ids, and how many tokens were computed.
    Raises: ValueError for a budget below one token.
    """
    budget = default_token_budget(model.device) if token_budget is None else token_budget
    if budget < 1:
        raise ValueError(f"token_budget={budget} holds no token; give a positive one, or None.")
    embeddings = torch.empty(len(ids), model.config.text_width)
    num_tokens = 0
    lowered = None if precision is None else LoweredLayers(model, precision)
    with eval_mode(model), float32_as_such():
        for rows in plan_token_batches([len(row) for row in ids], token_budget=budget):
            input_ids, attention_mask = _pad([ids[row] for row in rows], processor)
            num_tokens += input_ids.numel()
            with nullcontext() if lowered is None else lowered.in_effect():
                embeds = model.get_caption_embeds(
                    input_ids.to(model.device), attention_mask.to(model.device)
                )
            embeddings[rows] = embeds.cpu()
            if on_batch is not None:
                on_batch(int(attention_mask.sum()))
    return embeddings, num_tokens


def default_token_budget(device: torch.device) -> int:
    """Most tokens of a batch on a device, where nothing else was asked for."""
    return TOKEN_BUDGETS.get(device.type, DEFAULT_TOKEN_BUDGET)


def _pad(ids: Sequence[Sequence[int]], processor: LLM2CLIPProcessor) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in ids)
    input_ids = torch.full((len(ids), longest), processor.tokenizer.pad_token_id)
    attention_mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for line, row in enumerate(ids):
        input_ids[line, : len(row)] = torch.tensor(row)
        attention_mask[line, : len(row)] = 1
    return input_ids, attention_mask
