"""Step 2 of a multimodal LLM: train projector and LLM to answer questions about images.

    python examples/scripts/llava/tune_instructions.py step1/model instructions.json images step2

Takes the model of `pretrain_projector.py`, and LLaVA's instruction data as published (see
`llava_conversations.py`). Only the answers are learned. The tower stays as it is; the LLM is
trained wholly (LLaVA-1.5, arXiv:2310.03744: 665,000 conversations, one epoch, batch 128, rate
2e-5), or by a LoRA: `--lora-rank 128 --learning-rate 2e-4`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from llava_commands import parse, train_and_report
from llava_conversations import read_conversations
from llava_model import load_llava, require_possible_lora, train_projector_and_llm
from llava_trainer import LlavaConfig
from transformers import LlavaProcessor

from modeling_llm2clip.training.trainer_mixins import is_sharded


def main() -> int:
    """Train on the conversations and write the model."""
    parsed, config = _parse()
    require_possible_lora(parsed.lora_rank, parsed.lora_alpha)
    if parsed.lora_rank is not None and is_sharded():
        # Its merging needs whole matrices, which no process has there.
        raise SystemExit(
            "Training a LoRA under FSDP is not supported. Use the configuration for DDP."
        )
    conversations, skipped = read_conversations(
        parsed.data, parsed.images, check_images=parsed.check_images,
        skip_invalid=parsed.skip_invalid,
    )  # fmt: skip
    if parsed.skip_text_only:
        kept = [c for c in conversations if c.image is not None]
        skipped["without an image"] = len(conversations) - len(kept)
        conversations = kept
    if skipped:
        print(f"Skipped, by what was wrong: {skipped}.")

    def load_model() -> tuple[Any, LlavaProcessor]:
        model, processor = load_llava(parsed.model)
        adapted = train_projector_and_llm(model, rank=parsed.lora_rank, alpha=parsed.lora_alpha)
        return adapted, processor

    return train_and_report(
        load_model, conversations, parsed.output, config,
        wording="chat",
        record={
            "step": "instructions", "model": parsed.model, "data": parsed.data,
            "skipped": skipped, "lora_rank": parsed.lora_rank, "lora_alpha": parsed.lora_alpha,
        },
        skip_invalid=parsed.skip_invalid,
        resume=parsed.resume,
        wrote=": LlavaForConditionalGeneration, AutoProcessor.",
    )  # fmt: skip


def _parse() -> tuple[argparse.Namespace, LlavaConfig]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", help="folder that step 1 wrote, or a LLaVA on the Hub")
    parser.add_argument("data", type=Path, help="LLaVA's instruction data, JSON")
    parser.add_argument("images", type=Path, help="folder that its images are relative to")
    parser.add_argument("--lora-rank", type=int, help="train a LoRA on the LLM, not all of it")
    parser.add_argument("--lora-alpha", type=int, default=256)
    parser.add_argument(
        "--skip-invalid", action="store_true",
        help="leave out invalid conversations and report how many, instead of stopping",
    )  # fmt: skip
    parser.add_argument(
        "--skip-text-only", action="store_true",
        help="leave out conversations without an image, as FSDP needs it, and report how many",
    )  # fmt: skip
    return parse(parser, global_batch_size=128, learning_rate=2e-5)


if __name__ == "__main__":
    sys.exit(main())
