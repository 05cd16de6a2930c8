"""A lower precision is taken only where it is faster and leaves every embedding where it was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared_models import CAPTIONS, shared_model
from tiny import LLM_FAMILIES

from modeling_llm2clip.encoding import precision_probe as probe
from modeling_llm2clip.encoding.layers import list_text_layers, wrapped_forwards
from modeling_llm2clip.encoding.precision import LoweredLayers, LowerPrecision
from modeling_llm2clip.encoding.precision_probe import (
    PrecisionTrial,
    choose_precision,
    find_true_layers,
    pick_probe_captions,
    probe_precisions,
)
from modeling_llm2clip.encoding.recorded_precision import (
    PRECISION_FILE,
    read_precision,
    write_precision,
)
from modeling_llm2clip.encoding.text_encoding import encode_captions
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor

BFLOAT16 = LowerPrecision(torch.bfloat16)
FLOAT16 = LowerPrecision(torch.float16)


def test_the_default_is_the_models_own_precision() -> None:
    model, processor = shared_model()
    own = encode_captions(model, processor, CAPTIONS).caption_embeds
    lowered = encode_captions(model, processor, CAPTIONS, precision=BFLOAT16).caption_embeds
    assert torch.equal(own, encode_captions(model, processor, CAPTIONS).caption_embeds)
    assert not torch.equal(own, lowered)
    assert own.dtype == lowered.dtype == torch.float32


@pytest.mark.parametrize("llm", LLM_FAMILIES)
@pytest.mark.parametrize("first_layer", [0, 1])
def test_only_the_later_layers_compute_in_it(llm: str, first_layer: int) -> None:
    model, processor = shared_model("clip", llm)
    found = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: found.update({name: output}))
        for name, module in model.text_model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    encode_captions(
        model, processor, CAPTIONS, precision=LowerPrecision(torch.bfloat16, first_layer)
    )
    for hook in hooks:
        hook.remove()
    dtypes = {int(name.split("layers.")[1].split(".")[0]): found[name].dtype for name in found}
    assert dtypes == {
        layer: torch.bfloat16 if layer >= first_layer else torch.float32 for layer in range(2)
    }


def test_the_model_is_as_before_afterwards_even_after_an_error() -> None:
    model, processor = shared_model()
    own = encode_captions(model, processor, CAPTIONS).caption_embeds
    weights = dict(model.named_parameters())
    with pytest.raises(KeyError), LoweredLayers(model, BFLOAT16).in_effect():
        raise KeyError
    assert torch.equal(own, encode_captions(model, processor, CAPTIONS).caption_embeds)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(weight is weights[name] for name, weight in model.named_parameters())


@pytest.mark.parametrize("llm", LLM_FAMILIES)
def test_weights_rounded_once_are_those_that_autocast_rounds_every_time(llm: str) -> None:
    model, processor = shared_model("clip", llm)
    found = encode_captions(model, processor, CAPTIONS, precision=BFLOAT16).caption_embeds
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)  # as a decorator
    with wrapped_forwards(model, list_text_layers(model), autocast):
        wanted = encode_captions(model, processor, CAPTIONS).caption_embeds
    assert torch.equal(found, wanted)


def test_threads_of_every_precision_disturb_each_other_nowhere() -> None:
    model, processor = shared_model()

    def encode(precision: LowerPrecision | None) -> torch.Tensor:
        return encode_captions(model, processor, CAPTIONS, precision=precision).caption_embeds

    wanted = {precision: encode(precision) for precision in (None, BFLOAT16, FLOAT16)}
    turns = [*wanted] * 20
    with ThreadPoolExecutor(4) as pool:
        for precision, found in zip(turns, pool.map(encode, turns), strict=True):
            assert torch.equal(found, wanted[precision])
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_precision_that_would_change_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float32 is no lower precision: give bfloat16"):
        LowerPrecision(torch.float32)
    with pytest.raises(ValueError, match="counts from 0"):
        LowerPrecision(torch.bfloat16, -1)
    with pytest.raises(ValueError, match="first_layer=2, and the LLM has 2 layers"):
        encode_captions(
            *shared_model(), CAPTIONS, precision=LowerPrecision(torch.bfloat16, first_layer=2)
        )


@pytest.mark.parametrize(
    ("bar", "first_layer"), [(0.5, 0), (0.99999, 1)], ids=["loose: all", "tight: the last alone"]
)
def test_the_probe_lowers_as_many_layers_as_stay_true(
    bar: float, first_layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modeling_llm2clip.encoding.precision_probe.LEAST_COSINE_OF_PROBE", bar)
    monkeypatch.setattr("modeling_llm2clip.encoding.precision_probe.LEAST_SPEEDUP", 0)
    trials = probe_precisions(*shared_model(), CAPTIONS)
    assert [trial.precision.dtype for trial in trials] == [torch.bfloat16, torch.float16]
    assert trials[0].precision.first_layer == first_layer
    # bfloat16 keeps 8 bits: embeddings move, but not out of recognition, in two layers.
    assert all(trial.speedup > 0 and 0.9 < trial.min_cosine < 1 for trial in trials)


def load(folder: Path) -> tuple[LLM2CLIPModel, LLM2CLIPProcessor]:
    return LLM2CLIPModel.from_pretrained(folder), LLM2CLIPProcessor.from_pretrained(folder)


def test_what_is_chosen_stays_within_the_bar(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LEAST_SPEEDUP", 0)
    monkeypatch.setattr(probe, "LEAST_COSINE_OF_PROBE", 0.99)
    model, processor = load(copy)
    chosen = choose_precision(model, processor, CAPTIONS)
    assert chosen is not None
    own = encode_captions(model, processor, CAPTIONS).caption_embeds.double()
    found = encode_captions(model, processor, CAPTIONS, precision=chosen).caption_embeds.double()
    assert torch.cosine_similarity(own, found).min() >= 0.99


@pytest.mark.parametrize("least_speedup", [0.0, 1e9], ids=["one pays", "none pays"])
def test_a_choice_is_made_once_and_read_ever_after(
    least_speedup: float, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the clock of a later run would say."""
    monkeypatch.setattr(probe, "LEAST_SPEEDUP", least_speedup)
    monkeypatch.setattr(probe, "LEAST_COSINE_OF_PROBE", 0.99)
    assert read_precision(copy) is None
    chosen = choose_precision(*load(copy), CAPTIONS)
    assert (chosen is None) == bool(least_speedup)
    monkeypatch.setattr(probe, "LEAST_SPEEDUP", 1e9 - least_speedup)
    monkeypatch.setattr(probe, "_encode_timed", lambda *_: pytest.fail("measured again"))
    assert choose_precision(*load(copy), CAPTIONS) == chosen == read_precision(copy)


