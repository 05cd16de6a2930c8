"""Which layer of an LLM makes texts of the same meaning find each other."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from shared_models import mostly_slow
from tiny import tiny_llm, tiny_tokenizer, tiny_vision
from tiny_folders import save_tiny_llm, save_tiny_vision
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.building.choose_layer import choose_layer
from modeling_llm2clip.configs.build_config import BuildConfig, ChooseLayerConfig
from modeling_llm2clip.data.captions.caption_groups import CaptionGroup
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.evaluation.tasks.retrieval import measure_caption_retrieval

THINGS = ("dog", "apple", "table", "cat", "window", "car", "sea", "night", "mat", "sky")


def make_records(languages: tuple[str, ...] = ("en",)) -> list[CaptionedImage]:
    """Two captions of each thing, of which an untrained LLM matches some by their words."""
    return [
        CaptionedImage(
            None, thing, thing, lang=lang,
            captions=(f"{lang}: a {thing} by the {THINGS[n - 1]}", f"the red {thing} in {lang}"),
        )
        for lang in languages
        for n, thing in enumerate(THINGS)
    ]  # fmt: skip


def plant(llm: PreTrainedModel) -> None:
    """Give the last token the letters of a text in layer 2, and many times its digits in layer 3.

    A token is a direction of unit scale, of letters in the first half of the dimensions, of digits
    in the second. Each layer attends to all tokens alike, and layers 1 and 4 add nothing.
    """
    generator = torch.Generator().manual_seed(0)
    tokenizer, half = tiny_tokenizer(begins=False), llm.config.hidden_size // 2
    for parameter in llm.layers.parameters():
        if parameter.ndim > 1:
            parameter.data.zero_()
    table = llm.embed_tokens.weight.data.zero_()
    for token, row in tokenizer.get_vocab().items():
        directions = torch.randn(half, generator=generator)
        part = slice(half, None) if token.isdigit() else slice(half)
        table[row, part] = directions / directions.norm() * llm.config.hidden_size**0.5
    head = llm.config.head_dim
    for layer, part, strength in ((1, 0, 5.0), (2, half, 100.0)):
        attention = llm.layers[layer].self_attn
        attention.v_proj.weight.data[:, part : part + half] = torch.eye(half)
        for number in (0, 1):  # the first of two heads that share keys and values
            place = slice(part + number * head, part + (number + 1) * head)
            own = slice(2 * number * head, (2 * number + 1) * head)
            attention.o_proj.weight.data[place, own] = strength * torch.eye(head)


def test_the_layer_that_makes_pairs_equal_is_found() -> None:
    llm = tiny_llm(vocabulary_size=len(tiny_tokenizer(begins=False)), num_layers=4)
    plant(llm)
    records = []
    for number, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
        captions = f"{letter}{number % 10}{number % 7}#", f"{letter}{number % 3}{number % 9}#"
        records.append(CaptionedImage(None, letter, letter, captions))
    config = ChooseLayerConfig(prompt="none", bidirectional=False, text_pooling="last_token")
    choice = choose_layer((llm, tiny_tokenizer(begins=False)), records, config)
    scores = [score.cra["value"] for score in choice.scores]
    assert scores[:2] == [0, 1]  # at first, all last tokens are equal
    assert max(scores[2:]) < 0.3
    assert (choice.best.layer, choice.lowest_alike.layer) == (2, 2)
    assert [score.is_alike for score in choice.scores] == [False, True, False, False]
    assert [score.compute for score in choice.scores] == [0.25, 0.5, 0.75, 1]


def measure_pairs(encode: Callable[[list[str]], Tensor], pairs: list[tuple[str, ...]]) -> float:
    groups = [CaptionGroup(str(row), pair) for row, pair in enumerate(pairs)]
    return measure_caption_retrieval(encode, groups)


@pytest.mark.parametrize("family", mostly_slow(["llama", "gemma3_text"], {"llama"}))
def test_scores_are_those_of_models_that_were_built_with_each_layer(family: str) -> None:
    def make_llm() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        tokenizer = tiny_tokenizer()
        return tiny_llm(family, vocabulary_size=len(tokenizer), num_layers=3), tokenizer

    records, shared = make_records(("en", "de", "fr")), {"prompt": "llama-3", "max_text_length": 32}
    alone = choose_layer(make_llm(), records, ChooseLayerConfig(**shared, languages=("de",)))
    across = choose_layer(make_llm(), records, ChooseLayerConfig(**shared))
    assert (alone.num_pairs, across.num_pairs) == ({"de": 10}, {"de": 10, "fr": 10})
    captions = {(record.lang, record.name): record.captions for record in records}
    for number in (1, 2, 3):
        config = BuildConfig(**shared, text_layers=number)
        model, processor = join_towers(tiny_vision(), make_llm(), config)
        encode = partial(encode_texts, model, processor, project=False)
        pairs = [captions["de", thing] for thing in THINGS]
        assert alone.scores[number - 1].cra["value"] == measure_pairs(encode, pairs)
        translations = [
            measure_pairs(
                encode, [(captions[lang, thing][0], captions["en", thing][0]) for thing in THINGS]
            )
            for lang in ("de", "fr")
        ]
        assert across.scores[number - 1].cra["value"] == pytest.approx(sum(translations) / 2)


def test_the_command_prints_how_to_build_with_the_best_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"image": f"{one.name}.png", "captions": one.captions, "group_id": one.group_id}
        for one in make_records()
    ]
    data = tmp_path / "captions.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    save_tiny_llm(tmp_path / "llm")
    save_tiny_vision(tmp_path / "vision")
    llm, scores = str(tmp_path / "llm"), tmp_path / "layers.json"
    options = ["--prompt", "llama-3", "--no-bidirectional", "--max-text-length", "32"]
    assert main(["choose-layer", llm, str(data), "--output", str(scores), *options]) == 0
    written = json.loads(scores.read_text(encoding="utf-8"))
    assert written["num_pairs"] == {"en": len(THINGS)} and len(written["scores"]) == 2
    *shown, following = capsys.readouterr().out.splitlines()
    assert "These texts chose the best layer, so expect a lower score of it on others." in shown
    words = shlex.split(following.removeprefix("Next, with the same options: llm2clip "))
    places = {"VISION_MODEL": str(tmp_path / "vision"), "OUTPUT": str(tmp_path / "built")}
    assert main([*(places.get(word, word) for word in words), *options]) == 0
    built = AutoConfig.from_pretrained(tmp_path / "built")
    assert built.text_config.num_hidden_layers == written["best"]
    assert (built.bidirectional, built.max_text_length) == (False, 32)


def test_images_with_one_caption_are_refused() -> None:
    records = [
        CaptionedImage(image=None, name=one, group_id=one, captions=(one,)) for one in THINGS
    ]
    with pytest.raises(ValueError, match="0 images of 10 have a text in en and another one in en"):
        choose_layer((tiny_llm(), tiny_tokenizer()), records, ChooseLayerConfig(prompt="none"))
