"""Quantization applies to the LLM alone, and is never saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shared_models import every_device, move
from tiny import tiny_images, tiny_llm, tiny_model, tiny_tokenizer, tiny_vision
from transformers import AutoModel, BitsAndBytesConfig

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel
from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.model_folders.model_loading import KEPT_IN_FULL, text_quantization_config

bitsandbytes = pytest.importorskip("bitsandbytes")


# A block of 4-bit numbers. A matrix narrower than one block fails on CPUs with bfloat16.
BLOCK = 64


def test_every_part_but_the_language_model_is_kept_in_full():
    model, _ = tiny_model()
    parts = {name for name, _ in model.named_children()} | {"pooled_dense"}  # inside the LLM
    assert parts == {*KEPT_IN_FULL, "text_model"}


def test_an_unknown_quantization_is_rejected():
    with pytest.raises(ValueError, match="quantization='2bit' must be '4bit' or '8bit'"):
        text_quantization_config("2bit")


def list_quantized(model: Any) -> list[str]:
    layers = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return [name for name, module in model.named_modules() if isinstance(module, layers)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder, its model and a batch; weights have two blocks of 4-bit numbers per row."""
    tokenizer = tiny_tokenizer()
    text_model = tiny_llm(vocabulary_size=len(tokenizer), hidden_size=2 * BLOCK)
    settings = BuildConfig(prompt="llama-3", max_text_length=32)
    model, processor = join_towers(tiny_vision(), (text_model, tokenizer), settings)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder, model, dict(processor(text=["a dog", "two cats"], images=tiny_images()))


CONFIGS = {
    "4bit": BitsAndBytesConfig(load_in_4bit=True),
    "8bit": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "4bit without o_proj": BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["o_proj"]),
    "4bit as a dictionary": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    **{f"own {name}": text_quantization_config(name) for name in ("4bit", "8bit")},
}


@every_device
@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_language_model_is_quantized(
    name: str, device: str, saved: tuple[Path, Any, Any]
) -> None:
    folder, model, batch = saved
    config, is_ours = copy.deepcopy(CONFIGS[name]), name.startswith("own ")
    load = LLM2CLIPModel if "8bit" in name else AutoModel
    loaded = load.from_pretrained(folder, quantization_config=config, device_map={"": device})
    quantized = list_quantized(loaded)
    wanted = {f"text_model.{n}" for n, _ in model.text_model.named_modules() if "_proj" in n}
    assert set(quantized) == {n for n in wanted if "without" not in name or "o_proj" not in n}
    with torch.inference_mode():
        before, after = model(**batch), loaded(**move(batch, device))
    # The vision tower is not quantized: only the order of sums differs, and more so on CUDA.
    tolerance = {"atol": 1e-5 if device == "cuda" else 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(after.image_embeds.cpu(), before.image_embeds, **tolerance)
    cosine = F.cosine_similarity(after.text_embeds.cpu(), before.text_embeds)
    # bitsandbytes' default fp4 keeps one to two digits of each weight, ours one more; other texts
    # have a far lower cosine.
    assert cosine.min() > (0.8 if is_ours else 0.6)
    if isinstance(config, BitsAndBytesConfig):  # the caller's configuration is not changed
        assert config.llm_int8_skip_modules == CONFIGS[name].llm_int8_skip_modules


@pytest.fixture
def outlying(saved: tuple[Path, Any, Any], tmp_path: Path) -> tuple[Path, list[Any]]:
    """A folder whose layers get numbers above bitsandbytes' own threshold, and batches of texts."""
    model = copy.deepcopy(saved[1])
    for layer in model.text_model.layers:
        layer.input_layernorm.weight.data *= 4
        layer.post_attention_layernorm.weight.data *= 4
    model.save_pretrained(tmp_path / "outlying")
    names = ("input_ids", "attention_mask")
    rows = [{name: saved[2][name][part] for name in names} for part in (slice(2), [0], [1])]
    return tmp_path / "outlying", rows


def measure_influence(model: Any, batches: list[Any]) -> float:
    """Return how far the embeddings of two texts in one batch are from those of each alone."""
    with torch.no_grad():
        both, *alone = (model.get_caption_embeds(**batch) for batch in batches)
    return float((both / torch.cat(alone) - 1).abs().max())


def test_in_8_bits_a_text_has_the_same_embedding_in_every_batch(
    outlying: tuple[Path, list[Any]], recwarn: pytest.WarningsRecorder
) -> None:
    folder, batches = outlying
    model = LLM2CLIPModel.from_pretrained(
        folder, quantization_config=text_quantization_config("8bit"), device_map={"": "cpu"}
    )
    assert measure_influence(model, batches) < 1e-5  # sums in another order
    assert not [each for each in recwarn if "llm_int8" in str(each.message)]


def test_a_threshold_that_mixes_the_texts_of_a_batch_is_named(
    outlying: tuple[Path, list[Any]],
) -> None:
    folder, batches = outlying
    with pytest.warns(UserWarning, match=r"llm_int8_threshold=6\.0: .* depends on the other texts"):
        model = AutoModel.from_pretrained(
            folder, quantization_config={"load_in_8bit": True}, device_map={"": "cpu"}
        )
    assert measure_influence(model, batches) > 1e-2


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_projection_computes_in_floating_point(
    quantization: str, saved: tuple[Path, Any, Any]
) -> None:
    _, model, batch = saved
    projection = model.visual_projection
    layer: Any
    if quantization == "4bit":
        layer = bitsandbytes.nn.Linear4bit(32, 512, bias=True, compute_dtype=torch.float32)
    else:
        layer = bitsandbytes.nn.Linear8bitLt(32, 512, bias=True, has_fp16_weights=False)
    layer.load_state_dict(projection.state_dict())
    quantized = copy.deepcopy(model)
    quantized.visual_projection = layer.to("cpu")
    assert not layer.weight.dtype.is_floating_point
    with torch.no_grad():
        wanted = model.get_vision_embeds(batch["pixel_values"])
        found = quantized.train().project_vision_embeds(wanted)
        wanted = model.project_vision_embeds(wanted)
    # Four bits keep two to three digits of each weight; with a cast to integers it was -0.45.
    assert F.cosine_similarity(found, wanted).min() > 0.97


def test_quantizing_a_vision_only_model_is_rejected(saved: tuple[Path, Any, Any]) -> None:
    with pytest.raises(ValueError, match="LLM2CLIPVisionModel has no LLM"):
        LLM2CLIPVisionModel.from_pretrained(saved[0], quantization_config=CONFIGS["4bit"])


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_model_is_not_saved(
    quantization: str, saved: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    folder, model, _ = saved
    loaded = LLM2CLIPTextModel.from_pretrained(
        folder, quantization_config=CONFIGS[quantization], device_map={"": "cpu"}
    )
    joined = LLM2CLIPModel(
        copy.deepcopy(model.config), copy.deepcopy(model.vision_model), loaded.text_model
    )
    for quantized in (loaded, joined):
        with pytest.raises(ValueError, match=r"14 of its layers \(first: text_model\..*full prec"):
            quantized.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
