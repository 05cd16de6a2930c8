"""Encode an index's images and queries; a query is a sentence, an image or a combination.

Each tower is loaded when first needed, so a sentence is encoded without loading the vision tower.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from .._extras import ONNX_RUNTIME, require
from ..configs.config_fields import Precision
from ..model_folders.onnx_folder import choose_graph

if TYPE_CHECKING:
    from ..encoding.encode import TorchEncoder

Part: TypeAlias = str | Path | Image.Image
Query: TypeAlias = Part | Sequence[Part]


@dataclass(frozen=True)
class NamedQuery:
    """A query: its name in results, the parts whose embeddings are averaged, and its image file."""

    name: str
    parts: tuple[Part, ...]
    image: Path | None


def name_queries(queries: Sequence[Query], *, noun: str = "Query") -> list[NamedQuery]:
    """Validate and name queries; a nested list is one query of several parts."""
    if not queries:
        raise ValueError("There is nothing to search for. Pass a sentence or an image.")
    return [_name_query(query, number, noun) for number, query in enumerate(queries, start=1)]


def _name_query(query: Query, number: int, noun: str) -> NamedQuery:
    parts = tuple(query) if isinstance(query, list | tuple) else (query,)
    if not parts or not all(isinstance(part, str | Path | Image.Image) for part in parts):
        raise ValueError(
            f"{noun} number {number} is {[type(part).__name__ for part in parts] or 'empty'}. Pass "
            "a sentence, a Path, a PIL image, or a list of these."
        )
    if not all(part.strip() for part in parts if isinstance(part, str)):
        raise ValueError(f"{noun} number {number} has a blank sentence. Pass text.")
    names = [
        getattr(part, "filename", "") or f"image {number}"
        if isinstance(part, Image.Image)
        else str(part)
        for part in parts
    ]
    return NamedQuery(
        " + ".join(names), parts, next((part for part in parts if isinstance(part, Path)), None)
    )


class IndexEncoder:
    """Encodes images and queries with the towers of the index's model, each loaded on first use.

    Without a precision, the towers run in the stored dtype: checking a faster dtype would take
    longer than it saves on a few queries.

    Attributes:
        jpeg_decoding: JPEG decoding mode, `full` or `scaled`; changing it after the model is loaded
            has no effect.
        num_truncated: Number of sentences truncated so far because they exceeded the model's token
            limit.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "auto",
        precision: Precision | None = None,
        jpeg_decoding: str = "full",
    ) -> None:
        self._folder = folder
        self._device = device
        self._precision = precision
        self.jpeg_decoding = jpeg_decoding
        self._lock = threading.Lock()
        self.num_truncated = 0

    def encode(self, queries: Sequence[NamedQuery]) -> np.ndarray[Any, Any]:
        """Encode queries as unit-length embeddings, (Q, P) float32; average each query's parts."""
        parts = [part for query in queries for part in query.parts]
        texts = [part for part in parts if isinstance(part, str)]
        images = [part for part in parts if not isinstance(part, str)]
        with self._lock:  # for `num_truncated`
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
        """Encode sentences as unit-length embeddings, (N, P) float32."""
        with self._lock:
            embeds: np.ndarray[Any, Any] = self._encode_texts(texts)
        return embeds

    @property
    def max_text_length(self) -> int:
        """Maximum number of tokens in a sentence; longer sentences are truncated."""
        return int(self.model.processor.longest_text)

    @cached_property
    def model(self) -> TorchEncoder:
        from ..encoding.batches import find_min_jpeg_side
        from ..encoding.devices import find_device
        from ..encoding.encode import TorchEncoder
        from ..model_folders.guarded_loading import load_in_precision
        from ..processing_llm2clip import LLM2CLIPProcessor

        folder, precision = self._folder, self._precision
        device = find_device(self._device, precision=precision or "auto")
        load = None
        if precision is not None:
            load = partial(load_in_precision, folder=folder, device=device, precision=precision)
        processor = LLM2CLIPProcessor.from_pretrained(folder, local_files_only=True)
        encoder = TorchEncoder(folder, processor, device=device, load=load)
        encoder.min_jpeg_side = find_min_jpeg_side(processor.image_processor, self.jpeg_decoding)
        return encoder

    def describe_encoding(self) -> dict[str, str]:
        """Describe how images are encoded; empty for a CPU, the stored dtype and full decoding."""
        from ..encoding.batches import describe_decoding
        from ..encoding.precision import DeviceTraits, choose_tower_dtype
        from ..model_folders.guarded_loading import find_stored_dtype

        described = describe_decoding(self.model.min_jpeg_side)
        traits, stored = DeviceTraits.read(self.model.device), find_stored_dtype(self._folder)
        chosen = choose_tower_dtype(self._precision or "auto", traits, stored)
        if traits.kind == "cpu" and chosen == (stored, False):
            return described  # without loading the vision tower
        return {**self.model.describe_precision("image", stored), **described}

    def _encode_texts(self, texts: Sequence[str]) -> Any:
        from ..encoding.tokenized_texts import TokenizedTexts

        tokens = TokenizedTexts(self.model.processor, texts)
        self.num_truncated += tokens.num_truncated
        return self.model.encode_texts(tokens).numpy()

    def _encode_images(self, images: Sequence[Path | Image.Image]) -> Any:
        return self.model.encode_images(images).numpy()


