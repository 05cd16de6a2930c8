"""A model says whether it was trained, and an untrained one is not taken for a trained one."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import convert_family
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from shared_models import CAPTIONS, shared_batch
from tiny import draw_noise, tiny_llm, tiny_model, tiny_tokenizer, tiny_vision
from torch import nn
from transformers import AutoModel

from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.configs.evaluation_config import EncoderConfig
from modeling_llm2clip.configs.export_config import ExportConfig
from modeling_llm2clip.configuration_llm2clip import HEADS
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.evaluation.encoders.transformers_models import LLM2CLIPEncoder
from modeling_llm2clip.model_folders.model_card import CardData
from modeling_llm2clip.model_folders.model_writing import save_model, save_trained_model
from modeling_llm2clip.publishing.export_model import export_model
from modeling_llm2clip.publishing.push_to_hub import check_publishable

REMEDY = r"llm2clip align.*model\.config\.random_heads = \[\]; model\.save_pretrained"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("untrained") / "built"
    folder = save_model(*tiny_model(trained=False), place, card=CardData(license="mit"))
    assert read_state(folder) == [*HEADS]
    return folder


def read_state(folder: Path) -> list[str]:
    return LLM2CLIPConfig.from_pretrained(folder).random_heads


def build_untrained() -> LLM2CLIPModel:
    llm = tiny_llm(vocabulary_size=len(tiny_tokenizer())), tiny_tokenizer()
    config = BuildConfig(prompt="llama-3", max_text_length=32)
    model, _ = join_towers(tiny_vision(), llm, config)
    assert model.config.random_heads == [*HEADS]
    return model


def step(model: Any, *frozen: str) -> None:
    """One step of any trainer: it knows nothing of the configuration."""
    weights = [p for name, p in model.named_parameters() if not name.startswith(frozen or "-")]
    batch = shared_batch()
    loss = -model(**batch).logits_per_image.diag().sum()
    for weight, gradient in zip(
        weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True
    ):
        if gradient is not None:
            weight.data -= 1e-3 * gradient


@pytest.mark.parametrize("frozen", [(), HEADS, ("text_adapter",), ("visual_projection",)])
def test_the_trained_heads_are_found_from_the_saved_weights(
    frozen: tuple[str, ...], tmp_path: Path
) -> None:
    model = build_untrained().train()
    before = model.config.to_dict()
    with torch.no_grad():
        model(**shared_batch(), return_loss=True)
    model(**shared_batch(), return_loss=True).loss.backward()
    assert model.config.to_dict() == before
    model.to(torch.bfloat16).float().save_pretrained(tmp_path / "cast")
    assert read_state(tmp_path / "cast") == [*HEADS]
    again = LLM2CLIPModel.from_pretrained(tmp_path / "cast").train()
    again.save_pretrained(tmp_path / "loaded")
    assert read_state(tmp_path / "loaded") == [*HEADS]
    step(again, *frozen)
    weights = copy.deepcopy(again.state_dict())
    again.save_pretrained(tmp_path / "trained")
    assert read_state(tmp_path / "trained") == [*frozen]
    # A process group passes the gathered weights, and none in the processes that write nothing.
    shard = LLM2CLIPModel.from_pretrained(tmp_path / "cast")
    shard.save_pretrained(tmp_path / "other", is_main_process=False, state_dict={})
    assert shard.config.random_heads == [*HEADS]
    shard.save_pretrained(tmp_path / "gathered", state_dict=weights)
    assert read_state(tmp_path / "gathered") == [*frozen]
    LLM2CLIPModel.from_pretrained(tmp_path / "trained").save_pretrained(tmp_path / "kept")
    assert read_state(tmp_path / "kept") == [*frozen]


def test_a_head_whose_saved_weights_do_not_fit_is_random_again(tmp_path: Path) -> None:
    tiny_model()[0].save_pretrained(tmp_path / "trained")
    resized = LLM2CLIPModel.from_pretrained(
        tmp_path / "trained", projection_dim=8, ignore_mismatched_sizes=True
    )
    resized.save_pretrained(tmp_path / "resized")
    assert read_state(tmp_path / "resized") == ["text_projection", "visual_projection"]


def test_a_merged_lora_trains_projections_only_if_it_is_on_them(
    tmp_path: Path,
) -> None:
    for targets, left in ((".*q_proj", [*HEADS]), (".*_projection", ["text_adapter"])):
        wrapped = get_peft_model(build_untrained(), LoraConfig(target_modules=targets))
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight)
        wrapped.merge_and_unload().save_pretrained(tmp_path / targets[-4:])
        assert read_state(tmp_path / targets[-4:]) == left


def test_a_model_built_from_the_configuration_of_a_trained_one_is_random(tmp_path: Path) -> None:
    trained = tiny_model()[0]
    for name, built in (
        ("from_config", AutoModel.from_config(trained.config)),
        ("constructed", LLM2CLIPModel(trained.config)),
    ):
        built.save_pretrained(tmp_path / name)
        assert read_state(tmp_path / name) == [*HEADS]
        built.load_state_dict(trained.state_dict())
        built.save_pretrained(tmp_path / f"{name} and loaded")
        assert read_state(tmp_path / f"{name} and loaded") == []
    trained.save_pretrained(tmp_path / "trained")
    assert read_state(tmp_path / "trained") == []


def test_a_model_that_is_cast_twice_is_not_trained(tmp_path: Path) -> None:
    build_untrained().half().bfloat16().save_pretrained(tmp_path)
    assert read_state(tmp_path) == [*HEADS]


def test_a_model_without_an_adapter_has_no_untrained_one(tmp_path: Path) -> None:
    config = build_untrained().config
    config.text_adapter_layers = None
    LLM2CLIPModel(config).save_pretrained(tmp_path)
    assert read_state(tmp_path) == ["text_projection", "visual_projection"]


def test_an_index_refuses_an_untrained_model_before_reading_weights(
    untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_noise().save(tmp_path / "one.png")
    without_weights = tmp_path / "model"
    shutil.copytree(untrained, without_weights, ignore=shutil.ignore_patterns("model*"))
    assert main(["index", str(without_weights), str(tmp_path), str(tmp_path / "index")]) == 2
    found = capsys.readouterr().err
    assert f"{without_weights} is refused for" in found and "it is untrained: random" in found
    assert "model.config.random_heads = []; model.save_pretrained" in found


def test_an_untrained_model_cannot_be_published(
    untrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f"refused for publishing.*{REMEDY}"):
        check_publishable(untrained)
    for flags in ([], ["--dry-run"], ["--license", "mit"]):
        assert main(["push", str(untrained), "owner/name", *flags]) == 2
        assert "is refused for publishing: it is untrained" in capsys.readouterr().err


@pytest.mark.parametrize("components", ["full", "text", "vision"])
def test_an_export_keeps_the_untrained_state_and_states_it_on_the_card(
    untrained: Path, components: str, tmp_path: Path
) -> None:
    folder = export_model(untrained, tmp_path / "half", ExportConfig(components=components))
    heads = {"full": HEADS, "text": HEADS[:2], "vision": HEADS[2:]}[components]
    assert read_state(folder) == [*heads]
    card = ModelCard.load(folder / "README.md")
    parts = ", ".join(head.replace("_", " ") for head in heads)
    assert f"untrained: random weights remain in its {parts}" in card.text
    assert "Align it first" in card.text
    assert "Intended use" not in card.text and "Search images" not in card.text
    assert card.data.pipeline_tag is None and "untrained" in card.data.tags


def test_a_trained_models_card_states_its_use_and_a_random_adapter(
    good: Path, tmp_path: Path
) -> None:
    trained = ModelCard.load(good / "README.md").text
    assert "Intended use" in trained and "untrained" not in trained
    model, processor = tiny_model()
    model.config.random_heads = ["text_adapter"]
    card = ModelCard.load(save_model(model, processor, tmp_path / "model") / "README.md").text
    assert "Intended use" in card
    assert "Part of the model is untrained: random weights remain in its text adapter." in card


@pytest.mark.slow
def test_doctor_warns_of_an_untrained_model_that_is_healthy_as_a_folder(
    untrained: Path, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(untrained)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("warning  training") for line in lines) == 1
    assert f"{untrained}: healthy, but untrained: random" in lines[-1]
    report = str(check_model(good))
    assert "untrained" not in report and report.endswith(": healthy")


def test_an_untrained_model_can_be_evaluated_and_the_result_says_so(
    untrained: Path, good: Path
) -> None:
    settings = EncoderConfig(device="cpu")
    with pytest.warns(UserWarning, match="named is untrained: random weights"):
        encoder = LLM2CLIPEncoder(untrained, settings, source="named")
    assert encoder.description.run["untrained_parts"] == [*HEADS]
    assert len(encoder.encode_texts(CAPTIONS).embeds) == len(CAPTIONS)
    trained = LLM2CLIPEncoder(good, settings, source="x").description
    assert "untrained_parts" not in trained.run


def test_mteb_measures_an_untrained_model_with_a_warning(untrained: Path) -> None:
    mteb_integration = pytest.importorskip("modeling_llm2clip.evaluation.mteb_integration")
    with pytest.warns(UserWarning, match="is untrained: random weights"):
        mteb_integration.load_for_mteb(untrained, device="cpu")


def test_the_new_folder_records_what_was_trained(untrained: Path, tmp_path: Path) -> None:
    weights = load_file(untrained / "model.safetensors")
    heads = {name: weights[name] + 1 for name in weights if name.startswith(HEADS)}
    save_trained_model(untrained, heads, tmp_path / "both")
    assert read_state(tmp_path / "both") == []
    assert "Intended use" in (tmp_path / "both" / "README.md").read_text(encoding="utf-8")
    # The rest is as transformers wrote it, byte for byte.
    before, after = (
        (folder / "config.json").read_text() for folder in (untrained, tmp_path / "both")
    )
    listed = json.dumps([*HEADS], indent=2).replace("\n", "\n  ")
    assert after == before.replace(f'"random_heads": {listed}', '"random_heads": []')
    projections = {name: heads[name] for name in heads if "projection" in name}
    kept = {name: weights[name] for name in heads if "adapter" in name}
    save_trained_model(untrained, {**projections, **kept}, tmp_path / "one")
    assert read_state(tmp_path / "one") == ["text_adapter"]
    save_trained_model(untrained, {"logit_scale.log_scale": torch.ones(1)}, tmp_path / "none")
    assert read_state(tmp_path / "none") == [*HEADS]


@pytest.mark.slow
def test_a_converted_model_is_trained(tmp_path: Path) -> None:
    assert read_state(convert_family("openai", tmp_path)) == []
