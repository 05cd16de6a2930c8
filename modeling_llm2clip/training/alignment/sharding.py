"""What FSDP rounds in bfloat16: products inside the model, and neither scores nor temperature.

Without this accelerate has FSDP gather the temperature in bfloat16, which at 50 moves in steps of
0.25, cast everything that leaves the model to it, and add up gradients in it. Under DDP autocast
does none of that.
"""

from __future__ import annotations

from typing import Any

import torch

from ...modeling_llm2clip import LLM2CLIPModel


def keep_scores_in_float32(accelerator: Any, model: LLM2CLIPModel) -> None:
    """Set FSDP2's policy where accelerate is to compute in bfloat16; elsewhere do nothing.

    Call it before anything is prepared.

    Raises: ValueError for FSDP's first version, which cannot be told so.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or accelerator.mixed_precision != "bf16":
        return
    if plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP's first version would round the temperature to bfloat16. Set fsdp_version: 2 in "
            "the configuration, as examples/accelerate/fsdp.yaml does, or give --precision float32."
        )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    fully_shard(model.logit_scale, mp_policy=MixedPrecisionPolicy())  # a unit of its own, as it is
