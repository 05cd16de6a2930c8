"""Encoding many captions or images: as the processor and the model at inference would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from shared_models import ROUNDING, shared_model
from tiny import draw_noise, tiny_model
from torch import nn

from modeling_llm2clip import LLM2CLIPTextModel, LLM2CLIPVisionModel
from modeling_llm2clip.encoding import batches
from modeling_llm2clip.encoding.batches import measure_texts, prepare_images
from modeling_llm2clip.encoding.encode import (
    encode_images,
    encode_texts,
    project_captions,
    project_images,
)
from modeling_llm2clip.encoding.eval_mode import eval_mode

CAPTIONS = ["a dog", "two red apples on a wooden table by the window", "x"]


def test_a_model_in_training_encodes_as_at_inference_and_goes_on_training() -> None:
    model, processor = tiny_model()
    model.eval()
    wanted = encode_texts(model, processor, CAPTIONS, project=False)
    model.text_model.config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    model.text_projection.eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(encode_texts(model, processor, CAPTIONS, project=False), wanted)
    assert modes == [module.training for module in model.modules()]


def test_a_tower_in_training_learns_nothing_from_what_it_encodes() -> None:
    model, processor = tiny_model("timm with batch norm")
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    images = [draw_noise(seed=seed) for seed in range(3)]
    model.eval()
    wanted = encode_images(model, processor, images, project=False)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    assert torch.equal(encode_images(model, processor, images, project=False), wanted)
    assert model.training
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_of_two_threads_the_last_one_gives_the_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2).eval())
    with ExitStack() as first:
        first.enter_context(eval_mode(model))
        with eval_mode(model):  # another thread's, which ends before the first one's
            pass
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]
    other = eval_mode(model)
    with eval_mode(model):
        other.__enter__()
    assert not model.training  # now the first one has ended first
    other.__exit__(None, None, None)
    assert model.training


ERRORS = """
import resource, torch
from modeling_llm2clip.encoding.encode import raise_malloc_thresholds
def count():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(2**24).zero_()  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = count()
print(int(raise_malloc_thresholds()), before, count())
"""


@pytest.mark.slow
def test_large_blocks_are_handed_out_again_without_new_pages() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", ERRORS]

    def run(**changes: str) -> list[int]:
        done = subprocess.run(
            command, env={**environment, **changes}, capture_output=True, text=True, check=True
        )
        return [int(word) for word in done.stdout.split()]

    is_kept, before, after = run()
    if not is_kept:
        pytest.skip("the C library is not glibc")
    # At most one block's pages come anew, of ten before; huge pages may make both few.
    assert after <= before / 5 + 1000
    assert run(MALLOC_ARENA_MAX="1")[0] == 0  # what the user has set is left alone


def test_texts_are_encoded_as_the_processor_reads_them() -> None:
    model, processor = shared_model()
    texts = ["\x1fa dog", " two red apples\n\n", "dog " * 60]
    with torch.inference_mode():
        wanted = model.get_caption_embeds(**processor(text=texts)).float()
    found = encode_texts(model, processor, texts, project=False)
    torch.testing.assert_close(found, wanted, atol=ROUNDING, rtol=ROUNDING)


def test_both_sides_are_those_of_the_forward_pass_and_have_unit_length() -> None:
    model, processor = shared_model()
    images = [draw_noise(seed=seed) for seed in range(3)]
    with torch.inference_mode():
        wanted = model(**processor(text=CAPTIONS, images=images))
    texts = encode_texts(model, processor, CAPTIONS)
    torch.testing.assert_close(texts, wanted.text_embeds, atol=ROUNDING, rtol=ROUNDING)
    found = encode_images(model, processor, images)
    torch.testing.assert_close(found, wanted.image_embeds, atol=ROUNDING, rtol=ROUNDING)
    for embeds in (texts, found):
        assert embeds.dtype == torch.float32
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))  # float32 rounding


def test_projected_equals_stored_and_projected_later_bit_for_bit() -> None:
    model, processor = shared_model()
    images = [draw_noise(seed=seed) for seed in range(3)]
    captions = encode_texts(model, processor, CAPTIONS, project=False)
    assert torch.equal(encode_texts(model, processor, CAPTIONS), project_captions(model, captions))
    vision = encode_images(model, processor, images, project=False)
    assert torch.equal(encode_images(model, processor, images), project_images(model, vision))
    assert project_images(model, vision[:0]).shape == (0, model.config.projection_dim)


def test_a_text_only_and_a_vision_only_model_encode_as_the_whole_one(tmp_path: Path) -> None:
    model, processor = shared_model()
    model.save_pretrained(tmp_path)
    text_only = LLM2CLIPTextModel.from_pretrained(tmp_path)
    vision_only = LLM2CLIPVisionModel.from_pretrained(tmp_path)
    images = [draw_noise(seed=seed) for seed in range(3)]
    assert torch.equal(
        encode_texts(text_only, processor, CAPTIONS), encode_texts(model, processor, CAPTIONS)
    )
    assert torch.equal(
        encode_images(vision_only, processor, images), encode_images(model, processor, images)
    )


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


@pytest.mark.parametrize("budget", [1, 60, None])
def test_texts_have_the_same_embeddings_in_any_batch_and_order(budget: int | None) -> None:
    model, processor = shared_model()
    texts = ["dog " * (1 + number % 20) + str(number) for number in range(40)]
    together = encode_texts(model, processor, texts)
    found = encode_texts(model, processor, texts[::-1], token_budget=budget)
    torch.testing.assert_close(found.flip(0), together, atol=ROUNDING, rtol=ROUNDING)


def test_images_have_the_same_embeddings_in_any_batch() -> None:
    model, processor = shared_model()
    images = [Image.new("RGB", (40, 40), (30 * number, 80, 10)) for number in range(5)]
    together = encode_images(model, processor, images)
    by_two = encode_images(model, processor, images, batch_size=2, num_workers=2)
    torch.testing.assert_close(together, by_two, atol=ROUNDING, rtol=ROUNDING)


def test_large_images_are_decoded_when_the_processor_is_done_with_those_before_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor = shared_model()[1]
    paths = [Image.new("RGB", (40, 30), (40 * number, 90, 200)) for number in range(6)]
    together = prepare_images(processor, paths)
    monkeypatch.setattr(batches, "_PIXELS_AT_ONCE", 2 * 40 * 30)
    waiting: list[int] = []
    most = 0

    def prepare(images: list[Image.Image]) -> dict[str, torch.Tensor]:
        nonlocal most
        most = max(most, len(waiting))
        waiting.clear()
        return dict(processor(images=images))

    def decode() -> Iterator[Image.Image]:
        for path in paths:
            waiting.append(1)
            yield path

    found = prepare_images(prepare, decode())  # type: ignore[arg-type]
    assert most == 3 and found.keys() == together.keys()
    assert all(torch.equal(found[name], together[name]) for name in found)
    assert prepare_images(processor, []) == {}


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


def test_lengths_are_counted_as_the_model_reads_the_texts() -> None:
    _, processor = shared_model()
    texts = ["a dog", "dog " * 100, "two red apples"]
    lengths, is_truncated = measure_texts(processor, texts)
    assert lengths.tolist() == processor(text=texts)["attention_mask"].sum(dim=1).tolist()
    assert is_truncated.tolist() == [False, True, False]


def test_broken_embeddings_are_an_error_that_names_their_inputs() -> None:
    model, processor = tiny_model()
    with torch.no_grad():
        next(model.vision_model.parameters()).fill_(float("nan"))
        model.text_model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinity for .* number \d \('"):
        encode_texts(model, processor, CAPTIONS)
    with pytest.raises(ValueError, match=r"2 of 2 inputs: number 0 .* number 1 "):
        encode_images(model, processor, [draw_noise(), draw_noise()])
    with torch.no_grad():
        model.visual_projection.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"1 of 1 inputs: number 0\. Run it in float32"):
        project_images(model, torch.ones(1, model.visual_projection.in_features))


def test_any_iterable_of_texts_is_taken_and_one_string_refused() -> None:
    model, processor = shared_model()
    wanted = encode_texts(model, processor, CAPTIONS)
    found = encode_texts(model, processor, (caption for caption in CAPTIONS))
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match=r"Got one string \('a dog'\); give a list of captions"):
        encode_texts(model, processor, "a dog")
    with pytest.raises(ValueError, match="text is NoneType"):
        encode_texts(model, processor, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [0, -5])
def test_a_budget_of_no_token_is_refused(budget: int) -> None:
    model, processor = shared_model()
    with pytest.raises(ValueError, match=f"token_budget={budget} holds no token"):
        encode_texts(model, processor, CAPTIONS, token_budget=budget)


@pytest.mark.parametrize(
    ("images", "settings", "error"),
    [
        ([], {}, r"Got \[\] for images"),
        ("a.png", {}, "Got 'a.png' for images"),
        (draw_noise(), {}, "Got <PIL.Image.Image .* for images"),
        (iter([draw_noise()]), {}, "Got <list_iterator .* for images"),
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
