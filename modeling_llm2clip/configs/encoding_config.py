"""Options of encoding texts and images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from annotated_types import Interval

from .config_fields import DeviceConfig

Backend: TypeAlias = Literal["torch", "onnx"]
TextWeights: TypeAlias = Literal["float32", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class EncodingConfig(DeviceConfig):
    """Options of encoding; in float32 none of them changes an embedding."""

    batch_size: Annotated[int, Interval(ge=1)] | None = None
    """Texts or images per batch. Default: by device."""
    num_workers: Annotated[int, Interval(ge=1)] | None = None
    """Threads that decode images. Default: one per core, at most 8."""
    show_progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True, kw_only=True)
class BackendConfig(DeviceConfig):
    """The library that runs a model."""

    backend: Backend = "torch"
    """Runtime of the model: torch, or onnx for ONNX Runtime on the CPU; with onnx, MODEL is a
    folder that `llm2clip export --onnx` wrote."""
    text_weights: TextWeights | None = None
    """With `backend` onnx, weights of the language model's linear layers. Default: the most precise
    in the folder."""

    def find_conflicts(self) -> Iterator[str]:
        """Yield a sentence for each option that the backend has no use for."""
        yield from super().find_conflicts()
        if self.backend == "torch" and self.text_weights is not None:
            yield f"text_weights={self.text_weights} needs backend='onnx'."
        if self.backend == "onnx" and self.device not in ("auto", "cpu"):
            yield f"device={self.device}: backend='onnx' runs on the CPU. Leave the device out."
