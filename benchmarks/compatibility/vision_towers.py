"""Builds, trains, saves, loads and checks a tiny random model with a vision tower of every family.

    python -m benchmarks.compatibility.vision_towers && python -m benchmarks.tables.render_tables

The table in `docs/build.md` shows the results. A family that fails is recorded with its error.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

import modeling_llm2clip as llm2clip
from benchmarks.shared.provenance import describe_run, write_result

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
from tiny import DUAL_ENCODERS, VISION_POOLINGS, tiny_dual_encoder, tiny_images, tiny_vision
from tiny_encoders import TEXTS, save_tiny_images
from tiny_folders import save_tiny_llm

RESULT = Path(__file__).parents[1] / "results" / "vision_towers.json"
FAMILIES = {
    "CLIP": "clip", "SigLIP": "siglip", "SigLIP 2 NaFlex": "siglip2", "MetaCLIP 2": "metaclip_2",
    "TIPSv2": "tipsv2", "AIMv2": "aimv2", "Chinese-CLIP": "chinese_clip", "AltCLIP": "altclip",
    "DINOv2": "dinov2", "DINOv3": "dinov3_vit", "ViT": "vit", "I-JEPA": "ijepa", "RADIO": "radio",
    "ViT (timm)": "timm", "EVA02 (timm)": "eva02", "SigLIP (timm)": "timm-siglip",
    "PE-Core (timm)": "pe-core", "RADIO (timm)": "timm-radio", "NaFlexViT (timm)": "naflexvit",
}  # fmt: skip
# What libraries raise where a family does not fit.
_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, OSError)


def main() -> None:
    """Try every family, and write what was found."""
    rows = []
    for name, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"name": name, **try_family(family, Path(folder))})
    packages = ("torch", "transformers", "timm", "sentence-transformers")
    write_result(RESULT, {**describe_run(*packages), "rows": rows})


def try_family(family: str, folder: Path) -> dict[str, Any]:
    """Take a family through build, one step of training, loading and the checks.

    Args:
        family: Its name in `tests/helpers/tiny.py`.
        folder: An empty folder to work in.
    """
    is_whole = family in DUAL_ENCODERS
    pooling: Any = VISION_POOLINGS.get(family, "pooler")
    row: dict[str, Any] = {"text_encoder": is_whole, "pooling": pooling}
    source, image_processor = (tiny_dual_encoder if is_whole else tiny_vision)(family)
    source.save_pretrained(folder / "tower")
    image_processor.save_pretrained(folder / "tower")
    images = save_tiny_images(folder / "data", 8)
    lines = [
        json.dumps({"image": path.name, "captions": [text]})
        for path, text in zip(images, TEXTS, strict=True)
    ]
    (folder / "data" / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    records = llm2clip.load_records(folder / "data")
    config = llm2clip.BuildConfig(
        prompt="llama-3", vision_pooling=pooling, max_text_length=32, projection_dim=32
    )
    training = llm2clip.AlignConfig(
        vision_training="full", text_training="frozen-online", max_steps=1, global_batch_size=8,
        held_out_ratio=0.0, projection_init="model", warmup_steps=0, device="cpu",
    )  # fmt: skip
    try:
        llm = save_tiny_llm(folder / "llm")
        built = llm2clip.build_model(folder / "tower", llm, folder / "built", config)
        trained = llm2clip.align(built, records, folder / "trained", training)
        row["largest_difference"] = _compare_loaders(trained)
        row["failed_checks"] = [c.name for c in llm2clip.check_model(trained).failed]
    except _ERRORS as error:
        row["error"] = f"{type(error).__name__}: {error}"
    return row


def _compare_loaders(folder: Path) -> float:
    """Return how far embeddings by AutoModel and by sentence-transformers differ at most."""
    images: list[Image.Image] = tiny_images(3)
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    embeds = llm2clip.encode_images(model, processor, images).numpy()
    encoder = SentenceTransformer(str(folder), device="cpu")
    others = encoder.encode(images, normalize_embeddings=True)
    return float(np.abs(embeds - others).max())


if __name__ == "__main__":
    main()
