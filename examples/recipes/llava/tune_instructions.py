"""Step 2 of a multimodal LLM: train projector and LLM to answer questions about images.

    python examples/recipes/llava/tune_instructions.py step1/model instructions.json images step2

Takes what `pretrain_projector.py` wrote, and LLaVA's instruction data as published (see
`llava_conversations.py`). Only the answers are learned. The tower stays as it is; the LLM is
trained wholly (LLaVA-1.5, arXiv:2310.03744: 665,000 conversations, one epoch, batch 128, rate
2e-5), or by a LoRA: `--lora-rank 128 --lr 2e-4`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from llava_commands import parse, train_and_tell
from llava_conversations import read_conversations
from llava_model import load_llava, require_possible_lora, train_projector_and_llm
from llava_trainer import LlavaArguments
from transformers import LlavaProcessor

from modeling_llm2clip.training.distributed import is_sharded


def main() -> int:
    """Train on the conversations and write the model."""
    parsed, arguments = _parse()
    require_possible_lora(parsed.lora_rank, parsed.lora_alpha)
    if parsed.lora_rank is not None and is_sharded():
        # Its merging needs whole matrices, which no process has there.
        raise SystemExit("A LoRA is not trained under FSDP. Use the configuration for DDP.")
    conversations, left_out = read_conversations(
        parsed.data, parsed.images, check_images=parsed.check_images,
        drop_invalid=parsed.drop_invalid,
    )  # fmt: skip
    if parsed.leave_out_imageless:
        kept = [c for c in conversations if c.image is not None]
        left_out["without an image"] = len(conversations) - len(kept)
        conversations = kept
    if left_out:
        print(f"Left out, by what was wrong: {left_out}.")

    def load_model() -> tuple[Any, LlavaProcessor]:
        model, processor = load_llava(parsed.model)
        adapted = train_projector_and_llm(model, rank=parsed.lora_rank, alpha=parsed.lora_alpha)
        return adapted, processor

    return train_and_tell(
        load_model, conversations, parsed.output, arguments,
        wording="chat",
        record={
            "step": "instructions", "model": parsed.model, "data": parsed.data,
            "left_out": left_out, "lora_rank": parsed.lora_rank, "lora_alpha": parsed.lora_alpha,
        },
        drop_invalid=parsed.drop_invalid,
        resume=parsed.resume,
        wrote=": LlavaForConditionalGeneration, AutoProcessor.",
    )  # fmt: skip


def _parse() -> tuple[argparse.Namespace, LlavaArguments]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", help="folder that step 1 wrote, or a LLaVA on the Hub")
    parser.add_argument("data", type=Path, help="LLaVA's instruction data, JSON")
    parser.add_argument("images", type=Path, help="folder that its images are relative to")
    parser.add_argument("--lora-rank", type=int, help="train a LoRA on the LLM, not all of it")
    parser.add_argument("--lora-alpha", type=int, default=256)
    parser.add_argument(
        "--leave-out-invalid", action="store_true",
        help="count invalid conversations and go on without them, instead of stopping",
    )  # fmt: skip
    parser.add_argument(
        "--leave-out-imageless", action="store_true",
        help="count conversations without an image and go on without them, as FSDP needs it",
    )  # fmt: skip
    return parse(parser, batch_size=128, lr=2e-5)


if __name__ == "__main__":
    sys.exit(main())
