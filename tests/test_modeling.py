"""Laws of the forward pass, on tiny random towers of every family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shared_models import (
    CAPTIONS,
    ROUNDING,
    every_llm,
    every_pair,
    every_vision,
    first_position_moves_by,
    images_of,
    shared_batch,
    shared_model,
    texts_of,
)
from tiny import tiny_llm, tiny_model, tiny_tokenizer, tiny_vision
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel
from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.configs.build_config import BuildConfig

LEARNED_POSITIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"initializer_range": 0.2},
    "opt": {"init_std": 0.2, "ffn_dim": 64, "word_embed_proj_dim": 32},
}


def move_padding_left(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rotate every row so that its real tokens move from the left to the right."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    turns = (ids.shape[1] - mask.sum(dim=1)).tolist()
    return {
        "input_ids": torch.stack([row.roll(turn) for row, turn in zip(ids, turns, strict=True)]),
        "attention_mask": torch.stack([r.roll(n) for r, n in zip(mask, turns, strict=True)]),
    }


# What comes out


@every_pair
def test_every_pair_of_towers_compares_images_with_texts(vision: str, llm: str) -> None:
    model, _ = shared_model(vision, llm)
    with torch.no_grad():
        output = model(**shared_batch(vision, llm))
    assert output.image_embeds.shape == output.text_embeds.shape == (3, 32)
    for embeds in (output.image_embeds, output.text_embeds):
        assert embeds.dtype == torch.float32
        assert torch.allclose(embeds.norm(dim=1), torch.ones(3), atol=ROUNDING)
    cosines = output.image_embeds @ output.text_embeds.T
    # Cosines times 1 / 0.07, so the rounding grows as much.
    assert torch.allclose(output.logits_per_image, cosines / 0.07, atol=ROUNDING / 0.07)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    # Different inputs must give different embeddings, or a constant would satisfy the other laws.
    assert (cosines[0] - cosines[1]).abs().max() > 1e-3
    assert (cosines[:, 0] - cosines[:, 1]).abs().max() > 1e-3


@every_llm
def test_a_caption_is_the_mean_of_its_own_tokens_and_the_suffix(llm: str) -> None:
    model, processor = shared_model("clip", llm)
    ids = processor(text="a dog")["input_ids"]
    with torch.no_grad():
        hidden = model.text_model(input_ids=ids, use_cache=False).last_hidden_state
        caption_embeds = model.get_caption_embeds(ids)
    start = len(model.config.prompt_prefix_ids)
    assert 0 < start < ids.shape[1] - 1
    wanted = hidden[:, start:].mean(dim=1)
    # Relative, because the length is not 1; sums in another order.
    assert torch.allclose(caption_embeds, wanted, rtol=ROUNDING, atol=ROUNDING)


ROTARY: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 24, "rope_theta": 10000.0,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
}  # fmt: skip


def rotary_model(kind: str, *, max_text_length: int) -> tuple[LLM2CLIPModel, Any]:
    text_model = tiny_llm()
    config = copy.deepcopy(text_model.config)
    config.rope_parameters = ROTARY[kind]
    config.max_position_embeddings = 128 if kind == "longrope" else 24
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_model = AutoModel.from_config(config).eval()
    return join_towers(
        tiny_vision(),
        (text_model, tiny_tokenizer()),
        BuildConfig(projection_dim=32, max_text_length=max_text_length, prompt="llama-3"),
    )


@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize("with_gradients", [True, False])
def test_rotary_frequencies_that_depend_on_the_batch_do_so_for_no_text(
    kind: str, with_gradients: bool
) -> None:
    model, processor = rotary_model(kind, max_text_length=24)
    texts = ["a dog", "two red apples on a wooden table by the window at night in a red car"]
    batch = dict(processor(text=texts))
    assert batch["attention_mask"].sum(dim=1).max() == 24
    with torch.set_grad_enabled(with_gradients):
        alone = model(**processor(text=texts[:1])).text_embeds
        for plain in (batch, processor(text=texts[:1], padding="max_length", max_length=24)):
            padded = {name: F.pad(value, (0, 8)) for name, value in plain.items()}
            for inputs in (plain, padded, move_padding_left(padded)):
                text_embeds = model(**inputs).text_embeds[:1]
                assert torch.allclose(text_embeds, alone, atol=ROUNDING)


@pytest.mark.parametrize("kind", ROTARY)
def test_texts_long_enough_for_batch_dependent_rotary_frequencies_are_rejected(kind: str) -> None:
    shown = rf"max_text_length=25, but from 25 tokens .*rope_type='{kind}'.*at most 24"
    with pytest.raises(ValueError, match=shown):
        rotary_model(kind, max_text_length=25)


@pytest.mark.parametrize(
    ("length", "error"),
    [
        (1, r"prompt_length=1 is shorter than .* own prompt"),
        (torch.tensor([9, 9, 8]), "prompt_length is both 8 and 9 in one batch"),
    ],
)
def test_an_instruction_of_another_length_is_rejected(length: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        shared_model()[0].get_text_features(**texts_of(shared_batch()), prompt_length=length)


@every_pair
def test_padding_and_batches_change_no_embedding(vision: str, llm: str) -> None:
    model, processor = shared_model(vision, llm)
    batch = shared_batch(vision, llm)
    many = model(**batch)  # gradients are on, so the texts run as one padded batch
    for row in range(len(CAPTIONS)):
        single = {name: value[row : row + 1] for name, value in batch.items()}
        length = int(single["attention_mask"].sum())
        single["input_ids"] = single["input_ids"][:, :length]
        del single["attention_mask"]  # not needed without padding
        alone = model(**single)
        assert torch.allclose(alone.text_embeds[0], many.text_embeds[row], atol=ROUNDING)
        assert torch.allclose(alone.image_embeds[0], many.image_embeds[row], atol=ROUNDING)
    if vision != "clip":  # what follows depends on the LLM alone
        return
    texts = [" ".join(["dog"] * (1 + 5 * number % 13)) for number in range(40)]
    right = texts_of(processor(text=texts))
    left = move_padding_left(right)
    assert not torch.equal(left["attention_mask"], right["attention_mask"])
    expected = F.normalize(model.get_text_features(**right).pooler_output, dim=-1)
    for inputs, with_gradients in ((left, True), (left, False), (right, False)):
        with torch.set_grad_enabled(with_gradients):  # without: in packs or token batches
            features = model.get_text_features(**inputs).pooler_output
        assert torch.allclose(F.normalize(features, dim=-1), expected, atol=ROUNDING)


@pytest.mark.parametrize("llm", LEARNED_POSITIONS)
def test_left_padding_does_not_shift_learned_positions(llm: str) -> None:
    # A shift does not change rotary positions, which are relative, but it changes learned ones.
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    decoder = AutoModel.from_config(
        AutoConfig.for_model(llm, **size, **tokens, **LEARNED_POSITIONS[llm])
    ).eval()
    arguments = BuildConfig(prompt="llama-3", projection_dim=32, max_text_length=32)
    model, processor = join_towers(tiny_vision(), (decoder, tiny_tokenizer()), arguments)
    right = texts_of(processor(text=CAPTIONS))
    before, after = (
        F.normalize(model.get_text_features(**batch).pooler_output, dim=-1)
        for batch in (right, move_padding_left(right))
    )
    assert torch.allclose(before, after, atol=ROUNDING)


# Attention


@pytest.mark.parametrize("bidirectional", [True, False])
@every_llm
def test_the_last_token_changes_the_first_hidden_state_unless_causal(
    llm: str, bidirectional: bool
) -> None:
    model, processor = tiny_model(
        "clip", llm, **({} if bidirectional else {"bidirectional": False})
    )
    batches = [texts_of(processor(text=CAPTIONS)), texts_of(processor(text=CAPTIONS[:1]))]
    assert [int(batch["attention_mask"].min()) for batch in batches] == [0, 1]
    for attention in ("eager", *(["sdpa"] if model.text_model._supports_sdpa else [])):
        model.set_attn_implementation(attention)
        assert model.text_model.config._attn_implementation == attention
        for batch in batches:
            moved = first_position_moves_by(model, batch, row=0)
            # Weights of size 0.2 change it by far more than rounding.
            assert moved > 1e-3 if bidirectional else moved == 0


# Inputs of forward


def test_images_and_texts_give_the_same_embeddings_alone_and_together() -> None:
    model, _ = shared_model()
    batch = shared_batch()
    with torch.no_grad():
        both, texts, images = (
            model(**inputs) for inputs in (batch, texts_of(batch), images_of(batch))
        )
    assert torch.equal(both.text_embeds, texts.text_embeds)
    assert torch.equal(both.image_embeds, images.image_embeds)
    assert both.pooler_output is None and both.loss is None
    assert torch.equal(texts.pooler_output, texts.text_embeds) and texts.image_embeds is None
    assert torch.equal(images.pooler_output, images.image_embeds)
    assert images.text_embeds is None and images.logits_per_image is None


def test_arguments_of_a_tower_reach_it_and_its_details_come_back() -> None:
    model, _ = tiny_model()
    model.set_attn_implementation("eager")
    batch = shared_batch()
    with torch.no_grad():
        plain = model(**batch)
        output = model(**batch, output_hidden_states=True, output_attentions=True)
        texts = model.text_model(**texts_of(batch), output_hidden_states=True)
        images = model.vision_model(**images_of(batch), output_hidden_states=True)
    real = batch["attention_mask"].bool()
    for pooled, tower in ((output.text_model_output, texts), (output.vision_model_output, images)):
        assert len(pooled.hidden_states) == len(tower.hidden_states) == 3
        assert [len(weights) for weights in pooled.attentions] == [len(real)] * 2
    for found, wanted in zip(
        output.text_model_output.hidden_states, texts.hidden_states, strict=True
    ):
        torch.testing.assert_close(found[real], wanted[real], rtol=ROUNDING, atol=ROUNDING)
    assert torch.allclose(output.text_embeds, plain.text_embeds, atol=ROUNDING)
    assert torch.allclose(output.image_embeds, plain.image_embeds, atol=ROUNDING)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt_lenght": 3}, TypeError, r"has no arguments \['prompt_lenght'\]"),
        ({"output_attentions": True}, ValueError, 'the model with attn_implementation="eager"'),
    ],
)
def test_an_argument_that_a_tower_would_swallow_is_rejected(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, batch = shared_model()[0], shared_batch()
    for inputs in (texts_of(batch), images_of(batch), dict(batch)):
        with pytest.raises(error, match=message):
            model(**inputs, **arguments)


def test_the_numbers_of_images_and_texts_may_differ() -> None:
    model, _ = shared_model()
    batch = shared_batch()
    with torch.no_grad():
        output = model(**texts_of(batch), pixel_values=batch["pixel_values"][:2])
        full = model(**batch)
    assert output.logits_per_image.shape == (2, 3) and output.logits_per_text.shape == (3, 2)
    # Logits are cosines times 1 / 0.07, and so is their rounding.
    assert torch.allclose(output.logits_per_image, full.logits_per_image[:2], atol=2e-4)


def test_inputs_without_a_pair_to_compare_are_rejected() -> None:
    model, batch = shared_model()[0], shared_batch()
    with pytest.raises(ValueError, match="neither pixel_values nor input_ids"):
        model()
    for inputs in (texts_of(batch), images_of(batch)):
        with pytest.raises(ValueError, match="needs both pixel_values and input_ids"):
            model(**inputs, return_loss=True)
    two_images = {"pixel_values": batch["pixel_values"][:2]}
    with pytest.raises(ValueError, match="2 images and 3 texts"):
        model(**texts_of(batch), **two_images, return_loss=True)


def test_padding_without_a_mask_is_rejected_if_the_model_has_no_prompt() -> None:
    model, processor = tiny_model(prompt="none")
    batch = processor(text=CAPTIONS)
    with pytest.raises(ValueError, match=r"2 of 3 texts have padding \(id \d+\) and no attention"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="2 of 3 texts have padding"):
        model(input_ids=batch["input_ids"].flip(1))
    alone = processor(text=CAPTIONS[1])
    with torch.no_grad():
        wanted = model(**alone).text_embeds
        assert torch.equal(model(input_ids=alone["input_ids"]).text_embeds, wanted)


PROMPTS_WITH_THE_PAD_ID = {
    "suffix": {"prompt_prefix": "<|im_start|>user", "prompt_suffix": "<|pad|>"},
    "suffix of two": {"prompt_prefix": "<|im_start|>", "prompt_suffix": "<|pad|><|pad|>"},
    "end of the suffix": {"prompt_suffix": "<|im_end|><|pad|>"},
    "prefix": {"prompt_prefix": "<|pad|>user"},
    "both": {"prompt_prefix": "<|pad|>", "prompt_suffix": "<|pad|>"},
}


@pytest.mark.parametrize("prompt", PROMPTS_WITH_THE_PAD_ID.values(), ids=PROMPTS_WITH_THE_PAD_ID)
def test_padding_without_a_mask_is_rejected_if_the_pad_id_is_in_the_prompt(prompt: Any) -> None:
    model, processor = tiny_model(**prompt)
    batch = processor(text=CAPTIONS)
    ids, left = batch["input_ids"], move_padding_left(batch)["input_ids"]
    with torch.no_grad():
        for padded in (ids, left, torch.cat([ids[:1], ids[:1, -1:].expand(1, 3)], dim=1)):
            with pytest.raises(ValueError, match=r"have padding|do not (begin|end)"):
                model(input_ids=padded)
        for caption in CAPTIONS:
            alone = processor(text=caption)
            wanted = model(**alone).text_embeds
            assert torch.equal(model(input_ids=alone["input_ids"]).text_embeds, wanted)


def test_logits_are_float32_under_autocast() -> None:
    model = shared_model()[0]
    embeds = F.normalize(torch.randn(2, 3, 32, generator=torch.manual_seed(0)), dim=-1)
    with torch.no_grad():
        wanted = model.compare(*embeds, return_loss=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model.compare(*embeds, return_loss=True)
    assert found.logits_per_image.dtype == torch.float32
    assert torch.equal(found.logits_per_image, wanted.logits_per_image)
    assert torch.equal(found.loss, wanted.loss)


# Stored embeddings


@pytest.mark.parametrize("normalize", [True, False])
def test_projected_caption_embeds_equal_the_text_features(normalize: bool) -> None:
    model, _ = tiny_model(normalize_text_before_adapter=normalize)
    texts = texts_of(shared_batch())
    with torch.no_grad():
        stored = model.get_caption_embeds(**texts)
        features = model.get_text_features(**texts).pooler_output
    assert torch.equal(model.project_caption_embeds(stored), features)
    # The length of a stored embedding matters only without normalization.
    moved = (model.project_caption_embeds(3 * stored) - features).abs().max()
    assert moved < ROUNDING if normalize else moved > 1e-2


@every_vision
def test_stored_embeds_give_the_same_embeds_as_forward(vision: str) -> None:
    model, _ = shared_model(vision)
    batch = shared_batch(vision)
    with torch.no_grad():
        output = model(**batch)
        stored = model.get_vision_embeds(**images_of(batch))
        features = model.get_image_features(**images_of(batch)).pooler_output
        text_embeds = model.to_text_embeds(model.get_caption_embeds(**texts_of(batch)))
    assert (features.norm(dim=1) - 1).abs().min() > 1e-3  # features are not normalized
    assert torch.equal(model.project_vision_embeds(stored), features)
    assert torch.equal(model.to_image_embeds(stored), output.image_embeds)
    assert torch.equal(F.normalize(features, dim=-1), output.image_embeds)
    assert torch.equal(text_embeds, output.text_embeds)


@pytest.mark.parametrize("name", ["caption", "vision"])
@pytest.mark.parametrize(
    ("embeds", "shown"),
    [
        (torch.rand(2, 31), r"torch.float32 \(2, 31\)"),
        (torch.rand(32), r"torch.float32 \(32,\)"),
        (torch.ones(2, 32, dtype=torch.long), r"torch.int64 \(2, 32\)"),
    ],
)
def test_embeddings_of_the_wrong_shape_or_dtype_are_rejected(
    name: str, embeds: Tensor, shown: str
) -> None:
    project = getattr(shared_model()[0], f"project_{name}_embeds")
    with pytest.raises(ValueError, match=rf"{name}_embeds must be .*\(B, 32\), not {shown}"):
        project(embeds)


@pytest.mark.parametrize("model_class", [LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel])
def test_a_server_that_would_run_the_llm_causally_is_rejected(model_class: Any) -> None:
    # vLLM checks this before it replaces the attention. It would pool the last token of a causal
    # pass.
    assert model_class.is_backend_compatible() is False


# Compiled

CUT: dict[str, Any] = {
    "a gap in their attention_mask": lambda ids, m: (ids, m.index_fill(1, torch.tensor(3), 0)),
    "no token to pool": lambda ids, mask: (ids, mask.index_fill(0, torch.tensor(1), 0)),
    "more than max_text_length": lambda ids, _: (
        ids[:, [*range(5), *[5] * 40, *range(5, ids.shape[1])]],
        torch.ones(len(ids), ids.shape[1] + 40, dtype=torch.long),
    ),
    "do not begin with the model's prompt": lambda ids, mask: (ids[:, 1:], mask[:, 1:]),
    "outside the vocabulary": lambda ids, mask: (ids + 10**6, mask),
    "have padding": lambda ids, _: (ids, None),
}


@pytest.mark.slow
def test_a_compiled_model_rejects_the_same_inputs_as_a_plain_one() -> None:
    model, processor = shared_model()
    batch = processor(text=CAPTIONS)
    torch.compiler.reset()
    compiled = torch.compile(model.get_caption_embeds, backend="eager", fullgraph=True)
    for complaint, change in CUT.items():
        ids, mask = change(batch["input_ids"], batch["attention_mask"])
        for encode in (model.get_caption_embeds, compiled):
            with torch.no_grad(), pytest.raises(ValueError, match=complaint):
                encode(ids, mask)


@pytest.mark.parametrize("has_mask", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_compiled_model_is_one_graph_for_texts_that_pass(has_mask: bool) -> None:
    model, processor = shared_model()
    torch.compiler.reset()
    backend = "aot_eager" if has_mask else "eager"
    compiled = torch.compile(model.get_caption_embeds, backend=backend, fullgraph=True)
    batch = processor(text=CAPTIONS if has_mask else CAPTIONS[1])
    inputs = dict(batch) if has_mask else {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        expected = model.get_caption_embeds(**batch)
        torch.testing.assert_close(compiled(**inputs), expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("family", ["dinov3_vit", "aimv2"])
@pytest.mark.slow
def test_images_are_compiled_as_one_graph(family: str) -> None:
    model, _ = tiny_model(family)
    torch.compiler.reset()
    compiled = torch.compile(model.get_image_features, backend="eager", fullgraph=True)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.get_image_features(pixel_values=pixels).pooler_output
        found = compiled(pixel_values=pixels).pooler_output
    torch.testing.assert_close(found, wanted, rtol=ROUNDING, atol=ROUNDING)


def test_logit_soft_capping_is_kept_where_transformers_would_choose_sdpa(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As transformers 5.6 to 5.16 do, whose SDPA ignores them."""
    model, processor = tiny_model(llm="gemma2")
    model.save_pretrained(tmp_path)
    ids = processor(text=["two red apples on a wooden table"])["input_ids"]
    with torch.no_grad():
        expected = model.get_caption_embeds(ids)
        monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
        loaded = LLM2CLIPModel.from_pretrained(tmp_path, attn_implementation="sdpa")
        assert loaded.text_model.layers[0].self_attn.config._attn_implementation == "eager"
        assert torch.equal(loaded.get_caption_embeds(ids), expected)
