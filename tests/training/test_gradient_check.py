"""What a backward pass reaches does not depend on luck."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

from modeling_llm2clip.training.trainer_mixins import find_without_gradient


@pytest.mark.parametrize("family", ["opt", "biogpt", "xglm"])
def test_a_layer_that_is_dropped_at_random_is_trained(family: str) -> None:
    """Its parameters get no gradient in a pass that leaves it out, here nearly every one."""
    sizes = {
        "vocab_size": 20, "hidden_size": 16, "d_model": 16, "num_hidden_layers": 2,
        "num_layers": 2, "num_attention_heads": 2, "attention_heads": 2, "intermediate_size": 32,
        "ffn_dim": 32, "word_embed_proj_dim": 16, "layerdrop": 0.999,
    }  # fmt: skip
    model = AutoModel.from_config(AutoConfig.for_model(family, **sizes))
    frozen = model.get_input_embeddings().requires_grad_(False)
    ids = torch.tensor([[3, 4, 5]])
    missing = find_without_gradient(model, lambda: model(input_ids=ids).last_hidden_state.sum())
    assert missing == []
    assert {m.layerdrop for m in model.modules() if hasattr(m, "layerdrop")} == {0.999}
    assert frozen.weight.grad is None
