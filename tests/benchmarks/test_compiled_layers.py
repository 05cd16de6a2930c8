"""Compiled layers give the embeddings of plain ones, and are compiled once for all lengths."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from shared_models import ROUNDING, shared_model
from tiny import tiny_model
from torch._dynamo.utils import counters

from benchmarks.speed.compiled_layers import compiled_layers
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.packing_llm2clip import run_packed

pytestmark = pytest.mark.slow

_CAPTIONS = ["a dog " * count for count in (1, 2, 2, 3, 5, 8)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()
    counters.clear()


# Plain layers; of two kinds, with norms behind them; with biases; with joined projections.
@pytest.mark.parametrize("llm", ["llama", "gemma3_text", "phi", "phi3"])
def test_compiled_equals_plain(llm: str) -> None:
    model, processor = shared_model("clip", llm)
    wanted = encode_texts(model, processor, _CAPTIONS, project=False)
    with compiled_layers(model, backend="aot_eager"):
        found = encode_texts(model, processor, _CAPTIONS, project=False)
    torch.testing.assert_close(found, wanted, rtol=ROUNDING, atol=ROUNDING)
    assert not any("forward" in vars(module) for module in model.modules())


def test_other_lengths_compile_nothing_anew() -> None:
    model, processor = shared_model()
    with compiled_layers(model, backend="aot_eager"):
        for some in (_CAPTIONS[:4], _CAPTIONS[:1]):  # a pack, and a text alone: a graph each
            encode_texts(model, processor, some, project=False)
        before = counters["stats"]["unique_graphs"]
        assert before > 0
        longer = [caption + "and a cat" for caption in _CAPTIONS]
        for some in (_CAPTIONS[1:], _CAPTIONS[4:], _CAPTIONS[4:5], longer):
            encode_texts(model, processor, some, project=False)
    assert counters["stats"]["unique_graphs"] == before


def test_a_layer_is_one_graph() -> None:
    model, _ = shared_model()
    # Of packs only: a text alone in its batch runs without one, which is a graph of its own.
    packs = [[torch.arange(20, 20 + length) for length in lengths] for lengths in ((9, 5), (7, 3))]
    with compiled_layers(model, backend="aot_eager"), torch.inference_mode():
        for pack in packs:
            run_packed(model.text_model, pack)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_thread_checks_and_waits_while_another_one_compiles() -> None:
    model, processor = shared_model()
    wanted = encode_texts(model, processor, _CAPTIONS, project=False)
    compiles, goes_on = Event(), Event()

    def compile_slowly(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        compiles.set()
        assert goes_on.wait(60)
        return graph

    with compiled_layers(model, backend=compile_slowly), ThreadPoolExecutor(2) as pool:
        first = pool.submit(encode_texts, model, processor, _CAPTIONS, project=False)
        assert compiles.wait(60)
        with pytest.raises(ValueError, match="prompt"):
            model.get_caption_embeds(torch.arange(20, 50)[None])
        second = pool.submit(encode_texts, model, processor, _CAPTIONS, project=False)
        goes_on.set()
        for encoding in (first, second):
            torch.testing.assert_close(encoding.result(), wanted, rtol=ROUNDING, atol=ROUNDING)


def test_gradients_pass_through_compiled_layers_of_packed_texts() -> None:
    model, processor = tiny_model()
    model.packs_in_training = True
    inputs = processor(text=_CAPTIONS)
    weights = [p for p in model.text_model.parameters() if p.requires_grad]

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(model.get_caption_embeds(**inputs).square().sum(), weights)

    wanted = gradients()
    with compiled_layers(model, backend="aot_eager"):
        found = gradients()
    torch.testing.assert_close(found, wanted, rtol=ROUNDING, atol=ROUNDING)


def test_compiled_layers_leave_the_check_of_ids() -> None:
    model, _ = shared_model()
    ids = torch.arange(20, 50)[None]  # without the prompt
    with compiled_layers(model, backend="eager"), pytest.raises(ValueError, match="prompt"):
        model.get_caption_embeds(ids)
