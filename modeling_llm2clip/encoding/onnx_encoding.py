"""Texts and images into embeddings by ONNX Runtime: the facade of `encode.py` over its sessions.

N texts or images, P `projection_dim`. Tokens and pixels come from the model's own processor, so the
embeddings are those of the model up to rounding. `load_onnx_encoder` of `model_folders` opens one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..heads_llm2clip import LogitRule
from ..packing_llm2clip import CPU_TOKEN_BUDGET
from ..processing_llm2clip import LLM2CLIPProcessor
from .batches import (
    OnBatch,
    encode_distinct,
    encode_distinct_images,
    encode_distinct_texts,
    iterate_batches,
    pad_ids,
    split_evenly,
)
from .encode import default_batch_size
from .tokenized_texts import TokenizedText, TokenizedTexts

# Names of the graphs' inputs and outputs: those of the model's own forward.
TEXT_INPUTS = ("input_ids", "attention_mask")
NUM_UNPOOLED = "num_unpooled"
TEXT_OUTPUT = "text_embeds"
IMAGE_INPUT = "pixel_values"
IMAGE_OUTPUT = "image_embeds"
_SHOWN = 200  # characters of an error of ONNX Runtime
DEFAULT_TOKEN_BUDGET = CPU_TOKEN_BUDGET
_DEVICE = torch.device("cpu")
DEFAULT_BATCH_SIZE = default_batch_size(_DEVICE)


class OnnxEncoder:
    """An exported model, whose graphs project and normalize.

    Args:
        processor: The processor that was exported with the graphs.
        text_session: `onnxruntime.InferenceSession` of the text tower; None where there is none.
        vision_session: The same of the vision tower.
        logit_rule: Turns cosines into logits; None where there is one tower alone.

    Attributes:
        modalities: What can be encoded: `"text"`, `"image"` or both.
        embedding_dim: P, the width of an embedding.
    """

    def __init__(
        self,
        processor: LLM2CLIPProcessor,
        *,
        text_session: Any = None,
        vision_session: Any = None,
        logit_rule: LogitRule | None = None,
    ) -> None:
        self.processor = processor
        self.logit_rule = logit_rule
        self._text_session = text_session
        self._vision_session = vision_session
        sessions = {"text": text_session, "image": vision_session}
        there = {name: session for name, session in sessions.items() if session is not None}
        self.modalities = tuple(there)
        self.embedding_dim = int(next(iter(there.values())).get_outputs()[0].shape[1])

    def encode_texts(
        self,
        texts: Iterable[str],
        *,
        token_budget: int | None = None,
        show_progress: bool = False,
        on_batch: OnBatch | None = None,
    ) -> Tensor:
        """Encode texts, the longest first, each distinct one once.

        Args:
            texts: Any number of non-blank texts, at least one.
            token_budget: Maximum tokens per batch, padding included. Default: 2,048.
            show_progress: Show a progress bar, which counts tokens.
            on_batch: Called after each batch, with unit embeddings.

        Returns:
            (N, P) float32 of unit length on the CPU, in the order of the texts.

        Raises:
            ValueError: `texts` is one string or not a list, a text is blank or not a string, the
                budget is below one, the graph gives NaN or infinity, or there is no text tower.
        """
        self._require("text")
        return self.encode_tokenized_texts(
            TokenizedTexts(self.processor, texts),
            token_budget=token_budget,
            show_progress=show_progress,
            on_batch=on_batch,
        )

    def encode_tokenized_texts(
        self,
        texts: Sequence[TokenizedText],
        *,
        token_budget: int | None = None,
        show_progress: bool = False,
        on_batch: OnBatch | None = None,
    ) -> Tensor:
        """Encode texts that are tokenized already, otherwise as `encode_texts`.

        Args:
            texts: At least one.
            token_budget: Maximum tokens per batch, padding included. Default: 2,048.
            show_progress: Show a progress bar, which counts tokens.
            on_batch: Called after each batch, with unit embeddings.

        Returns:
            (N, P) float32 of unit length on the CPU, in the order of the texts.

        Raises:
            ValueError: The budget is below one, or the graph gives NaN or infinity.
        """
        return encode_distinct_texts(
            self.processor,
            texts,
            encode=lambda inputs: self.encode_tokens(*inputs),
            device=_DEVICE,
            token_budget=DEFAULT_TOKEN_BUDGET if token_budget is None else token_budget,
            show_progress=show_progress,
            on_batch=on_batch,
        )

    def encode_images(
        self,
        images: Sequence[Any],
        *,
        batch_size: int | None = None,
        num_workers: int | None = None,
        show_progress: bool = False,
        on_batch: OnBatch | None = None,
    ) -> Tensor:
        """Encode images, each distinct one once; threads decode them.

        Args:
            images: Paths, URLs, images packed in tar shards or Parquet files, PIL images, or
                arrays as the processor takes them; at least one.
            batch_size: Images per batch. Default: 8.
            num_workers: Threads that decode images. Default: one per core, at most 8.
            show_progress: Show a progress bar.
            on_batch: Called after each batch, with unit embeddings.

        Returns:
            (N, P) float32 of unit length on the CPU, in the order of the images.

        Raises:
            ValueError: `images` is not a list or is empty, an image is missing or broken, a number
                is below one, the graph gives NaN or infinity, or there is no vision tower.
        """
        self._require("image")
        return encode_distinct_images(
            self.processor,
            images,
            encode=lambda inputs: self.encode_pixels(inputs[IMAGE_INPUT]),
            device=_DEVICE,
            batch_size=DEFAULT_BATCH_SIZE if batch_size is None else batch_size,
            num_workers=num_workers,
            show_progress=show_progress,
            on_batch=on_batch,
        )

    def encode_prepared_images(self, images: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Encode images that the processor has prepared one by one.

        Args:
            images: N results of the processor for one image each; at least one.

        Returns:
            (N, P) float32 of unit length on the CPU.

        Raises:
            ValueError: The graph gives NaN or infinity, or there is no vision tower.
        """
        self._require("image")
        return encode_distinct(
            images,
            batches=lambda rows: split_evenly(len(rows), size=DEFAULT_BATCH_SIZE),
            prepare=lambda part: torch.cat([inputs[IMAGE_INPUT] for inputs in part]),
            encode=self.encode_pixels,
            device=_DEVICE,
        )

    def iterate_token_batches(
        self, texts: Sequence[TokenizedText], plan: Sequence[Sequence[int]]
    ) -> Iterator[Tensor]:
        """Encode batches of texts that are tokenized already.

        Args:
            texts: Tokenized texts.
            plan: Rows of the texts of each batch.

        Yields:
            (B, P) float32 of unit length, for each batch.

        Raises:
            ValueError: The graph gives NaN or infinity.
        """
        for _, embeds in iterate_batches(
            texts,
            plan,
            prepare=partial(pad_ids, self.processor),
            encode=lambda inputs: self.encode_tokens(*inputs),
            device=_DEVICE,
        ):
            yield embeds

    def encode_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Run the text graph on one batch.

        Args:
            input_ids: (B, L) int64 from the processor, padded on the right.
            attention_mask: (B, L) int64, 1 at real tokens.

        Returns:
            (B, P) float32 of unit length.

        Raises:
            ValueError: The graph cannot be run on inputs of this shape.
        """
        given = dict(zip(TEXT_INPUTS, (input_ids.numpy(), attention_mask.numpy()), strict=True))
        return _run(self._text_session, TEXT_OUTPUT, given)

    def encode_pixels(self, pixel_values: Tensor) -> Tensor:
        """Run the vision graph on one batch.

        Args:
            pixel_values: (B, 3, H, W) float32 from the processor.

        Returns:
            (B, P) float32 of unit length.

        Raises:
            ValueError: The graph cannot be run on images of this size.
        """
        given = {IMAGE_INPUT: pixel_values.numpy()}
        return _run(self._vision_session, IMAGE_OUTPUT, given)

    def _require(self, modality: str) -> None:
        if modality not in self.modalities:
            raise ValueError(
                f"This ONNX model encodes {self.modalities[0]}s alone; it has no graph for "
                f"{modality}s. Export the whole model: llm2clip export --onnx --components full."
            )


def _run(session: Any, output: str, inputs: dict[str, Any]) -> Tensor:
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    try:
        return torch.from_numpy(session.run([output], inputs)[0])
    except (errors.Fail, errors.InvalidArgument, errors.RuntimeException) as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        reason = " ".join(str(error).split())[:_SHOWN]
        raise ValueError(f"ONNX Runtime cannot run the graph on {shapes}: {reason}") from error
