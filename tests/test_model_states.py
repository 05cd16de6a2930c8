"""Token states, tuples and dtypes behave as in transformers' CLIPModel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_models import (
    ROUNDING,
    images_of,
    mostly_slow,
    shared_batch,
    shared_model,
    texts_of,
)
from tiny import VISION_FAMILIES, tiny_model

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel
from modeling_llm2clip.packing_llm2clip import _checked

CLASSES = ("both", "text", "vision")
# The single-tower models take arguments of their own input only.
INPUTS = {"both": lambda batch: batch, "text": texts_of, "vision": images_of}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Models of the three classes, which no test may change."""
    folder = tmp_path_factory.mktemp("model")
    copy.deepcopy(shared_model()[0]).save_pretrained(folder)
    classes = (LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModel)
    return {
        part: model_class.from_pretrained(folder)
        for part, model_class in zip(CLASSES, classes, strict=True)
    }


@pytest.mark.parametrize("part", CLASSES)
def test_all_classes_return_a_tuple_on_request(models: dict[str, Any], part: str) -> None:
    model, inputs = models[part], INPUTS[part](shared_batch())
    configured = copy.deepcopy(model)
    configured.config.return_dict = False
    with torch.no_grad():
        output = model(**inputs)
        assert type(configured(**inputs, return_dict=True)) is type(output)
        for values in (model(**inputs, return_dict=False), configured(**inputs)):
            assert type(values) is tuple and len(values) == len(output.to_tuple())
            assert torch.equal(values[0], output[0])  # as pipelines read it
        for name, modality in (("text", texts_of), ("image", images_of)):
            if hasattr(model, f"get_{name}_features"):
                encode = getattr(model, f"get_{name}_features")
                assert len(encode(**modality(shared_batch()), return_dict=False)) == 2


@pytest.mark.parametrize("path", ["packed", "token batches", "left padding", "with gradients"])
def test_text_features_include_the_tokens_that_were_pooled(path: str) -> None:
    model, processor = tiny_model()
    if path == "token batches":
        _checked[model.text_model] = {False: False}  # by blocks
    batch = texts_of(dict(processor(text=["a dog", "two red apples on a table", "x"])))
    if path == "left padding":
        num_padding = (1 - batch["attention_mask"]).sum(dim=1).tolist()
        batch = {
            name: torch.stack([row.roll(n) for row, n in zip(value, num_padding, strict=True)])
            for name, value in batch.items()
        }
    with torch.set_grad_enabled(path == "with gradients"):
        output = model.get_text_features(**batch)
        alone = [
            model.text_model(row[mask.bool()][None], use_cache=False).last_hidden_state[0]
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
    assert output.last_hidden_state.shape == (*batch["input_ids"].shape, 32)
    for states, mask, wanted in zip(
        output.last_hidden_state, batch["attention_mask"], alone, strict=True
    ):
        # Another order of sums over two layers, whose states are about 1.
        assert torch.allclose(states[mask.bool()], wanted, atol=1e-4)


@pytest.mark.parametrize("vision", mostly_slow(VISION_FAMILIES))  # joined towers have no states
def test_image_features_include_the_states_of_the_tower(vision: str) -> None:
    model, images = shared_model(vision)[0], images_of(shared_batch(vision))
    with torch.no_grad():
        states = model.get_image_features(**images).last_hidden_state
        expected = model.vision_model(**images).last_hidden_state
    assert torch.allclose(states, expected, atol=1e-5)


def test_states_have_gradients() -> None:
    model = copy.deepcopy(shared_model()[0]).train()
    output = model.get_text_features(**texts_of(shared_batch()))
    output.last_hidden_state[:, 1].sum().backward()
    assert model.text_model.layers[0].mlp.up_proj.weight.grad is not None


# Conversion


@pytest.mark.parametrize(
    ("dtype", "llm"), [(torch.bfloat16, "llama"), (torch.float16, "gemma3_text")]
)
def test_converting_a_dtype_equals_loading_in_it(
    dtype: torch.dtype, llm: str, tmp_path: Path
) -> None:
    """Both keep the frequencies of rotary positions in float32: nothing is lost for good."""
    model, processor = tiny_model(llm=llm)
    model.save_pretrained(tmp_path)
    frequencies = {n: b.clone() for n, b in model.named_buffers() if n.endswith("inv_freq")}
    batch = processor(text=["a dog", "two red apples on a wooden table by the window"])
    loaded = LLM2CLIPModel.from_pretrained(tmp_path, dtype=dtype)
    converted = model.to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        found, wanted = (m.get_text_features(**batch).pooler_output for m in (converted, loaded))
    assert torch.allclose(found, wanted, rtol=0, atol=ROUNDING)
    back = dict(model.float().named_buffers())  # type: ignore[no-untyped-call]
    assert frequencies
    assert all(torch.equal(back[name], buffer) for name, buffer in frequencies.items())
