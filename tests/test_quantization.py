"""Quantising reaches the language model and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shared_models import every_device, move
from tiny import tiny_llm, tiny_model, tiny_pictures, tiny_tokenizer, tiny_vision

from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.hub.build import BuildArguments, build_model
from modeling_llm2clip.hub.quantization import KEPT_IN_FULL, text_quantization_config

bitsandbytes = pytest.importorskip("bitsandbytes")


# A block of 4-bit numbers; a narrower matrix than one block fails on processors with bfloat16.
BLOCK = 64


@every_device
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_only_the_language_model_is_quantised(tmp_path, kind, device):
    tokenizer = tiny_tokenizer()
    text_model = tiny_llm(vocabulary_size=len(tokenizer), hidden_size=BLOCK)
    settings = BuildArguments(prompt="llama-3", max_text_length=32)
    model, processor = build_model(*tiny_vision(), text_model, tokenizer, settings)
    model.save_pretrained(tmp_path)
    inputs = processor(text=["a dog", "two cats"], images=tiny_pictures())
    loaded = LLM2CLIPModel.from_pretrained(
        tmp_path, quantization_config=text_quantization_config(kind), device_map={"": device}
    )
    layers = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    quantised = [name for name, module in loaded.named_modules() if isinstance(module, layers)]
    assert quantised and all(name.startswith("text_model.") for name in quantised)
    parts = [n.removeprefix("text_model.") for n, _ in model.text_model.named_modules()]
    assert len(quantised) == sum(part.endswith("_proj") for part in parts)
    with torch.inference_mode():
        before, after = model(**inputs), loaded(**move(inputs, device))
    # The picture half keeps its weights, so only the order of sums may differ; more of it on CUDA.
    tolerance = {"atol": 1e-5 if device == "cuda" else 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(after.image_embeds.cpu(), before.image_embeds, **tolerance)
    cosine = F.cosine_similarity(after.text_embeds.cpu(), before.text_embeds)
    # Four bits keep two to three digits of each weight; a wrong text has a cosine far lower.
    assert cosine.min() > 0.8


def test_everything_outside_the_language_model_stands_on_the_list():
    model, _ = tiny_model()
    assert {name for name, _ in model.named_children()} == {*KEPT_IN_FULL, "text_model"}


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="kind='2bit' must be '4bit' or '8bit'"):
        text_quantization_config("2bit")
