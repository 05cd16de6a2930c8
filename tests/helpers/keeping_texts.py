"""Alignments that keep texts, in this process or, as a script, in each of several."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from aligning import SHORT_RUN, Run
from inheriting import Inheriting

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.training.alignment.align import align


def keep(keeping: Inheriting, output: Path, *, resume: bool = False, **changed: Any) -> Run:
    """Align for a few steps, by default keeping the names in a file next to the data."""
    names = str(keeping.data.parent / "names.txt")
    teacher = changed.pop("teacher", keeping.clip if changed.get("keep_texts", names) else None)
    model = changed.pop("model", keeping.model)
    config = AlignConfig(**{**SHORT_RUN, "keep_texts": names, **changed})
    align(
        model, keeping.records, output, config,
        caption_store=keeping.captions,
        image_store=keeping.images if config.vision_training == "frozen" else None,
        teacher=teacher, resume=resume,
    )  # fmt: skip
    return Run(output)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    parts = {"data": "data", "model": "model", "captions": "captions", "images": "images"}
    prepared = Inheriting(
        **{name: folder / part for name, part in parts.items()},
        clip=folder / "clip", teacher=folder / "teacher",
    )  # fmt: skip
    keep(prepared, Path(sys.argv[2]), **json.loads(sys.argv[3]))
