"""Quantising reaches the language model and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model, tiny_pictures

from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.hub.quantization import KEPT_IN_FULL, text_quantization_config

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_only_the_language_model_is_quantised(tmp_path, kind):
    model, processor = tiny_model()
    model.save_pretrained(tmp_path)
    inputs = processor(text=["a dog", "two cats"], images=tiny_pictures())
    loaded = LLM2CLIPModel.from_pretrained(
        tmp_path, quantization_config=text_quantization_config(kind)
    )
    layers = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    quantised = [name for name, module in loaded.named_modules() if isinstance(module, layers)]
    assert quantised and all(name.startswith("text_model.") for name in quantised)
    parts = [n.removeprefix("text_model.") for n, _ in model.text_model.named_modules()]
    assert len(quantised) == sum(part.endswith("_proj") for part in parts)
    with torch.inference_mode():
        before, after = model(**inputs), loaded(**inputs)
    # The picture half keeps its weights, so only the order of sums may differ.
    torch.testing.assert_close(after.image_embeds, before.image_embeds, atol=1e-6, rtol=1e-5)
    cosine = F.cosine_similarity(after.text_embeds, before.text_embeds)
    # Four bits keep two to three digits of each weight; a wrong text has a cosine far lower.
    assert cosine.min() > 0.8


def test_everything_outside_the_language_model_stands_on_the_list():
    model, _ = tiny_model()
    assert {name for name, _ in model.named_children()} == {*KEPT_IN_FULL, "text_model"}


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="kind='2bit' must be '4bit' or '8bit'"):
        text_quantization_config("2bit")
