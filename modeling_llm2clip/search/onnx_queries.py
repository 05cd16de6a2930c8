"""Queries into embeddings by exported ONNX graphs, without torch, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .._extras import ONNX_RUNTIME, require
from ..image_loading_llm2clip import load_images
from ..model_folders.onnx_folder import choose_graph, read_onnx_record
from .query_encoding import QueryEncoder


class OnnxQueryEncoder(QueryEncoder):
    """Encodes queries with ONNX Runtime on the CPU.

    Args:
        folder: Folder of ONNX graphs.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ValueError: The folder's record is damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "cpu")
        require(ONNX_RUNTIME)
        self._record = read_onnx_record(folder)

    @property
    def max_text_length(self) -> int:
        """How many tokens of a sentence the model reads."""
        return int(self._tokenizer.truncation["max_length"])

    @cached_property
    def _tokenizer(self) -> Any:
        from ..encoding.encode_onnx import open_tokenizer

        return open_tokenizer(self._folder)

    def _encode_texts(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        from ..encoding.encode_onnx import encode_rows, tokenize

        rows = tokenize(self._tokenizer, list(texts))
        self.num_truncated += sum(bool(row.overflowing) for row in rows)
        graph = choose_graph(self._folder, "text", None)
        embeds: np.ndarray[Any, Any] = encode_rows(rows, graph.stem, self._folder)
        return embeds

    def _encode_images(self, images: Sequence[Path | Image.Image]) -> np.ndarray[Any, Any]:
        from ..data.images.image_sources import register_heif_reader
        from ..encoding.encode_onnx import encode_images

        register_heif_reader()
        if "image" not in self._record["source"] or self._record["script"] is not None:
            reason = self._record["script"] or "there is no graph for images"
            raise ValueError(
                f"{self._folder} cannot encode images without torch: {reason}. Leave --model out, "
                "to search with the model of the index."
            )
        embeds: np.ndarray[Any, Any] = encode_images(load_images(list(images)), self._folder)
        return embeds
