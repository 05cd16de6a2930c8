"""Captions into a store of embeddings, taken before the text adapter.

The rows are the distinct captions, longest first, and by first occurrence among equally long ones:
so the captions of a shard are about equally long, and what does not fit the memory fails at once.
Which captions share a batch depends on the shard alone, so a store that was continued has the same
bytes as one that was never interrupted, on the same kind of machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...configs.extract_config import ExtractConfig
from ...data.data_hashes import hash_texts
from ...data.records import CaptionedImage
from ...encoding.encode import default_token_budget, encode_texts, measure_texts
from ...model_folders.fingerprint import fingerprint_text
from ...modeling_llm2clip import LLM2CLIPTextModel
from ...processing_llm2clip import LLM2CLIPProcessor, check_texts
from .extraction_plan import ExtractionPlan, make_manifest, pack_records


def plan_captions(
    folder: Path, records: Sequence[CaptionedImage], config: ExtractConfig, device: torch.device
) -> ExtractionPlan:
    """Plan the embeddings of all captions, each distinct one once; loads the LLM alone.

    Args:
        folder: Model folder.
        records: The dataset; short and long captions are stored.
        config: Options of the extraction.
        device: Where the LLM runs.

    Raises:
        ValueError: There are no captions, or some are blank; all of them are named.
    """
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    captions = [text for r in records for text in (*r.captions, *r.long_captions)]
    distinct = list(dict.fromkeys(captions))
    check_texts(distinct)
    lengths, is_truncated = measure_texts(processor, distinct, show_progress=config.show_progress)
    order = np.argsort(-lengths, kind="stable")
    rows = [distinct[i] for i in order.tolist()]
    num_tokens = lengths[order].tolist()
    row_of = {caption: row for row, caption in enumerate(rows)}
    index = pack_records(
        records,
        short=[[row_of[text] for text in r.captions] for r in records],
        long=[[row_of[text] for text in r.long_captions] for r in records],
    )
    model = LLM2CLIPTextModel.from_pretrained(folder)
    fingerprint = fingerprint_text(folder)
    model = model.to(device)
    budget = config.token_budget or default_token_budget(device)
    manifest = make_manifest(
        "caption_embeds",
        config,
        index,
        fingerprint=fingerprint,
        dim=model.config.text_width,
        num_rows=len(rows),
        num_items=len(records),
        plan={"data": hash_texts(records), "token_budget": str(budget)},
        counts={
            "captions": len(captions),
            "distinct": len(distinct),
            "truncated": int(is_truncated.sum()),
        },
    )

    def compute(chosen: range, on_batch: Callable[[int], object]) -> Tensor:
        sizes = num_tokens[chosen.start : chosen.stop]
        return encode_texts(
            model,
            processor,
            rows[chosen.start : chosen.stop],
            project=False,
            token_budget=budget,
            on_batch=lambda batch, _: on_batch(sum(sizes[row] for row in batch)),
        )

    return ExtractionPlan(manifest, index, compute, " tokens", num_tokens)
