"""Encoding many captions or images: as the processor and the model at inference would."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from shared_models import ROUNDING, shared_model
from tiny import draw_noise, tiny_model
from torch import nn

from modeling_llm2clip import LLM2CLIPTextModel, LLM2CLIPVisionModel
from modeling_llm2clip.encoding.encode import (
    TorchEncoder,
    encode_images,
    encode_texts,
    project_stored,
)
from modeling_llm2clip.encoding.tokenized_texts import TokenizedTexts

CAPTIONS = ["a dog", "two red apples on a wooden table by the window", "x"]


ENCODINGS: dict[str, Callable[[Any, Any], Any]] = {
    "texts": lambda model, processor: encode_texts(model, processor, CAPTIONS, project=False),
    "images": lambda model, processor: encode_images(model, processor, [draw_noise()]),
    "stored captions": lambda model, _: project_stored(model, torch.ones(1, 32), "text"),
    "stored images": lambda model, _: project_stored(model, torch.ones(1, 32), "image"),
    "batches of texts": lambda model, processor: next(
        TorchEncoder(model, processor).iterate_texts(
            TokenizedTexts(processor, CAPTIONS), [[0, 1, 2]], project=False
        )
    ),
    "batches of images": lambda model, processor: (
        next(
            TorchEncoder(model, processor).iterate_images([draw_noise()], [[0]], project=False)
        ).embeds
    ),
}


def test_a_model_in_training_mode_is_refused_and_left_as_it_is() -> None:
    model, processor = tiny_model()
    for part in ("", "text_model.layers.1", "vision_model", "text_adapter"):
        model.eval().get_submodule(part).train()
        modes = [module.training for module in model.modules()]
        named = re.escape(part) if part else "LLM2CLIPModel"
        for encode in ENCODINGS.values():
            with pytest.raises(ValueError, match=rf"in training mode .*{named}.* Call model\.eval"):
                encode(model, processor)
            assert modes == [module.training for module in model.modules()]
    model.eval()
    for encode in ENCODINGS.values():
        encode(model, processor)


def test_a_tower_in_training_mode_learns_nothing_from_what_it_is_given() -> None:
    model, processor = tiny_model("timm with batch norm")
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    with pytest.raises(ValueError, match="in training mode"):
        encode_images(model, processor, [draw_noise()])
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("tower", ["text_model", "vision_model"])
def test_embeddings_are_refused_if_another_thread_trains_the_model_meanwhile(tower: str) -> None:
    model, processor = tiny_model()
    switches_back = True

    def switch() -> None:
        model.train()
        if switches_back:
            model.eval()

    def switch_in_a_thread(*_: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(switch).result()

    model.get_submodule(tower).register_forward_hook(switch_in_a_thread)
    encode = ENCODINGS["texts" if tower == "text_model" else "images"]
    for switches_back in (True, False):
        with pytest.raises(ValueError, match="was switched to training mode while it was encoding"):
            encode(model, processor)
        assert model.training is not switches_back  # as the other thread left it


def test_threads_that_encode_do_not_disturb_each_other() -> None:
    model, processor = shared_model()
    wanted = encode_texts(model, processor, CAPTIONS)

    def encode(_: int) -> torch.Tensor:
        model.eval()  # as a server may do in each of its threads
        return encode_texts(model, processor, CAPTIONS)

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, wanted) for found in pool.map(encode, range(12)))
    assert not any(module.training for module in model.modules())


def test_embeddings_can_be_trained_on() -> None:
    for name in ("texts", "images", "stored captions"):
        embeds = ENCODINGS[name](*shared_model())
        assert not embeds.is_inference() and not embeds.requires_grad
        layer = nn.Linear(embeds.shape[1], 1)
        layer(embeds).sum().backward()
        assert layer.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    model, processor = shared_model()
    before = torch.get_default_dtype()
    for name in (name for name in ENCODINGS if "stored" not in name):
        expected = ENCODINGS[name](model, processor)
        torch.set_default_dtype(dtype)
        try:
            embeds = ENCODINGS[name](model, processor)
        finally:
            torch.set_default_dtype(before)
        assert embeds.dtype is torch.float32
        assert torch.equal(embeds, expected), name


def test_both_sides_are_those_of_the_forward_pass_and_have_unit_length() -> None:
    model, processor = shared_model()
    images = [draw_noise(seed=seed) for seed in range(3)]
    given = ["\x1fa dog", " two red apples\n\n", "dog " * 60]
    with torch.inference_mode():
        wanted = model(**processor(text=given, images=images))
    texts = encode_texts(model, processor, given)
    torch.testing.assert_close(texts, wanted.text_embeds, atol=ROUNDING, rtol=ROUNDING)
    found = encode_images(model, processor, images)
    torch.testing.assert_close(found, wanted.image_embeds, atol=ROUNDING, rtol=ROUNDING)
    for embeds in (texts, found):
        assert embeds.dtype == torch.float32
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))  # float32 rounding


def test_projected_equals_stored_and_projected_later_bit_for_bit() -> None:
    model, processor = shared_model()
    images = [draw_noise(seed=seed) for seed in range(3)]
    captions = project_stored(
        model, encode_texts(model, processor, CAPTIONS, project=False), "text"
    )
    assert torch.equal(encode_texts(model, processor, CAPTIONS), captions)
    vision = encode_images(model, processor, images, project=False)
    assert torch.equal(
        encode_images(model, processor, images), project_stored(model, vision, "image")
    )
    assert project_stored(model, vision[:0], "image").shape == (0, model.config.projection_dim)


def test_a_text_only_and_a_vision_only_model_encode_as_the_whole_one(tmp_path: Path) -> None:
    model, processor = shared_model()
    model.save_pretrained(tmp_path)
    images = [draw_noise(seed=seed) for seed in range(3)]
    text_only = LLM2CLIPTextModel.from_pretrained(tmp_path)
    texts = encode_texts(text_only, processor, CAPTIONS)
    assert torch.equal(texts, encode_texts(model, processor, CAPTIONS))
    vision_only = LLM2CLIPVisionModel.from_pretrained(tmp_path)
    embeds = encode_images(vision_only, processor, images)
    assert torch.equal(embeds, encode_images(model, processor, images))


def test_equal_inputs_are_encoded_once_and_get_the_same_bits(tmp_path: Path) -> None:
    model, processor = shared_model()
    seen: list[int] = []

    def note(rows: Sequence[int], embeds: torch.Tensor) -> None:
        assert len(rows) == len(embeds)
        seen.extend(rows)

    texts = ["a dog", "two cats", "a dog", " a dog\n"]
    embeds = encode_texts(model, processor, texts, on_batch=note)
    assert sorted(seen) == [0, 1]
    assert torch.equal(embeds[0], embeds[2]) and torch.equal(embeds[0], embeds[3])
    alone = encode_texts(model, processor, ["two cats"])[0]
    torch.testing.assert_close(embeds[1], alone, atol=ROUNDING, rtol=ROUNDING)
    seen.clear()
    for name in "ab":
        draw_noise(seed=ord(name)).save(tmp_path / f"{name}.png")
    a, b, image = tmp_path / "a.png", tmp_path / "b.png", draw_noise(seed=7)
    embeds = encode_images(model, processor, [a, image, b, a, image], batch_size=2, on_batch=note)
    assert seen == [0, 1, 2]
    assert torch.equal(embeds[0], embeds[3]) and torch.equal(embeds[1], embeds[4])
    assert not torch.equal(embeds[0], embeds[2])


def test_images_that_a_sequence_makes_anew_are_not_taken_for_each_other() -> None:
    """As a column of `datasets` does: an image is gone, and its `id` free, after each access."""

    class Column(Sequence[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, row: Any) -> Any:
            return draw_noise(seed=row)

    model, processor = shared_model()
    found = encode_images(model, processor, Column(), batch_size=1)
    wanted = encode_images(model, processor, [draw_noise(seed=n) for n in range(6)], batch_size=1)
    assert torch.equal(found, wanted)


def test_texts_have_the_same_embeddings_in_any_batch_and_order() -> None:
    model, processor = shared_model()
    texts = ["dog " * (1 + number % 20) + str(number) for number in range(40)]
    together = encode_texts(model, processor, texts)
    for budget in (1, 60, None):
        embeds = encode_texts(model, processor, texts[::-1], token_budget=budget)
        torch.testing.assert_close(embeds.flip(0), together, atol=ROUNDING, rtol=ROUNDING)


def test_images_have_the_same_embeddings_in_any_batch() -> None:
    model, processor = shared_model()
    images = [Image.new("RGB", (40, 40), (30 * number, 80, 10)) for number in range(5)]
    together = encode_images(model, processor, images)
    by_two = encode_images(model, processor, images, batch_size=2, num_workers=2)
    torch.testing.assert_close(together, by_two, atol=ROUNDING, rtol=ROUNDING)


def test_padding_is_at_most_a_tenth_of_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = shared_model()
    masks: list[torch.Tensor] = []
    pool = model.get_caption_embeds

    def note(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        masks.append(attention_mask)
        return pool(input_ids, attention_mask)

    monkeypatch.setattr(model, "get_caption_embeds", note, raising=False)
    texts = ["dog " * (1 + number % 20) + str(number) for number in range(200)]
    encode_texts(model, processor, texts, token_budget=512)
    computed = sum(mask.numel() for mask in masks)
    # One small batch may pad 64 tokens, so this is a law of a corpus.
    assert computed - sum(int(mask.sum()) for mask in masks) <= 0.1 * computed


def test_broken_embeddings_are_an_error_that_names_their_inputs() -> None:
    model, processor = tiny_model()
    with torch.no_grad():
        next(model.vision_model.parameters()).fill_(float("nan"))
        model.text_model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinity for .* number \d \('"):
        encode_texts(model, processor, CAPTIONS)
    with pytest.raises(ValueError, match=r"2 of 2 inputs: number 1 .* number 2 "):
        encode_images(model, processor, [draw_noise(), draw_noise()])
    with torch.no_grad():
        model.visual_projection.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"1 of 1 inputs: number 1\. Run it in float32"):
        project_stored(model, torch.ones(1, model.visual_projection.in_features), "image")


def test_any_iterable_of_texts_is_taken_and_one_string_refused() -> None:
    model, processor = shared_model()
    wanted = encode_texts(model, processor, CAPTIONS)
    found = encode_texts(model, processor, (caption for caption in CAPTIONS))
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match=r"Got one string \('a dog'\)\. Pass a list of captions"):
        encode_texts(model, processor, "a dog")
    with pytest.raises(ValueError, match=r"text must be .* not NoneType"):
        encode_texts(model, processor, None)  # type: ignore[arg-type]
    for texts, message in (([], "the list is empty"), (["a", " "], "number 2 is blank")):
        with pytest.raises(ValueError, match=message):
            encode_texts(model, processor, texts)


def test_a_budget_of_no_token_is_refused() -> None:
    for budget in (0, -5):
        with pytest.raises(ValueError, match=f"token_budget={budget} must be positive"):
            encode_texts(*shared_model(), CAPTIONS, token_budget=budget)


@pytest.mark.parametrize(
    ("images", "settings", "error"),
    [
        ([], {}, r"images must be .* not \[\]"),
        ("a.png", {}, "images must be .* not 'a.png'"),
        (draw_noise(), {}, "images must be .* not <PIL.Image.Image .*"),
        (iter([draw_noise()]), {}, "images must be .* not <list_iterator .*"),
        ([draw_noise()], {"batch_size": 0}, "batch_size=0"),
        ([draw_noise()], {"batch_size": -1}, "batch_size=-1"),
        ([draw_noise()], {"num_workers": 0}, "num_workers=0"),
    ],
)
def test_images_and_settings_of_no_meaning_are_refused(
    images: Any, settings: Any, error: str
) -> None:
    model, processor = shared_model()
    with pytest.raises(ValueError, match=error):
        encode_images(model, processor, images, **settings, project=False)
