"""Made-up captions and short runs of `embed` on them, for the tests of `embed`."""

from __future__ import annotations

import random
from pathlib import Path

from modeling_llm2clip.configs.embed_config import EmbedConfig
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.search.bulk_embedding import embed

WORDS = "a red green old small dog cat apple house tree on under the wooden table sea".split()
TEXT = EmbedConfig(
    columns=("text", "name"),
    rows_per_shard=16,
    token_budget=256,
    device="cpu",
    show_progress=False,
)
IMAGE = EmbedConfig(rows_per_shard=4, batch_size=3, device="cpu", show_progress=False)


def make_records(count: int) -> list[CaptionedImage]:
    """Records with several captions, one of which all share."""
    generator = random.Random(0)

    def draw(most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, most)))

    return [
        CaptionedImage(
            image=None,
            name=f"{number}.png",
            group_id=str(number),
            captions=(*(draw(9) for _ in range(2 + number % 3)), "a photo"),
            long_captions=tuple(draw(40) for _ in range(number % 2)),
        )
        for number in range(count)
    ]


def embed_texts(
    model: Path, records: list[CaptionedImage], folder: Path, config: EmbedConfig = TEXT
) -> Path:
    return embed(model, records, folder, config, modality="text")
