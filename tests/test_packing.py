"""Packs and token batches lose no text and change no embedding."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llm, tiny_model
from torch import nn

from modeling_llm2clip.attention_llm2clip import (
    PackedTexts,
    _attend_in_graph,
    attend_packed,
)
from modeling_llm2clip.base_llm2clip import set_attention_direction
from modeling_llm2clip.packing_llm2clip import (
    MAX_PADDING_SHARE,
    PASS_COST_TOKENS,
    _checked,
    can_pack,
    plan_packs,
    plan_token_batches,
    run_packed,
)
from modeling_llm2clip.pooling_llm2clip import TEXT_POOLINGS

TEXTS = ["a dog", "two small cats on a mat", "a", "the end of it", "one more dog"]
CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_every_text_is_in_one_pack_and_no_pack_of_several_exceeds_the_budget(lengths, budget):
    packs = plan_packs(lengths, token_budget=budget)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) == 1 or sum(lengths[index] for index in pack) <= budget


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_packed_embeddings_equal_those_of_one_padded_batch_and_of_each_text(family, bidirectional):
    model, processor = tiny_model(llm=family, **({} if bidirectional else {"bidirectional": False}))
    inputs = processor(text=TEXTS)
    padded = model.get_caption_embeds(**inputs).detach()  # with gradients: one padded batch
    with torch.inference_mode():
        packed = model.get_caption_embeds(**inputs)
        alone = torch.cat([model.get_caption_embeds(**processor(text=[text])) for text in TEXTS])
    assert _checked[model.text_model] == {False: True}  # by blocks
    # The same float32 products, summed in another order.
    torch.testing.assert_close(packed, padded, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(packed, alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("pooling", TEXT_POOLINGS)
def test_each_pooling_is_the_same_packed_and_padded(pooling):
    model, processor = tiny_model()
    model.config.text_pooling = pooling
    inputs = processor(text=TEXTS)
    padded = model.get_caption_embeds(**inputs).detach()
    with torch.inference_mode():
        packed = model.get_caption_embeds(**inputs)
    torch.testing.assert_close(packed, padded, atol=2e-6, rtol=1e-5)  # order of sums in float32


def test_texts_longer_than_a_chunk_of_attention_are_not_packed():
    model, processor = tiny_model(llm="llama4_text", bidirectional=False)
    inputs = processor(text=TEXTS)
    chunk = model.config.text_config.attention_chunk_size
    assert inputs["attention_mask"].sum(dim=1).max() > chunk
    padded = model.get_caption_embeds(**inputs).detach()  # with gradients: one padded batch
    with torch.inference_mode():
        found = model.get_caption_embeds(**inputs)
        # Order of sums in float32.
        torch.testing.assert_close(found, padded, atol=2e-6, rtol=1e-5)
        short, long = torch.arange(20, 20 + chunk), torch.arange(20, 21 + chunk)
        assert can_pack(model.text_model, CPU)
        run_packed(model.text_model, [short, short])
        with pytest.raises(ValueError, match=f"chunk of {chunk} tokens needs more"):
            run_packed(model.text_model, [short, long])


def test_a_direction_that_is_set_later_applies_to_packed_and_padded_passes():
    model, processor = tiny_model(bidirectional=True)
    inputs = processor(text=TEXTS)
    bidirectional = model.get_caption_embeds(**inputs).detach()
    set_attention_direction(model.text_model, bidirectional=False)
    padded = model.get_caption_embeds(**inputs).detach()
    with torch.inference_mode():
        packed = model.get_caption_embeds(**inputs)
    torch.testing.assert_close(packed, padded, atol=2e-6, rtol=1e-5)  # order of sums in float32
    assert (packed - bidirectional).abs().max() > 0.01


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_plain_pass_is_correct_while_another_thread_packs(bidirectional):
    model, processor = tiny_model(bidirectional=bidirectional)
    inputs = dict(processor(text=TEXTS))
    real = inputs["attention_mask"].bool()
    with torch.inference_mode():
        wanted = model.text_model(**inputs).last_hidden_state[real]
        packed = model.get_caption_embeds(**inputs)  # the check of packs, too
    found = []

    def run_plain_beside(*_):
        if threading.current_thread() is threading.main_thread() and not found:
            with ThreadPoolExecutor(1) as pool:  # begins and ends within the pack
                found.append(pool.submit(run_plain).result())

    def run_plain():
        with torch.no_grad():
            return model.text_model(**inputs).last_hidden_state[real]

    layer = model.text_model.layers[1]
    handle = layer.register_forward_pre_hook(run_plain_beside)
    with torch.inference_mode():
        again = model.get_caption_embeds(**inputs)
    handle.remove()
    assert torch.equal(again, packed)
    assert torch.equal(found[0], wanted)


def test_the_check_of_packs_switches_no_mode_and_no_dropout_misleads_it():
    text_model = tiny_llm("llama").train()
    for module in text_model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    text_model.layers[0].mlp.up_proj = nn.Sequential(text_model.layers[0].mlp.up_proj, nn.Dropout())
    text_model.layers[1].eval()
    modes = [module.training for module in text_model.modules()]
    seen = []
    for module in text_model.modules():
        module.register_forward_hook(lambda one, *_: seen.append(one.training))
    assert can_pack(text_model, CPU)
    assert set(seen) == {True, False}
    assert modes == [module.training for module in text_model.modules()]


def test_the_check_leaves_no_inference_tensors_behind():
    # FSDP gathers a layer's weights in its first pass and reuses their storage for gradients.
    text_model, kept = tiny_llm("llama"), []
    text_model.layers[0].register_forward_hook(lambda _, __, out: kept.append(out))
    assert can_pack(text_model, CPU)
    assert kept and not any(out.is_inference() or out.requires_grad for out in kept)


RUN_PICKLED = """
import pickle, sys, torch
text_model, ids = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps(text_model(ids).last_hidden_state.detach().numpy()))
"""


def test_a_pass_leaves_the_llm_as_it_was_and_pickled_it_runs_in_another_process():
    model, processor = tiny_model()
    text_model = model.text_model
    with torch.no_grad():
        model.get_caption_embeds(**processor(text=TEXTS))
    assert _checked[text_model] == {False: True}
    assert text_model.config._attn_implementation == "sdpa"
    for broken, error in (([torch.tensor([10**6])], IndexError), ([torch.zeros(3)], RuntimeError)):
        with pytest.raises(error):
            run_packed(text_model, broken)
        assert text_model.config._attn_implementation == "sdpa"
    ids = torch.arange(4, 9)[None]
    done = subprocess.run(
        [sys.executable, "-c", RUN_PICKLED],
        input=pickle.dumps((text_model, ids)), capture_output=True, check=True,
    )  # fmt: skip
    found = torch.from_numpy(pickle.loads(done.stdout))
    assert torch.equal(found, text_model(ids).last_hidden_state.detach())


def test_layers_that_a_backward_pass_runs_again_find_the_attention_of_the_pack():
    text_model = tiny_llm("llama").train()
    text_model.gradient_checkpointing_enable({"use_reentrant": False})
    texts = [torch.arange(4, 9), torch.arange(4, 7)]
    run_packed(text_model, texts).square().sum().backward()
    found = text_model.layers[0].self_attn.q_proj.weight.grad.clone()
    text_model.zero_grad()
    for text in texts:
        text_model(text[None]).last_hidden_state.square().sum().backward()
    torch.testing.assert_close(text_model.layers[0].self_attn.q_proj.weight.grad, found)


def test_a_pass_without_packs_equals_sdpa_bit_for_bit():
    text_model = tiny_llm("mistral")
    ids = torch.arange(24).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    wanted = text_model(ids, attention_mask=mask).last_hidden_state
    assert can_pack(text_model, CPU)
    assert torch.equal(text_model(ids, attention_mask=mask).last_hidden_state, wanted)


@pytest.mark.parametrize(
    "extra",
    [{"softcap": 30.0}, {"sliding_window": 2}, {"s_aux": torch.ones(1)}, {"mask": True}],
    ids=["softcap", "window", "sink", "mask"],
)
def test_attention_that_needs_more_than_dot_products_is_rejected(extra):
    heads = torch.ones(1, 2, 4, 8)
    mask = torch.ones(1, 1, 4, 4) if extra.pop("mask", None) else None
    packs = PackedTexts(torch.tensor([0, 4]), is_causal=False)
    with pytest.raises(ValueError, match="more than packed attention computes"):
        attend_packed(nn.Identity(), heads, heads, heads, mask, packed_texts=packs, **extra)


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_operator_is_registered_correctly(is_causal):
    query, keys = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    cu_seqlens = torch.tensor([0, 4, 8, 9])
    torch.library.opcheck(
        _attend_in_graph, (query, keys, keys, cu_seqlens, is_causal, None, 0.0, None)
    )


# Token batches, for LLMs that cannot run packs

LENGTHS = st.lists(st.integers(1, 400), max_size=60)
BUDGETS = st.integers(1, 2000)


@given(LENGTHS, BUDGETS)
@settings(deadline=None)
def test_token_batches_hold_every_text_once_within_budget_and_padding(
    lengths: list[int], token_budget: int
) -> None:
    batches = plan_token_batches(lengths, token_budget=token_budget)
    order = [index for batch in batches for index in batch]
    assert all(batches) and sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    sizes = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
    for batch, padded_size in zip(batches, sizes, strict=True):
        assert padded_size <= token_budget or len(batch) == 1
        padding = padded_size - sum(lengths[index] for index in batch)
        assert padding <= max(MAX_PADDING_SHARE * padded_size, PASS_COST_TOKENS)
    assert sum(sizes) - sum(lengths) <= MAX_PADDING_SHARE * sum(sizes)


def test_token_batches_by_hand() -> None:
    # 100 texts of 10 tokens, at most 250 tokens per batch: 25 texts fit, so there are 4 batches.
    batches = plan_token_batches([10] * 100, token_budget=250)
    assert [len(batch) for batch in batches] == [25, 25, 25, 25]
    assert plan_token_batches([], token_budget=100) == []
    assert plan_token_batches([5, 500, 5], token_budget=100) == [[1], [0, 2]]
