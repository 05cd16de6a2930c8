"""Step 1 of a multimodal LLM: teach a projector to say an image's patches in the LLM's words.

    python examples/scripts/llava/pretrain_projector.py TOWER LLM captioned-images step1
    python examples/scripts/llava/tune_instructions.py step1/model instructions.json images step2

TOWER is the aligned vision tower as a plain folder
(`modeling_llm2clip.publishing.export_model`), or any other to compare with. Tower and LLM
stay as they are; the projector of transformers' LLaVA classes learns to caption (LLaVA-1.5,
arXiv:2310.03744: 558,000 captions, one epoch, batch 256, rate 1e-3).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from llava_commands import parse, train_and_report
from llava_conversations import conversations_of_captions
from llava_model import build_llava, train_projector_only
from llava_trainer import LlavaConfig
from transformers import LlavaProcessor

from modeling_llm2clip.data.records.record_loading import load_records


def main() -> int:
    """Train the projector and write the joined model."""
    parsed, config = _parse()
    records = load_records(
        parsed.data,
        image_dir=parsed.image_dir,
        check_images=parsed.check_images,
        show_progress=True,
    )
    conversations = conversations_of_captions(records, lang=parsed.lang)
    template = parsed.chat_template and parsed.chat_template.read_text(encoding="utf-8")

    def load_model() -> tuple[Any, LlavaProcessor]:
        model, processor = build_llava(
            parsed.tower, parsed.llm, layer=parsed.layer, chat_template=template
        )
        train_projector_only(model)
        return model, processor

    return train_and_report(
        load_model, conversations, parsed.output, config,
        wording="plain",
        record={
            "step": "projector", "tower": parsed.tower, "llm": parsed.llm, "data": parsed.data,
            "layer": parsed.layer, "lang": parsed.lang, "chat_template": template,
        },
        resume=parsed.resume,
        wrote=". Next: tune_instructions.py.",
    )  # fmt: skip


def _parse() -> tuple[argparse.Namespace, LlavaConfig]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("tower", help="folder or Hub id of a vision tower")
    parser.add_argument("llm", help="folder or Hub id of a causal LLM with its head")
    parser.add_argument("data", help="captioned images, in any form that llm2clip reads")
    parser.add_argument("--image-dir", type=Path, help="the images' folder, if not beside the data")
    parser.add_argument("--lang", default="en", help="of the captions that are learned")
    parser.add_argument("--layer", type=int, default=-2, help="of the tower's hidden states")
    parser.add_argument("--chat-template", type=Path, help="file, for an LLM without one; step 2's")
    return parse(parser)


if __name__ == "__main__":
    sys.exit(main())
