"""Made-up captions and short extractions of them, for the tests of `extract`."""

from __future__ import annotations

import random
from pathlib import Path

from modeling_llm2clip.configs.extract_config import ExtractConfig
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.training.extraction.extract import extract

WORDS = (
    "a red green old small dog cat apple house tree on under beside the wooden table sea".split()
)
EXACT = ExtractConfig(
    store_dtype="float32",
    max_shard_size="2KiB",
    token_budget=256,
    device="cpu",
    show_progress=False,
)


def make_records(count: int) -> list[CaptionedImage]:
    """Images with 5, 6 or 7 captions, up to two long ones, and captions that return."""
    generator = random.Random(0)

    def draw(most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, most)))

    return [
        CaptionedImage(
            image=None,
            name=f"{number}.png",
            group_id=str(number // 2),
            captions=(*(draw(9) for _ in range(4 + number % 3)), "a photo"),
            long_captions=tuple(draw(40) for _ in range(number % 3)),
        )
        for number in range(count)
    ]


def extract_captions(
    model: Path, records: list[CaptionedImage], folder: Path, config: ExtractConfig = EXACT
) -> Path:
    return extract(model, records, folder, config, modality="text")
