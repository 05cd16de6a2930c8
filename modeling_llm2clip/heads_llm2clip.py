"""Everything but the towers: text adapter, temperature and contrastive loss.

Uploaded with the weights. Shapes: B images or texts, D width of a tower.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

MAX_LOG_SCALE = math.log(100)  # arXiv:2103.00020, section 2.5


class LogitRule(NamedTuple):
    """Turns embeddings of unit length into logits.

    Attributes:
        scale: Inverse temperature, (1,) float32; or () of a rule that is on no device.
    """

    scale: Tensor

    def __call__(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Compare every image with every text, (images, texts) float32."""
        # An enclosing autocast would round cosines times a hundred to eight bits.
        with torch.autocast(image_embeds.device.type, enabled=False):
            return (self.scale * image_embeds.float()) @ text_embeds.float().T

    def to(self, device: torch.device) -> LogitRule:
        """Move it to a device."""
        return LogitRule(*(part.to(device) for part in self))

    def from_cosines(self, cosines: Tensor) -> Tensor:
        """Turn cosines that are known already into logits."""
        return self.scale * cosines


class LogitHead(nn.Module):
    """The learned inverse temperature, stored as its logarithm and clamped to [0, ln 100].

    It has shape (1,) because FSDP2 rejects parameters without dimensions. It is a module because a
    float32 parameter directly on the model would change the saved dtype. `half()` and similar calls
    leave it in float32: one step of float16 at ln 100 changes every logit by 0.5%.

    Args:
        initial_value: Logarithm of the initial inverse temperature.
    """

    def __init__(self, initial_value: float) -> None:
        super().__init__()
        self.initial_value = initial_value
        self.log_scale = nn.Parameter(torch.full((1,), initial_value, dtype=torch.float32))

    def forward(self) -> Tensor:
        """Return the inverse temperature, (1,) float32."""
        return self.rule().scale

    def rule(self) -> LogitRule:
        """Return the rule of the current weights, through which gradients reach them."""
        return LogitRule(self.log_scale.float().clamp(0.0, MAX_LOG_SCALE).exp())

    def plain_rule(self) -> LogitRule:
        """Return the rule without gradients, for embeddings on any device."""
        return LogitRule(*(part.detach().cpu().squeeze() for part in self.rule()))

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the stored logarithm within its bounds, in place."""
        self.log_scale.clamp_(0.0, MAX_LOG_SCALE)

    def reset(self) -> None:
        """Set the initial value, unless the weights were loaded."""
        init.constant_(self.log_scale, self.initial_value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogitHead:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        applied: LogitHead = super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return applied


class AdapterBlock(nn.Module):
    """`x + Linear(GELU(Linear(LayerNorm(x))))` (upstream `eva_clip/model.py`, LinearBlock).

    Args:
        width: D.
        expansion: Width of the inner layer, as a multiple of D.
    """

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the block, (B, D) to (B, D)."""
        return hidden + self.down(F.gelu(self.up(self.norm(hidden))))  # type: ignore[no-any-return]


class TextAdapter(nn.Module):
    """Residual blocks and a final LayerNorm over a caption embedding.

    Args:
        width: D.
        num_layers: Number of blocks.
        expansion: Width of their inner layers, as a multiple of D.
        normalize: Scale caption embeddings to unit length first.
    """

    def __init__(self, width: int, *, num_layers: int, expansion: int, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        self.blocks = nn.ModuleList(AdapterBlock(width, expansion) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, caption_embeds: Tensor) -> Tensor:
        """Apply the adapter to (B, D) of any float dtype; the result has the weights' dtype."""
        if self.normalize:
            caption_embeds = F.normalize(caption_embeds.float(), dim=-1)
        # The norm is never quantized, so its dtype is the one to compute in.
        hidden = caption_embeds.to(self.norm.weight.dtype)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)  # type: ignore[no-any-return]


def contrastive_loss(logits_per_image: Tensor) -> Tensor:
    """Compute the symmetric cross-entropy of all pairs, ln(B) if none stands out.

    The logits are (B, B); image i matches text i (arXiv:2103.00020, figure 3).
    """
    num_images, num_texts = logits_per_image.shape
    if num_images != num_texts:
        raise ValueError(
            f"The loss pairs image i with text i, but got {num_images} images and {num_texts} "
            "texts. Give as many images as texts, or leave return_loss out."
        )
    labels = torch.arange(num_images, device=logits_per_image.device)
    per_image = F.cross_entropy(logits_per_image, labels)
    return (per_image + F.cross_entropy(logits_per_image.T, labels)) / 2


def check_width(embeds: Tensor, width: int, *, name: str) -> None:
    """Check the input of a projection, expected to be (B, `width`) floating point."""
    if embeds.ndim != 2 or embeds.shape[1] != width or not embeds.is_floating_point():
        raise ValueError(
            f"{name} must be floating point of shape (B, {width}); got {embeds.dtype} "
            f"{tuple(embeds.shape)}. Token ids go into get_text_features, pixels into "
            "get_image_features; embeddings of another tower do not fit this model."
        )
