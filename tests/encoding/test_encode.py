"""Encoding many captions or images: as the processor and the model at inference would."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from shared_models import ROUNDING, shared_model
from tiny import draw_noise, tiny_model
from torch import nn

from modeling_llm2clip.encoding.eval_mode import eval_mode
from modeling_llm2clip.encoding.image_encoding import encode_images
from modeling_llm2clip.encoding.precision_probe import pick_probe_captions
from modeling_llm2clip.encoding.text_encoding import encode_captions

CAPTIONS = ["a dog", "two red apples on a wooden table by the window", "x"]


def test_a_model_in_training_encodes_as_at_inference_and_goes_on_training() -> None:
    model, processor = tiny_model()
    model.eval()
    wanted = encode_captions(model, processor, CAPTIONS).caption_embeds
    model.text_model.config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    model.text_projection.eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(encode_captions(model, processor, CAPTIONS).caption_embeds, wanted)
    assert modes == [module.training for module in model.modules()]


def test_a_tower_in_training_learns_nothing_from_what_it_encodes() -> None:
    model, processor = tiny_model("timm with batch norm")
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    images = [draw_noise(seed=seed) for seed in range(3)]
    model.eval()
    wanted = encode_images(model, processor, images)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    assert torch.equal(encode_images(model, processor, images), wanted)
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
from modeling_llm2clip.encoding.memory import raise_malloc_thresholds
def count():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(2**24).zero_()  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = count()
print(int(raise_malloc_thresholds()), before, count())
"""


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


def test_captions_are_encoded_as_the_processor_reads_them() -> None:
    model, processor = shared_model()
    captions = ["\x1fa dog", " two red apples\n\n", "dog " * 60]
    with torch.inference_mode():
        wanted = model.get_caption_embeds(**processor(text=captions)).float()
    found = encode_captions(model, processor, captions)
    torch.testing.assert_close(found.caption_embeds, wanted, atol=ROUNDING, rtol=ROUNDING)
    assert found.num_truncated == 1


def test_any_iterable_of_captions_is_taken_and_one_string_refused() -> None:
    model, processor = shared_model()
    wanted = encode_captions(model, processor, CAPTIONS).caption_embeds
    found = encode_captions(model, processor, (caption for caption in CAPTIONS)).caption_embeds
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match=r"Got one string \('a dog'\); give a list of captions"):
        encode_captions(model, processor, "a dog")
    with pytest.raises(ValueError, match="text is NoneType"):
        encode_captions(model, processor, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"token_budget": 0}, "token_budget=0 holds no token"),
        ({"token_budget": -5}, "token_budget=-5 holds no token"),
        ({"precision": torch.bfloat16}, r"precision=torch.bfloat16; give LowerPrecision\("),
    ],
)
def test_settings_of_no_meaning_are_refused(settings: Any, error: str) -> None:
    model, processor = shared_model()
    with pytest.raises(ValueError, match=error):
        encode_captions(model, processor, CAPTIONS, **settings)


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
        encode_images(model, processor, images, **settings)


def test_a_probe_needs_the_shortest_and_the_longest_caption() -> None:
    assert pick_probe_captions([*CAPTIONS, "a cat"], count=2) == ["x", CAPTIONS[1]]
    with pytest.raises(ValueError, match="count=1"):
        pick_probe_captions(CAPTIONS, count=1)
