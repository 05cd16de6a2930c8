"""Laws of the forward pass, over tiny random towers of every family."""

from __future__ import annotations

import copy
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modeling_llm2clip import (
    LLM2CLIPConfig,
    LLM2CLIPModel,
    LLM2CLIPProcessor,
    LLM2CLIPTextModel,
    LLM2CLIPVisionModel,
)
from modeling_llm2clip.modeling_llm2clip import LogitScale, contrastive_loss
from safetensors.torch import load_file, save_file
from tiny import LLM_FAMILIES, VISION_FAMILIES, tiny_model, tiny_pictures
from torch import Tensor
from transformers import AutoModel, AutoModelForTextEncoding, AutoProcessor

PAIRS = [(vision, "llama") for vision in VISION_FAMILIES] + [
    ("clip", llm) for llm in LLM_FAMILIES if llm != "llama"
]
CAPTIONS = ["a dog", "two red apples on a wooden table by the window", "x"]
# Sums of float32 numbers in another order, over two layers, on unit-length vectors.
ROUNDING = 1e-5

every_pair = pytest.mark.parametrize(("vision", "llm"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
every_vision = pytest.mark.parametrize("vision", VISION_FAMILIES)
every_llm = pytest.mark.parametrize("llm", LLM_FAMILIES)


@cache
def shared_model(vision: str = "clip", llm: str = "llama") -> tuple[Any, Any]:
    """A model and its processor that no test may change."""
    return tiny_model(vision, llm)


@cache
def shared_batch(vision: str = "clip", llm: str = "llama") -> dict[str, Tensor]:
    """Three captions of unlike length and three pictures of unlike colour."""
    processor = shared_model(vision, llm)[1]
    return dict(processor(text=CAPTIONS, images=tiny_pictures(3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved whole model with its processor; not to be changed."""
    path = tmp_path_factory.mktemp("whole")
    model, processor = shared_model()
    copy.deepcopy(model).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def take(batch: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: batch[name] for name in names}


def texts_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return take(batch, "input_ids", "attention_mask")


def pictures_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in texts_of(batch)}


def move_padding_left(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn every row until its real tokens, which stand left, stand right."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    turns = (ids.shape[1] - mask.sum(dim=1)).tolist()
    return {
        "input_ids": torch.stack([row.roll(turn) for row, turn in zip(ids, turns, strict=True)]),
        "attention_mask": torch.stack([r.roll(n) for r, n in zip(mask, turns, strict=True)]),
    }


def copy_folder(source: Path, target: Path, change: Any) -> Path:
    """Copy a saved model, with `change` applied to its weights."""
    target.mkdir()
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


# What comes out


@every_pair
def test_every_pair_of_towers_compares_pictures_with_texts(vision: str, llm: str) -> None:
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
    # Unlike inputs must give unlike vectors, or the other laws would hold for a constant.
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
    # Not of unit length, hence relative; sums in another order.
    assert torch.allclose(caption_embeds, wanted, rtol=ROUNDING, atol=ROUNDING)


def test_an_instruction_is_attended_to_and_not_pooled() -> None:
    model, processor = shared_model()
    instruction = "find: "
    ids = processor(text=instruction + "dog")["input_ids"]
    alone = processor(text=instruction)["input_ids"]
    num_suffix = len(model.config.prompt_suffix_ids)
    start = alone.shape[1] - num_suffix  # the blank at its end is stripped
    # sentence-transformers leaves a special last token out when it measures an instruction.
    prompt_length = alone.shape[1] - model.config.prompt_suffix_ends_special
    with torch.no_grad():
        hidden = model.text_model(input_ids=ids, use_cache=False).last_hidden_state
        embeds = model.get_caption_embeds(ids, prompt_length=prompt_length)
        plain = model.get_caption_embeds(ids)
    assert torch.allclose(embeds, hidden[:, start:].mean(dim=1), rtol=ROUNDING, atol=ROUNDING)
    assert (embeds - plain).abs().max() > 1e-2


def test_an_instruction_shorter_than_the_prompt_is_refused() -> None:
    model, _ = shared_model()
    with pytest.raises(ValueError, match=r"prompt_length=1 is shorter than .* own prompt"):
        model.get_text_features(**texts_of(shared_batch()), prompt_length=1)


@every_pair
def test_a_batch_of_one_equals_a_batch_of_many(vision: str, llm: str) -> None:
    model, _ = shared_model(vision, llm)
    batch = shared_batch(vision, llm)
    many = model(**batch)  # gradients are on, so the texts run as one padded batch
    for row in range(len(CAPTIONS)):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        length = int(one["attention_mask"].sum())
        one["input_ids"] = one["input_ids"][:, :length]
        del one["attention_mask"]  # without padding none is needed
        alone = model(**one)
        assert torch.allclose(alone.text_embeds[0], many.text_embeds[row], atol=ROUNDING)
        assert torch.allclose(alone.image_embeds[0], many.image_embeds[row], atol=ROUNDING)


@every_llm
@pytest.mark.parametrize("with_gradients", [True, False])
def test_left_padding_equals_right_padding(llm: str, with_gradients: bool) -> None:
    model, _ = shared_model("clip", llm)
    right = texts_of(shared_batch("clip", llm))
    left = move_padding_left(right)
    assert not torch.equal(left["attention_mask"], right["attention_mask"])
    with torch.set_grad_enabled(with_gradients):
        before = F.normalize(model.get_text_features(**right).pooler_output, dim=-1)
        after = F.normalize(model.get_text_features(**left).pooler_output, dim=-1)
    assert torch.allclose(before, after, atol=ROUNDING)


@every_llm
def test_token_batches_equal_one_plain_batch(llm: str) -> None:
    model, processor = shared_model("clip", llm)
    texts = [" ".join(["dog"] * (1 + 5 * number % 13)) for number in range(40)]
    batch = texts_of(processor(text=texts))
    plain = model.get_text_features(**batch).pooler_output.detach()
    with torch.no_grad():
        in_token_batches = model.get_text_features(**batch).pooler_output
    assert torch.allclose(
        F.normalize(plain, dim=-1), F.normalize(in_token_batches, dim=-1), atol=ROUNDING
    )


# Attention


def first_position_moves_by(model: LLM2CLIPModel, batch: dict[str, Tensor], row: int) -> float:
    """How far the first hidden state moves when the last real token changes."""
    changed = {name: value.clone() for name, value in batch.items()}
    last = int(batch["attention_mask"][row].sum()) - 1
    changed["input_ids"][row, last] = (batch["input_ids"][row, last] + 7) % 300
    with torch.no_grad():
        before, after = (
            model.text_model(**inputs, use_cache=False).last_hidden_state[row, 0]
            for inputs in (batch, changed)
        )
    return float((before - after).abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("bidirectional", [True, False])
@every_llm
def test_the_last_token_moves_the_first_position_unless_causal(
    llm: str, bidirectional: bool, attention: str
) -> None:
    model, processor = tiny_model("clip", llm, bidirectional=bidirectional)
    if attention == "sdpa" and not model.text_model._supports_sdpa:
        pytest.skip(f"transformers has no sdpa for {llm}")
    model.set_attn_implementation(attention)
    assert model.text_model.config._attn_implementation == attention
    padded = texts_of(processor(text=CAPTIONS))
    unpadded = texts_of(processor(text=CAPTIONS[:1]))
    assert padded["attention_mask"].min() == 0
    for batch in (padded, unpadded):
        moved = first_position_moves_by(model, batch, row=0)
        if bidirectional:
            # Weights of size 0.2 move it by far more than rounding.
            assert moved > 1e-3
        else:
            assert moved == 0


def test_a_causal_build_stays_causal_when_saved_and_loaded(tmp_path: Path) -> None:
    model, processor = tiny_model(bidirectional=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.bidirectional is False
    batch = texts_of(processor(text=CAPTIONS))
    assert first_position_moves_by(loaded, batch, row=0) == 0


@pytest.mark.parametrize("load", [LLM2CLIPModel, AutoModel], ids=["own", "auto"])
def test_each_tower_can_have_its_own_attention_implementation(load: Any, folder: Path) -> None:
    loaded = load.from_pretrained(
        folder, attn_implementation={"text_config": "eager", "vision_config": "sdpa"}
    )
    assert loaded.text_model.config._attn_implementation == "eager"
    assert loaded.vision_model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        wanted, found = shared_model()[0](**shared_batch()), loaded(**shared_batch())
    assert torch.allclose(found.text_embeds, wanted.text_embeds, atol=ROUNDING)
    assert torch.allclose(found.image_embeds, wanted.image_embeds, atol=ROUNDING)


@pytest.mark.parametrize("load", [LLM2CLIPModel, AutoModel], ids=["own", "auto"])
def test_an_attention_implementation_reaches_both_towers(load: Any, folder: Path) -> None:
    loaded = load.from_pretrained(folder, attn_implementation="eager")
    assert loaded.text_model.config._attn_implementation == "eager"
    assert loaded.vision_model.config._attn_implementation == "eager"


# Inputs of forward


def test_pictures_alone_texts_alone_and_both_agree() -> None:
    model, _ = shared_model()
    batch = shared_batch()
    with torch.no_grad():
        both, texts, pictures = (
            model(**inputs) for inputs in (batch, texts_of(batch), pictures_of(batch))
        )
    assert torch.equal(both.text_embeds, texts.text_embeds)
    assert torch.equal(both.image_embeds, pictures.image_embeds)
    assert both.pooler_output is None and both.loss is None
    assert torch.equal(texts.pooler_output, texts.text_embeds) and texts.image_embeds is None
    assert torch.equal(pictures.pooler_output, pictures.image_embeds)
    assert pictures.text_embeds is None and pictures.logits_per_image is None


def test_embeds_are_the_features_at_unit_length() -> None:
    model, _ = shared_model()
    batch = shared_batch()
    with torch.no_grad():
        output = model(**batch)
        texts = model.get_text_features(**texts_of(batch)).pooler_output
        pictures = model.get_image_features(**pictures_of(batch)).pooler_output
    assert torch.equal(output.text_embeds, F.normalize(texts, dim=-1))
    assert torch.equal(output.image_embeds, F.normalize(pictures, dim=-1))
    assert (texts.norm(dim=1) - 1).abs().min() > 1e-3  # features themselves are not normalised


def test_a_tuple_has_the_fields_that_are_there() -> None:
    model, _ = shared_model()
    with torch.no_grad():
        output = model(**shared_batch(), return_dict=False)
    assert type(output) is tuple
    assert [value.shape for value in output] == [(3, 3), (3, 3), (3, 32), (3, 32)]


def test_pictures_and_texts_may_be_unequally_many() -> None:
    model, _ = shared_model()
    batch = shared_batch()
    with torch.no_grad():
        output = model(**texts_of(batch), pixel_values=batch["pixel_values"][:2])
        whole = model(**batch)
    assert output.logits_per_image.shape == (2, 3) and output.logits_per_text.shape == (3, 2)
    # Logits, 1 / 0.07 times a rounded cosine.
    assert torch.allclose(output.logits_per_image, whole.logits_per_image[:2], atol=2e-4)


def test_no_input_is_refused() -> None:
    with pytest.raises(ValueError, match="neither pixel_values nor input_ids"):
        shared_model()[0]()


@pytest.mark.parametrize("kind", [texts_of, pictures_of])
def test_a_loss_of_one_kind_of_input_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="return_loss=True needs pixel_values and input_ids"):
        shared_model()[0](**kind(shared_batch()), return_loss=True)


def test_a_loss_of_unequally_many_is_refused_with_both_counts() -> None:
    batch = shared_batch()
    with pytest.raises(ValueError, match="2 pictures and 3 texts"):
        shared_model()[0](
            **texts_of(batch), pixel_values=batch["pixel_values"][:2], return_loss=True
        )


def test_ids_without_the_checkpoints_prompt_are_refused() -> None:
    model, processor = shared_model()
    ids = processor.tokenizer(
        "two red apples on a table", add_special_tokens=False, return_tensors="pt"
    )["input_ids"]
    with pytest.raises(ValueError, match="do not begin with its prompt"):
        model(input_ids=ids)


def test_a_larger_picture_needs_interpolation_to_be_asked_for() -> None:
    model, _ = shared_model()
    larger = torch.rand(1, 3, 48, 48)
    with pytest.raises(ValueError, match="48"):
        model(pixel_values=larger)
    with torch.no_grad():
        output = model(pixel_values=larger, interpolate_pos_encoding=True)
    assert output.image_embeds.shape == (1, 32)


@pytest.mark.parametrize("vision_pooling", ["cls", "mean"])
def test_pictures_can_be_pooled_from_their_tokens(vision_pooling: str) -> None:
    model, processor = tiny_model(vision_pooling=vision_pooling)
    inputs = processor(images=tiny_pictures(2))
    with torch.no_grad():
        tokens = model.vision_model(**inputs).last_hidden_state
        embeds = model.get_vision_embeds(**inputs)
    wanted = tokens[:, 0] if vision_pooling == "cls" else tokens.mean(dim=1)
    assert torch.allclose(embeds, wanted, atol=ROUNDING)


# Stored vectors


@pytest.mark.parametrize("normalize", [True, False])
def test_projected_caption_embeds_are_the_text_features(normalize: bool) -> None:
    model, _ = tiny_model(normalize_text_before_adapter=normalize)
    texts = texts_of(shared_batch())
    with torch.no_grad():
        stored = model.get_caption_embeds(**texts)
        features = model.get_text_features(**texts).pooler_output
    assert torch.equal(model.project_caption_embeds(stored), features)
    # With normalisation the length of a stored vector does not matter, without it does.
    moved = (model.project_caption_embeds(3 * stored) - features).abs().max()
    assert moved < ROUNDING if normalize else moved > 1e-2


@every_vision
def test_projected_vision_embeds_are_the_image_features(vision: str) -> None:
    model, _ = shared_model(vision)
    pictures = pictures_of(shared_batch(vision))
    with torch.no_grad():
        stored = model.get_vision_embeds(**pictures)
        features = model.get_image_features(**pictures).pooler_output
        assert torch.equal(model.project_vision_embeds(stored), features)


@pytest.mark.parametrize("name", ["caption", "vision"])
@pytest.mark.parametrize(
    ("embeds", "shown"),
    [
        (torch.rand(2, 31), r"torch.float32 \(2, 31\)"),
        (torch.rand(32), r"torch.float32 \(32,\)"),
        (torch.ones(2, 32, dtype=torch.long), r"torch.int64 \(2, 32\)"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(name: str, embeds: Tensor, shown: str) -> None:
    project = getattr(shared_model()[0], f"project_{name}_embeds")
    with pytest.raises(ValueError, match=rf"{name}_embeds must be .*\(B, 32\); got {shown}"):
        project(embeds)


# Loss and gradients


def test_the_loss_is_log_batch_size_when_no_pair_stands_out() -> None:
    model, processor = shared_model()
    batch = processor(text=["a dog"] * 4, images=tiny_pictures(1) * 4)
    loss = model(**batch, return_loss=True).loss
    assert loss.shape == ()
    # Logits of up to 14 differ by rounding only.
    assert loss.item() == pytest.approx(math.log(4), abs=1e-5)


def test_the_loss_is_the_mean_of_both_directions() -> None:
    logits = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
    # Rows: ln(1 + e^2) and ln(1 + e^-2). Columns: ln(1 + e^-1) and ln(1 + e^1).
    terms = [math.log1p(math.exp(x)) for x in (2, -2, -1, 1)]
    # Sums of four float32 numbers.
    assert contrastive_loss(logits).item() == pytest.approx(sum(terms) / 4, abs=1e-6)


@every_pair
def test_gradients_flow_to_every_trainable_parameter(vision: str, llm: str) -> None:
    model = copy.deepcopy(shared_model(vision, llm)[0]).train()
    model(**shared_batch(vision, llm), return_loss=True).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # DINOv2 has a token for masked pictures, which only its own pretraining uses.
    assert [name for name in without if not name.endswith("mask_token")] == []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name


def test_activation_checkpointing_gives_equal_gradients() -> None:
    batch = shared_batch()
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(shared_model()[0]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(**batch, return_loss=True).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # The same operations once more, in the same order; 1e-6 leaves room for threading.
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


# Temperature


@pytest.mark.parametrize(
    ("log_scale", "scale"), [(-1.0, 1.0), (0.0, 1.0), (1.0, math.e), (9.0, 100.0)]
)
def test_the_inverse_temperature_stays_between_1_and_100(log_scale: float, scale: float) -> None:
    # float32 has 24 bits.
    assert LogitScale(log_scale)().item() == pytest.approx(scale, rel=1e-6)


def test_the_temperature_has_one_dimension_and_comes_last() -> None:
    model, _ = shared_model()
    names = [name for name, _ in model.named_parameters()]
    assert names[-1] == "logit_scale.log_scale"
    assert model.logit_scale.log_scale.shape == (1,)


# Precision


def test_bfloat16_gives_float32_vectors_close_to_those_of_float32(folder: Path) -> None:
    half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.text_model.dtype == half.vision_model.dtype == torch.bfloat16
    with torch.no_grad():
        found, wanted = half(**shared_batch()), shared_model()[0](**shared_batch())
        stored = half.get_caption_embeds(**texts_of(shared_batch()))
        features = half.get_text_features(**texts_of(shared_batch())).pooler_output
    assert stored.dtype == features.dtype == found.logits_per_image.dtype == torch.float32
    for name in ("text_embeds", "image_embeds"):
        assert found[name].dtype == torch.float32
        # bfloat16 keeps 8 bits, 0.4 % a step; two layers and an adapter pile up a few per cent.
        cosines = (found[name] * wanted[name]).sum(dim=1)
        assert cosines.min() > 0.998


@pytest.mark.parametrize("way", ["built", "loaded"])
def test_a_bfloat16_model_says_so_and_keeps_its_temperature_in_float32(
    way: str, folder: Path, tmp_path: Path
) -> None:
    if way == "built":
        model, _ = tiny_model(dtype=torch.bfloat16)
    else:
        model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.logit_scale.log_scale.dtype == torch.float32
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModel.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.text_model.parameters()} == {torch.bfloat16}
    assert loaded.logit_scale.log_scale.dtype == torch.float32
    assert torch.equal(loaded.logit_scale.log_scale, shared_model()[0].logit_scale.log_scale)


# Saving and loading


@every_pair
def test_saved_and_loaded_equals_before(vision: str, llm: str, tmp_path: Path) -> None:
    model, processor = shared_model(vision, llm)
    copy.deepcopy(model).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = (
        AutoModel.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    assert type(loaded) is LLM2CLIPModel and type(loaded_processor) is LLM2CLIPProcessor
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    batch = loaded_processor(text=CAPTIONS, images=tiny_pictures(3))
    wanted = shared_batch(vision, llm)
    assert batch.keys() == wanted.keys()
    for name in wanted:
        # The loaded image processor may be torchvision's in place of Pillow's; flat pictures.
        assert torch.allclose(batch[name], wanted[name], atol=1e-6), name
    with torch.no_grad():
        found, wanted = loaded(**wanted), model(**wanted)
    # Equal weights may lie at other addresses, whose alignment picks other kernels.
    assert torch.allclose(found.text_embeds, wanted.text_embeds, atol=1e-6)
    assert torch.allclose(found.image_embeds, wanted.image_embeds, atol=1e-6)


def test_loading_leaves_a_model_in_evaluation_mode_with_loading_information(folder: Path) -> None:
    model, info = LLM2CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not model.training
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize(
    "key",
    [
        "text_adapter.blocks.0.up.weight",
        "text_projection.bias",
        "logit_scale.log_scale",
        "text_model.norm.weight",
    ],
)
@pytest.mark.parametrize("load", [LLM2CLIPModel, AutoModel], ids=["own", "auto"])
def test_a_missing_weight_is_named(load: Any, key: str, folder: Path, tmp_path: Path) -> None:
    broken = copy_folder(folder, tmp_path / "broken", lambda weights: weights.pop(key))
    with pytest.raises(ValueError, match=rf"Missing \(1\): \['{key}'\]"):
        load.from_pretrained(broken)


@pytest.mark.parametrize("key", ["surprise.weight", "text_model.layers.7.mlp.up_proj.weight"])
def test_an_unexpected_weight_is_named(key: str, folder: Path, tmp_path: Path) -> None:
    def add(weights: dict[str, Tensor]) -> None:
        weights[key] = torch.zeros(2)

    with pytest.raises(ValueError, match=rf"Unexpected \(1\): \['{key}'\]"):
        LLM2CLIPModel.from_pretrained(copy_folder(folder, tmp_path / "broken", add))


def test_a_weight_of_another_shape_is_named_with_both_shapes(folder: Path, tmp_path: Path) -> None:
    def shorten(weights: dict[str, Tensor]) -> None:
        weights["text_projection.weight"] = weights["text_projection.weight"][:5].clone()

    broken = copy_folder(folder, tmp_path / "broken", shorten)
    with pytest.raises(ValueError, match=r"another shape.*text_projection.weight.*5, 32.*32, 32"):
        LLM2CLIPModel.from_pretrained(broken)


def test_the_text_half_loads_from_the_whole_folder_without_the_other(folder: Path) -> None:
    half = LLM2CLIPTextModel.from_pretrained(folder)
    assert type(AutoModelForTextEncoding.from_pretrained(folder)) is LLM2CLIPTextModel
    tops = {name.split(".")[0] for name in half.state_dict()}
    assert tops == {"text_model", "text_adapter", "text_projection"}
    texts = texts_of(shared_batch())
    with torch.no_grad():
        found, wanted = half(**texts), shared_model()[0](**texts)
    # Equal weights at other addresses, see above.
    assert torch.allclose(found.text_embeds, wanted.text_embeds, atol=1e-6)
    assert torch.equal(found.pooler_output, found.text_embeds)


@every_vision
def test_the_picture_half_loads_from_the_whole_folder_without_the_other(
    vision: str, tmp_path: Path
) -> None:
    whole = shared_model(vision)[0]
    copy.deepcopy(whole).save_pretrained(tmp_path)
    half = LLM2CLIPVisionModel.from_pretrained(tmp_path)
    assert {name.split(".")[0] for name in half.state_dict()} == {
        "vision_model",
        "visual_projection",
    }
    pictures = pictures_of(shared_batch(vision))
    with torch.no_grad():
        found, wanted = half(**pictures), whole(**pictures)
    # Equal weights at other addresses, see above.
    assert torch.allclose(found.image_embeds, wanted.image_embeds, atol=1e-6)


@pytest.mark.parametrize("half", [LLM2CLIPTextModel, LLM2CLIPVisionModel])
def test_a_half_saves_and_loads_alone(half: Any, folder: Path, tmp_path: Path) -> None:
    before = half.from_pretrained(folder)
    before.save_pretrained(tmp_path)
    after = half.from_pretrained(tmp_path).state_dict()
    assert before.state_dict().keys() == after.keys()
    for name, value in before.state_dict().items():
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("half", [LLM2CLIPTextModel, LLM2CLIPVisionModel])
def test_a_half_does_not_pass_for_a_whole_model(half: Any, folder: Path, tmp_path: Path) -> None:
    half.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Missing .*Use the class that saved the folder"):
        LLM2CLIPModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("half", [LLM2CLIPTextModel, LLM2CLIPVisionModel])
def test_a_half_is_strict_about_its_own_weights(half: Any, folder: Path, tmp_path: Path) -> None:
    own = {LLM2CLIPTextModel: "text_projection", LLM2CLIPVisionModel: "visual_projection"}[half]
    broken = copy_folder(folder, tmp_path / "broken", lambda w: w.pop(f"{own}.weight"))
    with pytest.raises(ValueError, match=rf"Missing \(1\): \['{own}.weight'\]"):
        half.from_pretrained(broken)


def test_a_saved_folder_names_no_path_of_its_maker(folder: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    for path in tmp_path.glob("*.json"):
        assert str(folder) not in path.read_text(encoding="utf-8"), path.name


def test_an_untrained_model_is_built_from_its_configuration_alone() -> None:
    config = LLM2CLIPConfig.from_dict(shared_model()[0].config.to_dict())
    model = LLM2CLIPModel(config)
    assert model.state_dict().keys() == shared_model()[0].state_dict().keys()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.logit_scale().item() == pytest.approx(1 / 0.07, rel=1e-6)  # float32


# The ecosystem


@pytest.mark.slow
def test_compiled_equals_plain() -> None:
    model, _ = shared_model()
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    with torch.no_grad():
        found, wanted = compiled(**shared_batch()), model(**shared_batch())
    # The compiled one runs the texts as one padded batch.
    assert torch.allclose(found.text_embeds, wanted.text_embeds, atol=ROUNDING)
    assert torch.allclose(found.image_embeds, wanted.image_embeds, atol=ROUNDING)


@pytest.mark.parametrize("text_device", ["cpu", "disk"])
def test_a_device_map_changes_no_output(text_device: str, folder: Path, tmp_path: Path) -> None:
    device_map: Any = "cpu"
    if text_device == "disk":
        tops = {name.split(".")[0] for name in shared_model()[0].state_dict()}
        device_map = {name: "disk" if name == "text_model" else "cpu" for name in tops}
    model = AutoModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    is_away = {p.device.type for p in model.text_model.parameters()} == {"meta"}
    assert is_away is (text_device == "disk")
    with torch.no_grad():
        found, wanted = model(**shared_batch()), shared_model()[0](**shared_batch())
    # Equal weights at other addresses, see above.
    assert torch.allclose(found.text_embeds, wanted.text_embeds, atol=1e-6)
    assert torch.allclose(found.image_embeds, wanted.image_embeds, atol=1e-6)


def test_lora_on_the_text_tower_trains_saves_and_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(shared_model()[0])
    lora = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4,
            # CLIP's vision tower has layers of the same names.
            target_modules=r"text_model\..*\.(q_proj|k_proj|v_proj|o_proj)",
        ),
    )
    trainable = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 4 * 2  # layers × projections × (A, B)
    assert all("text_model." in name and "lora_" in name for name in trainable)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:  # which start at zero and would change nothing
            torch.nn.init.normal_(parameter, std=0.1)
    batch = shared_batch()
    lora.eval()
    with torch.no_grad():
        wanted, plain = lora(**batch), shared_model()[0](**batch)
    assert (wanted.text_embeds - plain.text_embeds).abs().max() > 1e-2
    assert torch.equal(wanted.image_embeds, plain.image_embeds)

    lora.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(shared_model()[0]), tmp_path).eval()
    merged = copy.deepcopy(lora).merge_and_unload()
    assert type(merged) is LLM2CLIPModel
    with torch.no_grad():
        # Equal weights at other addresses, see above.
        assert torch.allclose(again(**batch).text_embeds, wanted.text_embeds, atol=1e-6)
        # Merging rounds W + BA once more.
        assert torch.allclose(merged(**batch).text_embeds, wanted.text_embeds, atol=1e-4)


@pytest.mark.slow
def test_fsdp2_wraps_and_gives_equal_gradients(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        plain, sharded = (copy.deepcopy(shared_model()[0]) for _ in range(2))
        mesh = init_device_mesh("cpu", (1,))
        for block in (*sharded.text_model.layers, *sharded.text_adapter.blocks):
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        losses = [m(**shared_batch(), return_loss=True).loss for m in (plain, sharded)]
        for loss in losses:
            loss.backward()
        assert torch.allclose(*losses, atol=ROUNDING)
        wanted = {name: p.grad for name, p in plain.named_parameters()}
        for name, parameter in sharded.named_parameters():
            if parameter.grad is not None:
                # One process holds everything, so only the order of sums differs.
                assert torch.allclose(parameter.grad.full_tensor(), wanted[name], atol=1e-5), name
    finally:
        torch.distributed.destroy_process_group()
