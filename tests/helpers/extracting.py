"""Short extractions of made-up captions, for the tests of `extract`."""

from __future__ import annotations

from pathlib import Path

from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.embedding.extract import extract

EXACT = ExtractConfig(
    store_dtype="float32",
    rows_per_shard=16,
    batch_size=2,
    device="cpu",
    show_progress=False,
)


def extract_captions(
    model: Path, records: list[CaptionedImage], folder: Path, config: ExtractConfig = EXACT
) -> Path:
    return extract(model, records, folder, config, modality="text")