class OnnxQueryEncoder(IndexEncoder):
    """Encodes sentences with ONNX Runtime, avoiding the seconds that importing torch takes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "cpu")
        require(ONNX_RUNTIME)

    @property
    def max_text_length(self) -> int:
        return int(self._tokenizer.truncation["max_length"])

    @cached_property
    def _tokenizer(self) -> Any:
        from ..encoding.encode_onnx import open_tokenizer

        return open_tokenizer(self._folder)

    def _encode_texts(self, texts: Sequence[str]) -> Any:
        from ..encoding.encode_onnx import encode_rows, tokenize

        rows = tokenize(self._tokenizer, list(texts))
        self.num_truncated += sum(bool(row.overflowing) for row in rows)
        return encode_rows(rows, choose_graph(self._folder, "text", None).stem, self._folder)

    def _encode_images(self, images: Sequence[Path | Image.Image]) -> Any:
        raise ValueError(
            f"{self._folder}: a search with ONNX graphs takes only sentences, but {len(images)} of "
            "the queries are images. Omit --model to search with the model of the index."
        )


def subtract_negatives(queries: Any, negatives: Any) -> np.ndarray[Any, Any]:
    """Move query embeddings, (Q, P), away from the mean of the negative embeddings, (N, P).

    Returns q - n / 2, rescaled to unit length, where q is a query and n the mean of the negatives,
    both of unit length. The weight of one half removes most images of n without losing q: a full
    weight also moves away from what q and n have in common.
    """
    width = queries.shape[1]
    mean = check_embeddings(np.mean(negatives, axis=0, keepdims=True), width=width)
    return check_embeddings(check_embeddings(queries, width=width) - mean / 2, width=width)


def check_embeddings(embeddings: Any, *, width: int) -> np.ndarray[Any, Any]:
    """Validate query embeddings and normalize them to unit length."""
    embeds = np.asarray(embeddings, dtype=np.float32)
    if embeds.ndim != 2 or embeds.shape[1] != width or not len(embeds):
        raise ValueError(
            f"Query embeddings have shape {embeds.shape}. Pass (queries, {width}), at least one."
        )
    lengths = np.linalg.norm(embeds, axis=1)
    broken = [int(row) for row in np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))]
    if broken:
        raise ValueError(f"The query embeddings in rows {broken} are zero, NaN or infinite.")
    return (embeds / lengths[:, None]).astype(np.float32)  # type: ignore[no-any-return]
