"""Embeds texts and images with ONNX Runtime. `load_onnx_encoder` of `model_folders` opens a folder.

B is the batch size, P `projection_dim`. Tokens and pixels come from the model's own processor, so
the embeddings match the torch model up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..heads_llm2clip import LogitRule
from ..packing_llm2clip import CPU_TOKEN_BUDGET
from ..processing_llm2clip import LLM2CLIPProcessor
from .encode import raise_malloc_thresholds
from .encoder_interface import Encoder

# Names of the graphs' inputs and outputs, the same as in the model's own forward, but for the name
# of a text-only graph's output in TEI and sentence-transformers.
TEXT_INPUTS = ("input_ids", "attention_mask")
NUM_UNPOOLED = "num_unpooled"
TEXT_OUTPUT = "text_embeds"
TEXT_ONLY_OUTPUT = "sentence_embedding"
IMAGE_INPUT = "pixel_values"
IMAGE_OUTPUT = "image_embeds"
_SHOWN = 200  # characters of an ONNX Runtime error


class OnnxEncoder(Encoder):
    """An exported model, whose graphs return projected, normalized embeddings.

    Args:
        processor: The processor that was exported with the graphs.
        sessions: `onnxruntime.InferenceSession` for each tower, by `"text"` and `"image"`.
        logit_rule: Rule that turns cosines into logits; None if there is none.
    """

    projects_at_once = True
    _lacks = (
        "This ONNX model encodes only {there}s; it has no graph for {wanted}s. Export the whole "
        "model: llm2clip export --onnx --components full."
    )
    device = torch.device("cpu")
    token_budget = CPU_TOKEN_BUDGET
    batch_size = 8
    logit_rule: LogitRule | None = None

    def __init__(
        self,
        processor: LLM2CLIPProcessor,
        sessions: Mapping[str, Any],
        logit_rule: LogitRule | None = None,
    ) -> None:
        self.processor = processor
        self.logit_rule = logit_rule
        self._sessions = sessions
        self.modalities = tuple(sessions)
        self.embedding_dim = int(next(iter(sessions.values())).get_outputs()[0].shape[1])

    def encode_tokens(
        self, input_ids: Tensor, attention_mask: Tensor, *, num_unpooled: int | None = None
    ) -> Tensor:
        """Run the text graph on one padded batch of ids and mask, (B, L) int64; returns (B, P)."""
        inputs = dict(zip(TEXT_INPUTS, (input_ids.numpy(), attention_mask.numpy()), strict=True))
        if num_unpooled is not None:
            inputs[NUM_UNPOOLED] = torch.tensor(num_unpooled).numpy()
        return _run(self._sessions["text"], inputs)

    def encode_pixels(self, pixel_values: Tensor, **_: Tensor) -> Tensor:
        """Run the vision graph on one batch, (B, 3, H, W) float32; returns (B, P)."""
        raise_malloc_thresholds()
        return _run(self._sessions["image"], {IMAGE_INPUT: pixel_values.numpy()})


def _run(session: Any, inputs: dict[str, Any]) -> Tensor:
    """Run a graph and return its only output."""
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    try:
        return torch.from_numpy(session.run(None, inputs)[0])
    except (errors.Fail, errors.InvalidArgument, errors.RuntimeException) as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        reason = " ".join(str(error).split())[:_SHOWN]
        raise ValueError(f"ONNX Runtime cannot run the graph on {shapes}: {reason}") from error
