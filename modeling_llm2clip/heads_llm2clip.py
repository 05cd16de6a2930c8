"""The parts between towers and embeddings: the text adapter and the temperature.

Uploaded with the weights. Shapes: B texts, D width of the LLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_LOG_SCALE = math.log(100)  # arXiv:2103.00020, section 2.5


class LogitScale(nn.Module):
    """The learned inverse temperature, kept as its logarithm between 0 and ln 100.

    A module of its own and of shape (1,): FSDP2 refuses parameters without dimensions, and a
    float32 parameter directly on the model would change the dtype that is saved. `half()` and its
    like leave it float32 too: a step of float16 at ln 100 is half a per cent of every logit.
    """

    def __init__(self, initial_value: float) -> None:
        super().__init__()
        self.initial_value = initial_value
        self.log_scale = nn.Parameter(torch.full((1,), initial_value, dtype=torch.float32))

    def forward(self) -> Tensor:
        """Return the inverse temperature, (1,) float32."""
        return self.log_scale.float().clamp(0.0, MAX_LOG_SCALE).exp()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogitScale:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        applied: LogitScale = super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return applied


class AdapterBlock(nn.Module):
    """`x + Linear(GELU(Linear(LayerNorm(x))))` (upstream `eva_clip/model.py`, LinearBlock)."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, D) to (B, D)."""
        return hidden + self.down(F.gelu(self.up(self.norm(hidden))))  # type: ignore[no-any-return]


class TextAdapter(nn.Module):
    """Residual blocks and a final LayerNorm over a caption's embedding."""

    def __init__(self, width: int, *, num_layers: int, expansion: int, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        self.blocks = nn.ModuleList(AdapterBlock(width, expansion) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, caption_embeds: Tensor) -> Tensor:
        """Map (B, D) of any float dtype to (B, D) of the weights' dtype."""
        if self.normalize:
            caption_embeds = F.normalize(caption_embeds.float(), dim=-1)
        # The norm is never quantised, so its dtype is the dtype of the computation.
        hidden = caption_embeds.to(self.norm.weight.dtype)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)  # type: ignore[no-any-return]
