"""Folders of images, tiny models and indexes of them, and databases of made embeddings."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from shared_models import shared_model
from tiny import draw_noise, tiny_model

from modeling_llm2clip.configs.encoding_config import IndexConfig
from modeling_llm2clip.search.image_index import ImageIndex
from modeling_llm2clip.search.index_about import About, AnnIndex
from modeling_llm2clip.search.index_database import IndexDatabase

ANN = AnnIndex(
    num_rows=20, num_partitions=9, nprobes=2, refine_factor=5, recall_at_10=1, num_queries=1,
    query_ms=1, exact_query_ms=2, build_s=1, is_used=True,
)  # fmt: skip


def save_model(folder: Path, **settings: Any) -> Path:
    """Save the shared tiny model, or one of these settings."""
    model, processor = tiny_model(**settings) if settings else shared_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_images(folder: Path, *, count: int = 6) -> Path:
    """Images of noise, every second one in a folder below, beside a text."""
    (folder / "below").mkdir(parents=True)
    for number in range(count):
        name = f"{number}.png" if number % 2 else f"below/{number}.JPG"
        draw_noise(40 + number, 56, seed=number).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def build(model: Path, images: Path, path: Path, **options: Any) -> tuple[ImageIndex, str]:
    """Build an index; return it and what was reported."""
    lines: list[str] = []
    config = IndexConfig(show_progress=False, device="cpu", **options)
    index = ImageIndex.build(model, images, path, config, report=lines.append)
    return index, "\n".join(lines)


def make_embeddings(count: int, *, width: int = 16, seed: int = 0) -> np.ndarray[Any, Any]:
    """Embeddings of images, of unit length: around one direction, and in 40 topics."""
    return _make(count, width, seed=seed, side=1.5, content=1.0)


def make_text_embeddings(count: int, *, width: int = 16, seed: int = 0) -> np.ndarray[Any, Any]:
    """Embeddings of texts about the same topics, on the other side of the space."""
    return _make(count, width, seed=seed + 1000, side=-1.5, content=0.4)


def _make(
    count: int, width: int, *, seed: int, side: float, content: float
) -> np.ndarray[Any, Any]:
    topics = np.random.default_rng(7).standard_normal((40, width))
    random = np.random.default_rng(seed)
    noise = 0.3 * random.standard_normal((count, width))
    rows = side + content * topics[random.integers(40, size=count)] + noise
    unit: np.ndarray[Any, Any] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit.astype(np.float32)


def make_database(path: Path, embeddings: np.ndarray[Any, Any]) -> IndexDatabase:
    """A database of made embeddings, whose paths are the numbers of the rows."""
    about = About(model="made", fingerprint={}, model_files="", image_dir=str(path.parent),
                  width=embeddings.shape[1])  # fmt: skip
    database = IndexDatabase(path, lambda: about)
    add_rows(database, embeddings, first=0)
    return database


def add_rows(database: IndexDatabase, embeddings: np.ndarray[Any, Any], *, first: int) -> None:
    """Add made embeddings, whose paths are the numbers from `first` on."""
    names = [f"{first + row:06d}.png" for row in range(len(embeddings))]
    same = {"bytes": 9, "modified": datetime.now(timezone.utc), "height": 9, "taken": None}
    rows: dict[str, list[Any]] = {name: [value] * len(names) for name, value in same.items()}
    widths = [first + row for row in range(len(embeddings))]
    database.write(
        {"path": names, "sha256": names, "stat": names, "width": widths, **rows}, embeddings
    )
