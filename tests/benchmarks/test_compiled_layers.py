"""Compiled layers give the embeddings of plain ones, and are compiled once for all lengths."""

from __future__ import annotations

import pytest
import torch
from shared_models import ROUNDING, shared_model
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
