"""Texts without padding, as a GPU runs them; a reference takes the place of its kernel."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import LLM_FAMILIES, tiny_llm, tiny_model
from tiny_embedders import EMBEDDERS, tiny_network
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoConfig, AutoModel

from modeling_llm2clip.attention_llm2clip import (
    PackedTexts,
    VarlenKernel,
    attend_packed,
    choose_kernel,
    find_varlen_kernel,
    order_backends,
    takes_dtype,
)
from modeling_llm2clip.base_llm2clip import set_attention_direction
from modeling_llm2clip.encoding.layer_compilation import compile_layers
from modeling_llm2clip.packing_llm2clip import _checked, can_pack, run_unpadded

TEXTS = ["a dog", "two small cats on a mat", "a", "the end of it", "one more dog"]
CPU = torch.device("cpu")


def attend_by_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    num_splits: int | None = None,
) -> Tensor:
    """Compute what torch's `varlen_attn` is documented to compute; it has no CPU implementation."""
    assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32 and num_splits == 1
    assert max_q == max_k == cu_seq_q.diff().max()
    assert window_size in ((-1, -1), (-1, 0))
    attended = []
    for start, stop in pairwise(cu_seq_q.tolist()):
        q, k, v = (part[start:stop].transpose(0, 1)[None] for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(
            q, k, v, scale=scale, is_causal=window_size == (-1, 0), enable_gqa=enable_gqa
        )
        attended.append(mixed[0].transpose(0, 1))
    return torch.cat(attended)


KERNEL = VarlenKernel(attend_by_segments, 256, (torch.float32, torch.bfloat16))


# An operator, as torch's own is one, so that no compiler looks into it.
_attend_in_graph = torch.library.custom_op(
    "tests_varlen::attend",
    lambda query, key, value, cu_seqlens, longest, scale, is_causal, enable_gqa: attend_by_segments(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale,
        window_size=(-1, 0) if is_causal else (-1, -1), enable_gqa=enable_gqa, num_splits=1,
    ),
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, SymInt longest, "
    "float? scale, bool is_causal, bool enable_gqa) -> Tensor",
)  # fmt: skip
_attend_in_graph.register_fake(lambda query, *_: torch.empty_like(query))


def attend_in_graph(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, _: Tensor, max_q: int, __: int,
    *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool, num_splits: int,
) -> Tensor:  # fmt: skip
    """Call that operator."""
    assert num_splits == 1
    is_causal = window_size == (-1, 0)
    attended: Tensor = _attend_in_graph(
        query, key, value, cu_seq_q, max_q, scale, is_causal, enable_gqa
    )
    return attended


def embed_with_gradients(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    embeds = model.get_caption_embeds(**inputs)
    (embeds * torch.linspace(-1, 1, embeds.numel()).view_as(embeds)).sum().backward()
    weights = model.text_model.named_parameters()
    return embeds.detach(), {n: p.grad for n, p in weights if p.grad is not None}


# The windows of the tiny Gemma 3 would leave nothing to pack; Gemma 2 caps its scores.
@pytest.mark.parametrize("family", LLM_FAMILIES)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_unpadded_texts_have_the_embeddings_and_gradients_of_padded_ones(
    family: str, bidirectional: bool
) -> None:
    model, processor = tiny_model(llm=family, bidirectional=bidirectional)
    for module in [model.text_model, *model.text_model.modules()]:
        for holder in (module, getattr(module, "config", None)):
            if getattr(holder, "sliding_window", None):
                holder.sliding_window = 64
    inputs = dict(processor(text=TEXTS))
    wanted, wanted_gradients = embed_with_gradients(model, inputs)
    model.varlen_kernel = KERNEL
    found = [embed_with_gradients(model, inputs)]
    model.train().text_model.gradient_checkpointing_enable({"use_reentrant": False})
    found.append(embed_with_gradients(model, inputs))
    assert _checked.get(model.text_model) == (None if family == "gemma2" else {True: True})
    for embeds, gradients in found:
        # The same float32 products, summed in another order; gradients by their largest number.
        torch.testing.assert_close(embeds, wanted, atol=2e-6, rtol=1e-5)
        assert gradients.keys() == wanted_gradients.keys()
        for name, gradient in gradients.items():
            scale = wanted_gradients[name].abs().max()
            torch.testing.assert_close(
                gradient / scale, wanted_gradients[name] / scale, atol=2e-6, rtol=1e-5
            )


@pytest.mark.parametrize("name", EMBEDDERS)
def test_unpadded_texts_of_an_embedder_have_the_states_of_padded_ones(name: str) -> None:
    network = tiny_network(name)
    set_attention_direction(network, bidirectional=name not in ("Qwen3-Embedding", "SGPT"))
    require_states_of_texts_alone(network)


# Learned positions, of which OPT skips two by itself.
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_unpadded_texts_of_an_llm_with_learned_positions_have_those_of_each_text(
    family: str,
) -> None:
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
        "max_position_embeddings": 64, "ffn_dim": 48, "word_embed_proj_dim": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes)
    require_states_of_texts_alone(AutoModel.from_config(config).eval())


def require_states_of_texts_alone(network: Any) -> None:
    """Require the states of texts with padding on either side to be those of each text alone."""
    ids = torch.arange(4, 28).view(3, 8)  # within the windows
    mask = torch.ones_like(ids)
    mask[0, 6:] = mask[2, :4] = 0  # on either side
    alone = [
        network(row[real.bool()][None], use_cache=False).last_hidden_state[0]
        for row, real in zip(ids, mask, strict=True)
    ]
    assert can_pack(network, CPU, KERNEL)
    states = run_unpadded(network, ids, mask, CPU, KERNEL)
    assert not states[~mask.bool()].any()
    for text, real, wanted in zip(states, mask, alone, strict=True):
        torch.testing.assert_close(text[real.bool()], wanted, atol=2e-5, rtol=1e-5)  # about 1


def test_unpadded_texts_in_bfloat16_are_those_of_padded_ones_up_to_rounding() -> None:
    model, processor = tiny_model(dtype=torch.bfloat16)
    inputs = processor(text=TEXTS)
    padded = model.get_caption_embeds(**inputs).detach()  # with gradients: one padded batch
    model.varlen_kernel = KERNEL
    found = model.get_caption_embeds(**inputs).detach()
    assert _checked[model.text_model] == {True: True}
    assert F.cosine_similarity(found, padded).min() > 0.9995


def test_unpadded_features_keep_their_tokens_with_padding_on_the_left() -> None:
    model, processor = tiny_model()
    inputs = dict(processor(text=TEXTS))
    model.varlen_kernel = KERNEL
    right = model.get_text_features(**inputs)
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    width = inputs["input_ids"].shape[1]
    turned = {
        name: torch.stack([row.roll(width - n) for row, n in zip(value, lengths, strict=True)])
        for name, value in inputs.items()
    }
    left = model.get_text_features(**turned)
    # The mean over the tokens is summed in another order.
    torch.testing.assert_close(left.pooler_output, right.pooler_output, atol=2e-6, rtol=1e-5)
    for row, length in enumerate(lengths):
        states = right.last_hidden_state[row, :length]
        assert torch.equal(left.last_hidden_state[row, width - length :], states)


def test_the_kernel_depends_on_torch_the_device_and_the_dtype() -> None:
    assert find_varlen_kernel(CPU) is None
    assert choose_kernel(varlen_attn, (7, 5)) is None
    assert choose_kernel(lambda query: query, (9, 0)) is None  # as torch 2.10 lacks arguments
    sizes = {
        capability: kernel.max_head_dim
        for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0))
        if (kernel := choose_kernel(varlen_attn, capability))
    }
    assert sizes == {(8, 0): 256, (8, 6): 192, (9, 0): 256, (10, 0): 192, (12, 0): 192}
    kernel = VarlenKernel(varlen_attn, 256)
    text_model = tiny_llm("llama")
    assert not takes_dtype(kernel, text_model, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        assert takes_dtype(kernel, text_model, CPU)
    assert takes_dtype(kernel, text_model.half(), CPU)


def test_heads_that_the_kernel_does_not_support_run_padded() -> None:
    model, processor = tiny_model()
    inputs = processor(text=TEXTS)
    wanted = model.get_caption_embeds(**inputs)
    model.varlen_kernel = KERNEL._replace(max_head_dim=4)
    assert torch.equal(model.get_caption_embeds(**inputs), wanted)
    assert _checked[model.text_model] == {True: False}
    heads = torch.ones(1, 2, 4, 12)  # flash attention needs multiples of 8
    packs = PackedTexts(torch.tensor([0, 4]), is_causal=False, kernel=KERNEL)
    with pytest.raises(ValueError, match="head dimensions 12 and 12 needs more"):
        attend_packed(nn.Identity(), heads, heads, heads, None, packed_texts=packs)


def test_dropout_falls_back_to_sdpa() -> None:
    heads = torch.ones(1, 2, 4, 8)
    cu_seqlens = torch.tensor([0, 1, 4])
    packs = PackedTexts(cu_seqlens, False, KERNEL, cu_seqlens.int(), longest=3)
    torch.manual_seed(0)
    mixed, _ = attend_packed(nn.Identity(), heads, heads, heads, None, None, 0.5, packs)
    assert mixed.shape == (1, 4, 2, 8)
    assert {0.0, 2.0} <= set(mixed.unique().tolist())  # a token alone is dropped, or doubled


def test_a_program_that_chose_backends_and_recomputed_layers_keep_their_order() -> None:
    model = tiny_llm("llama").train()
    before = torch._C._get_sdp_priority_order()
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        with order_backends("cuda", model):
            assert torch._C._get_sdp_priority_order() == before
            assert not torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    with order_backends("cpu", model):
        assert torch._C._get_sdp_priority_order() == before
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with order_backends("cuda", model):
        assert torch._C._get_sdp_priority_order() == before
    with order_backends("cuda", model.eval()):
        assert torch._C._get_sdp_priority_order() != before
    assert torch._C._get_sdp_priority_order() == before


@pytest.mark.slow
def test_new_pack_lengths_do_not_recompile_layers() -> None:
    torch.compiler.reset()
    model, processor = tiny_model()
    model.varlen_kernel = KERNEL._replace(attend=attend_in_graph)
    inputs = [
        dict(processor(text=[" ".join(["dog"] * (length - row % 3)) for row in range(count)]))
        for count, length in ((4, 5), (3, 3), (5, 9), (1, 7), (7, 4), (2, 12), (6, 6))
    ]
    with torch.inference_mode():
        expected = [model.get_caption_embeds(**batch) for batch in inputs]
        compile_layers(model, backend="eager")
        before = counters["stats"]["unique_graphs"]
        for batch, embeds in zip(inputs, expected, strict=True):
            found = model.get_caption_embeds(**batch)
            torch.testing.assert_close(found, embeds, atol=2e-6, rtol=1e-5)
    assert 1 <= counters["stats"]["unique_graphs"] - before <= 2
    assert not counters["graph_break"]
