"""Encodes many captions: duplicates once, by length, in batches of a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..batching_llm2clip import plan_token_batches
from ..modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from ..processing_llm2clip import LLM2CLIPProcessor, check_texts

# The model itself cuts a batch into smaller pieces on a processor.
TOKEN_BUDGETS = {"cpu": 4096}
DEFAULT_TOKEN_BUDGET = 16384


@dataclass(frozen=True)
class EncodedCaptions:
    """Vectors of captions, and what was done to get them.

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


@torch.inference_mode()
def encode_captions(
    model: LLM2CLIPModel | LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    captions: Sequence[str],
    *,
    token_budget: int | None = None,
    show_progress: bool = False,
) -> EncodedCaptions:
    """Compute the caption vectors that `project_caption_embeds` takes.

    Args:
        captions: any number of non-blank texts.
        token_budget: most tokens in a batch, padding included; default by device.
    Raises: ValueError naming every blank or non-text caption.
    """
    check_texts(list(captions))
    distinct = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    ids, num_truncated = _tokenize(processor, list(distinct))
    lengths = [len(row) for row in ids]
    budget = token_budget or TOKEN_BUDGETS.get(model.device.type, DEFAULT_TOKEN_BUDGET)
    batches = plan_token_batches(lengths, token_budget=budget)
    vectors = torch.empty(len(distinct), model.config.text_config.hidden_size)
    num_tokens = 0
    progress = tqdm(total=len(distinct), unit=" captions", disable=not show_progress)
    for rows in batches:
        input_ids, attention_mask = _pad([ids[row] for row in rows], processor)
        num_tokens += input_ids.numel()
        embeds = model.get_caption_embeds(
            input_ids.to(model.device), attention_mask.to(model.device)
        )
        vectors[rows] = embeds.cpu()
        progress.update(len(rows))
    progress.close()
    index = torch.tensor([distinct[caption] for caption in captions])
    return EncodedCaptions(
        caption_embeds=vectors[index],
        num_distinct=len(distinct),
        num_truncated=num_truncated,
        num_tokens=num_tokens,
        num_padding=num_tokens - sum(lengths),
    )


def _tokenize(processor: LLM2CLIPProcessor, captions: list[str]) -> tuple[list[list[int]], int]:
    encoded = processor.tokenizer(
        captions, truncation=True, max_length=processor.max_text_length, padding=False
    )
    num_truncated = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    return encoded["input_ids"], num_truncated


def _pad(ids: list[list[int]], processor: LLM2CLIPProcessor) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in ids)
    input_ids = torch.full((len(ids), longest), processor.tokenizer.pad_token_id)
    attention_mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for line, row in enumerate(ids):
        input_ids[line, : len(row)] = torch.tensor(row)
        attention_mask[line, : len(row)] = 1
    return input_ids, attention_mask
