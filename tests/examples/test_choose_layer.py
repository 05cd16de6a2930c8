"""The script that measures which layer of an LLM makes texts with one meaning find each other."""

from __future__ import annotations

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
from shared_models import mostly_slow
from tiny import tiny_llm, tiny_tokenizer, tiny_vision
from tiny_folders import save_tiny_llm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.data.captions.caption_groups import CaptionGroup
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.evaluation.tasks.retrieval import measure_caption_retrieval

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "scripts" / "choose_layer.py"
THINGS = ("dog", "apple", "table", "cat", "window", "car", "sea", "night", "mat", "sky")
OPTIONS = {"prompt": "llama-3", "max_text_length": 32}


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


def make_llm(family: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = tiny_tokenizer()
    return tiny_llm(family, vocabulary_size=len(tokenizer), num_layers=3), tokenizer


@pytest.mark.parametrize("family", mostly_slow(["llama", "gemma3_text"], {"llama"}))
def test_scores_are_those_of_models_that_were_built_with_each_layer(family: str) -> None:
    script = runpy.run_path(str(SCRIPT))
    records = make_records(("en", "de", "fr"))
    captions = {(record.lang, record.name): record.captions for record in records}
    own = script["list_pairs"](records, ["de"])
    translations = script["list_pairs"](records)
    assert [*own["de"].values()] == [captions["de", thing] for thing in THINGS]
    for lang in ("de", "fr"):
        expected = [(captions[lang, thing][0], captions["en", thing][0]) for thing in THINGS]
        assert [*translations[lang].values()] == expected
    found = [
        script["measure_layers"](make_llm(family), pairs, **OPTIONS)
        for pairs in (own, translations)
    ]
    for number in (1, 2, 3):
        config = BuildConfig(**OPTIONS, text_layers=number)  # type: ignore[arg-type]
        model, processor = join_towers(tiny_vision(), make_llm(family), config)
        encode = partial(encode_texts, model, processor, project=False)
        for pairs, scores in zip((own, translations), found, strict=True):
            built = [
                measure_caption_retrieval(
                    encode, [CaptionGroup(str(n), texts) for n, texts in of_lang.items()]
                )
                for of_lang in pairs.values()
            ]
            assert scores[number]["cra"]["value"] == pytest.approx(sum(built) / len(built))
    for scores in found:
        behind = [score["behind"]["value"] for score in scores.values()]
        assert min(behind) == 0 and len(behind) == 3


def test_the_script_names_the_layers_to_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "captions.jsonl"
    llm = save_tiny_llm(tmp_path / "llm")

    def run(num_captions: int) -> str:
        lines = [
            {
                "image": f"{r.name}.png",
                "captions": r.captions[:num_captions],
                "group_id": r.group_id,
            }
            for r in make_records()
        ]
        data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        arguments = [SCRIPT, llm, data, "--prompt", "llama-3", "--num-images", "8"]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    shown = run(2)
    assert "images by language: {'en': 8}" in shown and shown.count("CRA") == 2
    assert "that does not differ from the best: --text-layers " in shown
    with pytest.raises(SystemExit, match="Fewer than two images have a text in en and another"):
        run(1)
