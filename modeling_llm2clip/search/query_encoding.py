"""Queries into embeddings: sentences, images, or several of them combined.

Each tower is loaded when the first query needs it: a sentence is encoded without the vision tower.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

Part: TypeAlias = str | Path | Image.Image
Query: TypeAlias = Part | Sequence[Part]


@dataclass(frozen=True)
class NamedQuery:
    """What one search looks for.

    Attributes:
        name: As a result calls it.
        parts: Sentences and images, whose embeddings are averaged.
        image: File of the first query image, where there is one.
    """

    name: str
    parts: tuple[Part, ...]
    image: Path | None


def name_queries(queries: Sequence[Query]) -> list[NamedQuery]:
    """Check queries and name them.

    Args:
        queries: Sentences, paths and PIL images; a list among them is one query of several parts.

    Raises:
        ValueError: There are no queries, or one is something else.
    """
    if not queries:
        raise ValueError("There is nothing to search for. Give a sentence or an image.")
    return [_name_query(query, number) for number, query in enumerate(queries, start=1)]


def _name_query(query: Query, number: int) -> NamedQuery:
    parts = tuple(query) if isinstance(query, list | tuple) else (query,)
    if not parts or not all(isinstance(part, str | Path | Image.Image) for part in parts):
        kinds = [type(part).__name__ for part in parts]
        raise ValueError(
            f"Query number {number} is {kinds or 'empty'}; give a sentence, a Path, a PIL image, "
            "or a list of these."
        )
    names = [
        getattr(part, "filename", "") or f"image {number}"
        if isinstance(part, Image.Image)
        else str(part)
        for part in parts
    ]
    images = [part for part in parts if isinstance(part, Path)]
    return NamedQuery(" + ".join(names), parts, images[0] if images else None)


class QueryEncoder:
    """Encodes queries with a model's towers, each loaded on first use.

    Args:
        folder: Folder of a whole model.
        device: Where it runs; see `find_device`.

    Attributes:
        num_truncated: Sentences so far that were longer than the model reads.
    """

    def __init__(self, folder: Path, device: str = "auto") -> None:
        self._folder = folder
        self._device = device
        self._lock = threading.Lock()
        self.num_truncated = 0

    def encode(self, queries: Sequence[NamedQuery]) -> np.ndarray[Any, Any]:
        """Encode queries; the embedding of several parts is their mean, of unit length again.

        Args:
            queries: From `name_queries`.

        Returns:
            (Q, P) float32 of unit length.

        Raises:
            ValueError: A sentence is blank, or an image is missing or broken.
        """
        parts = [part for query in queries for part in query.parts]
        texts = [part for part in parts if isinstance(part, str)]
        images = [part for part in parts if not isinstance(part, str)]
        with self._lock:  # so that a tower is loaded once
            of_texts = iter(self._encode_texts(texts) if texts else ())
            of_images = iter(self._encode_images(images) if images else ())
        rows = [
            np.mean(
                [next(of_texts) if isinstance(part, str) else next(of_images) for part in q.parts],
                axis=0,
            )
            for q in queries
        ]
        return check_embeddings(np.stack(rows), width=len(rows[0]))

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        """Encode texts.

        Args:
            texts: Sentences.

        Returns:
            (texts, P) float32 of unit length.
        """
        with self._lock:
            return self._encode_texts(texts)

    @property
    def max_text_length(self) -> int:
        """How many tokens of a sentence the model reads."""
        return int(self.processor.longest_text)

    @cached_property
    def processor(self) -> Any:
        """The model's processor."""
        from ..processing_llm2clip import LLM2CLIPProcessor

        return LLM2CLIPProcessor.from_pretrained(self._folder, local_files_only=True)

    @cached_property
    def text_model(self) -> Any:
        """The LLM with its adapter and projection."""
        from ..modeling_llm2clip import LLM2CLIPTextModel

        return self._load(LLM2CLIPTextModel)

    @cached_property
    def vision_model(self) -> Any:
        """The vision tower with its projection."""
        from ..modeling_llm2clip import LLM2CLIPVisionModel

        return self._load(LLM2CLIPVisionModel)

    def _load(self, kind: Any) -> Any:
        from ..encoding.devices import find_device

        model = kind.from_pretrained(self._folder, local_files_only=True, dtype="auto")
        return model.to(find_device(self._device)).eval()

    def _encode_texts(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        from ..encoding.encode import encode_tokenized_texts
        from ..encoding.tokenized_texts import TokenizedTexts

        tokens = TokenizedTexts(self.processor, texts)
        self.num_truncated += tokens.num_truncated
        embeds: np.ndarray[Any, Any] = encode_tokenized_texts(
            self.text_model, self.processor, tokens
        ).numpy()
        return embeds

    def _encode_images(self, images: Sequence[Path | Image.Image]) -> np.ndarray[Any, Any]:
        from ..encoding.encode import encode_images

        embeds: np.ndarray[Any, Any] = encode_images(
            self.vision_model, self.processor, images
        ).numpy()
        return embeds


def check_embeddings(embeddings: Any, *, width: int) -> np.ndarray[Any, Any]:
    """Check embeddings that were computed elsewhere, and bring them to unit length.

    Args:
        embeddings: (Q, P), an array or a tensor.
        width: P.

    Returns:
        (Q, P) float32 of unit length.

    Raises:
        ValueError: The shape is another one, or a row is not finite or is zero.
    """
    found = np.asarray(embeddings, dtype=np.float32)
    if found.ndim != 2 or found.shape[1] != width or not len(found):
        raise ValueError(
            f"Query embeddings have shape {found.shape}; give (queries, {width}), at least one."
        )
    lengths = np.linalg.norm(found, axis=1)
    broken = [int(row) for row in np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))]
    if broken:
        raise ValueError(f"Query embeddings {broken} are zero, NaN or infinite.")
    return normalize_rows(found)


def normalize_rows(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Bring rows to unit length.

    Args:
        rows: (N, P), none of them zero.
    """
    normalized: np.ndarray[Any, Any] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return normalized.astype(np.float32)
