"""Tests from the outside whether every token of a text tower sees every other one."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

_LENGTH = 6
# A causal position does not move at all. A bidirectional one moves by far more than rounding.
_LEAST_MOVE = 1e-4
# Padded and unpadded runs differ by the order of sums only.
_MOST_PADDING_EFFECT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 2e-2}


@torch.no_grad()
def find_attention_faults(text_model: PreTrainedModel) -> list[str]:
    """Change the last token and watch the first position, with and without padding.

    Returns: what is wrong, in words; empty for a tower that is bidirectional on every path.
    """
    ids = torch.arange(1, _LENGTH + 1, device=text_model.device).unsqueeze(0)
    ids = ids % text_model.config.vocab_size
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 7) % text_model.config.vocab_size
    faults = []
    plain = _run(text_model, ids, num_pads=0)
    for num_pads, name in ((0, "without padding"), (3, "with padding")):
        before = _run(text_model, ids, num_pads=num_pads)
        after = _run(text_model, changed, num_pads=num_pads)
        moved = _relative(before[0, 0], after[0, 0])
        if not moved > _LEAST_MOVE:
            faults.append(f"{name}, the first token does not see the last (moved by {moved:.1e})")
        effect = _relative(plain[0], before[0])
        if not effect <= _MOST_PADDING_EFFECT.get(before.dtype, 1e-3):
            faults.append(f"{name}, the hidden states differ by {effect:.1e} from those without")
    return faults


def require_bidirectional(text_model: PreTrainedModel) -> None:
    """Raise ValueError with the reason when a tower is not bidirectional on every path."""
    faults = find_attention_faults(text_model)
    if faults:
        raise ValueError(
            f"The {text_model.config.model_type!r} family cannot be made bidirectional here: "
            f"{'; '.join(faults)}. Take another LLM, another attention implementation, or build "
            "with bidirectional=False."
        )


def _run(text_model: PreTrainedModel, ids: Tensor, *, num_pads: int) -> Tensor:
    mask = torch.ones_like(ids)
    if num_pads:
        ids = torch.nn.functional.pad(ids, (0, num_pads))
        mask = torch.nn.functional.pad(mask, (0, num_pads))
    hidden = text_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[:, :_LENGTH]  # type: ignore[no-any-return]


def _relative(before: Tensor, after: Tensor) -> float:
    difference = (before.float() - after.float()).norm()
    return float(difference / before.float().norm().clamp(min=1e-12))