def test_a_choice_needs_a_folder_to_be_recorded_in() -> None:
    with pytest.raises(ValueError, match="no folder that the choice"):
        choose_precision(*shared_model(), CAPTIONS)


def test_a_choice_for_another_model_or_a_broken_one_is_refused(good: Path, copy: Path) -> None:
    write_precision(copy, FLOAT16, {})
    assert read_precision(copy) == FLOAT16
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.startswith("text_model."))
    save_file({**weights, name: weights[name] + 1}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"another weights\. Delete it"):
        read_precision(copy)
    (copy / PRECISION_FILE).write_text('{"chosen": {"dtype": "float32", "first_layer": 0}}')
    with pytest.raises(ValueError, match=r"cannot be read.*Delete it"):
        read_precision(copy)
    assert not (good / PRECISION_FILE).exists()


@pytest.mark.parametrize(("bar", "wanted"), [(0.5, BFLOAT16), (1.0, None)])
def test_which_layers_are_true_asks_no_clock(
    bar: float, wanted: LowerPrecision | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "LEAST_COSINE_OF_PROBE", bar)
    monkeypatch.setattr(probe, "_encode_timed", lambda *_: pytest.fail("a clock was asked"))
    assert find_true_layers(*shared_model(), CAPTIONS, torch.bfloat16) == wanted


@pytest.mark.parametrize(
    ("speedup", "min_cosine", "pays"),
    [(2.0, 0.9999, True), (1.05, 1.0, False), (3.0, 0.9994, False), (3.0, float("nan"), False)],
)
def test_only_faster_and_true_pays(speedup: float, min_cosine: float, pays: bool) -> None:
    assert PrecisionTrial(BFLOAT16, speedup, min_cosine).pays is pays


def test_probe_captions_span_all_lengths() -> None:
    captions = ["x" * n for n in range(1, 101)] * 2
    picked = pick_probe_captions(captions, count=5)
    assert [len(caption) for caption in picked] == [1, 26, 51, 75, 100]
    assert pick_probe_captions(["b", "aa", "b"]) == ["b", "aa"]
