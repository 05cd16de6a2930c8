"""A model says whether it was trained, and an untrained one is not taken for a trained one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from converting import convert_family
from huggingface_hub import ModelCard
from shared_models import CAPTIONS, shared_batch
from tiny import draw_noise, tiny_llm, tiny_model, tiny_tokenizer, tiny_vision

from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.configs.evaluation_config import EncoderConfig
from modeling_llm2clip.configs.export_config import ExportConfig
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.evaluation.encoders.transformers_models import LLM2CLIPEncoder
from modeling_llm2clip.model_folders.model_card import CardData
from modeling_llm2clip.model_folders.model_loading import find_untrained_parts, require_trained
from modeling_llm2clip.model_folders.model_writing import save_model, save_trained_model
from modeling_llm2clip.publishing.export_model import export_model
from modeling_llm2clip.publishing.push_to_hub import check_publishable

REMEDY = r"llm2clip align.*model\.config\.projections_trained = True; model\.save_pretrained"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("untrained") / "built"
    folder = save_model(*tiny_model(trained=False), place, card=CardData(license="mit"))
    assert read_state(folder) == (False, False)
    return folder


def read_state(folder: Path) -> tuple[bool, bool]:
    config = LLM2CLIPConfig.from_pretrained(folder)
    return config.text_adapter_trained, config.projections_trained


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_of_training_makes_a_model_trained_and_nothing_else_does(
    compiled: bool, tmp_path: Path
) -> None:
    arguments = BuildConfig(prompt="llama-3", max_text_length=32)
    llm = tiny_llm(vocabulary_size=len(tiny_tokenizer())), tiny_tokenizer()
    model, _ = join_towers(tiny_vision(), llm, arguments)
    assert find_untrained_parts(model.config) == ("text adapter", "projections")
    batch = {**shared_batch(), "return_loss": True}
    run = torch.compile(model, backend="eager") if compiled else model

    def state() -> tuple[bool, bool]:
        return model.config.text_adapter_trained, model.config.projections_trained

    model.eval()
    run(**batch)
    model.train()
    with torch.no_grad():
        run(**batch)
    run(**{**batch, "return_loss": False})
    assert state() == (False, False)
    run(**batch).loss.backward()
    assert state() == (True, True)
    model.save_pretrained(tmp_path)
    require_trained(LLM2CLIPModel.from_pretrained(tmp_path), purpose="search")


def test_an_index_refuses_an_untrained_model_by_name_before_its_weights_are_read(
    untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_noise().save(tmp_path / "one.png")
    without_weights = tmp_path / "model"
    shutil.copytree(untrained, without_weights, ignore=shutil.ignore_patterns("model*"))
    assert main(["index", str(without_weights), str(tmp_path), str(tmp_path / "index")]) == 2
    found = capsys.readouterr().err
    assert (
        f"{without_weights} is refused for" in found and "It is untrained: random weights" in found
    )
    assert "model.config.projections_trained = True; model.save_pretrained" in found


def test_an_untrained_model_is_not_published_by_any_way(
    untrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f"refused for publishing.*{REMEDY}"):
        check_publishable(untrained)
    for flags in ([], ["--dry-run"], ["--license", "mit"]):
        assert main(["push", str(untrained), "owner/name", *flags]) == 2
        assert "is refused for publishing. It is untrained" in capsys.readouterr().err


@pytest.mark.parametrize("components", ["full", "text", "vision"])
def test_an_export_carries_the_state_on_and_its_card_says_untrained(
    untrained: Path, components: str, tmp_path: Path
) -> None:
    folder = export_model(untrained, tmp_path / "half", ExportConfig(components=components))
    assert read_state(folder) == (False, False)
    card = ModelCard.load(folder / "README.md")
    parts = "projections" if components == "vision" else "text adapter and projections"
    assert f"untrained: random weights are left in its {parts}" in card.text
    assert "Align it first" in card.text
    assert "Intended use" not in card.text and "Search images" not in card.text
    assert card.data.pipeline_tag is None and "untrained" in card.data.tags


def test_the_card_of_a_trained_model_says_its_use_and_of_a_random_adapter_too(
    good: Path, tmp_path: Path
) -> None:
    trained = ModelCard.load(good / "README.md").text
    assert "Intended use" in trained and "untrained" not in trained
    model, processor = tiny_model()
    model.config.text_adapter_trained = False
    card = ModelCard.load(save_model(model, processor, tmp_path / "model") / "README.md").text
    assert "Intended use" in card
    assert "in part untrained: random weights are left in its text adapter." in card


@pytest.mark.slow
def test_doctor_warns_of_an_untrained_model_that_is_healthy_as_a_folder(
    untrained: Path, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(untrained)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("warning  training") for line in lines) == 1
    assert f"{untrained}: healthy, but untrained: random weights are left in its" in lines[-1]
    report = str(check_model(good))
    assert "untrained" not in report and report.endswith(": healthy")


def test_an_untrained_model_is_measured_as_a_baseline_and_the_result_says_so(
    untrained: Path, good: Path
) -> None:
    settings = EncoderConfig(device="cpu")
    with pytest.warns(UserWarning, match="named is untrained: random weights"):
        encoder = LLM2CLIPEncoder(untrained, settings, source="named")
    assert encoder.description.run["untrained_parts"] == ["text adapter", "projections"]
    assert len(encoder.encode_texts(CAPTIONS).embeds) == len(CAPTIONS)
    trained = LLM2CLIPEncoder(good, settings, source="x").description
    assert "untrained_parts" not in trained.run


def test_mteb_measures_an_untrained_model_with_a_warning(untrained: Path) -> None:
    mteb_integration = pytest.importorskip("modeling_llm2clip.evaluation.mteb_integration")
    with pytest.warns(UserWarning, match="is untrained: random weights"):
        mteb_integration.load_for_mteb(untrained, device="cpu")


def test_what_a_training_did_is_written_into_the_new_folder(
    untrained: Path, tmp_path: Path
) -> None:
    trained = {"logit_scale.log_scale": torch.ones(1)}
    save_trained_model(untrained, trained, tmp_path / "both")
    assert read_state(tmp_path / "both") == (True, True)
    assert "Intended use" in (tmp_path / "both" / "README.md").read_text(encoding="utf-8")
    save_trained_model(untrained, trained, tmp_path / "one", text_adapter_trained=False)
    assert read_state(tmp_path / "one") == (False, True)
    # The rest is as transformers wrote it, byte for byte.
    before, after = (
        (folder / "config.json").read_text() for folder in (untrained, tmp_path / "both")
    )
    assert after == before.replace('_trained": false', '_trained": true')


@pytest.mark.slow
def test_what_is_converted_was_trained(tmp_path: Path) -> None:
    assert read_state(convert_family("openai", tmp_path)) == (True, True)
