"""Records of made-up captions, without images."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from modeling_llm2clip.data.records.records import CaptionedImage

WORDS = "a red green old small dog cat apple house tree on under the wooden table sea".split()


def make_records(count: int, *, fewest: int = 5, most_long: int = 2) -> list[CaptionedImage]:
    """Images of captions in three numbers, the last of which all share, and of long ones.

    Args:
        count: how many.
        fewest: captions of the first image; the next ones have one more and two more.
        most_long: of the long captions of an image.
    """
    generator = random.Random(0)

    def draw(most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, most)))

    return [
        CaptionedImage(
            image=None,
            name=f"{number}.png",
            group_id=str(number // 2),
            captions=(*(draw(9) for _ in range(fewest - 1 + number % 3)), "a photo"),
            long_captions=tuple(draw(40) for _ in range(number % (most_long + 1))),
        )
        for number in range(count)
    ]


def write_captions(folder: Path, records: Iterable[CaptionedImage]) -> Path:
    """Write records as a user has them; returns the folder."""
    lines = [
        json.dumps({"image": r.name, "captions": r.captions, "long_captions": r.long_captions})
        for r in records
    ]
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder
