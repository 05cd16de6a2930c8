"""In which precision a training computes; its weights stay in float32."""

from __future__ import annotations

import torch


def computes_in_bfloat16(precision: str, *, on_gpu: bool) -> bool:
    """Whether the products of a run are in bfloat16.

    Args:
        precision: "float32", "bfloat16", or "auto", which takes bfloat16 on a GPU that computes
            in it, and never on a processor: without its instructions bfloat16 is several times
            slower there, with them no faster, and its gradients are noisier everywhere.
        on_gpu: whether the run is on a GPU.
    """
    if precision != "auto":
        return precision == "bfloat16"
    return on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
