"""Weights between two models: on the straight way, measured, and the best ones written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import Prepared, Run, prepare
from labeled_colors import write_classes
from safetensors.torch import load_file, save_file

from modeling_llm2clip import LLM2CLIPConfig
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.align_config import InterpolateConfig
from modeling_llm2clip.configs.evaluation_config import EvaluationConfig
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.model_folders.model_card import read_card_data
from modeling_llm2clip.training.alignment.interpolate import Interpolation, interpolate

CPU = InterpolateConfig(device="cpu", num_shares=4)


@pytest.fixture(scope="module")
def colored(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("colored"), num_colored=60)


@pytest.fixture(scope="module")
def tuned(colored: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that trains the tower and everything behind it."""
    options = {"vision_training": "full", "layer_decay": 1.0, "learning_rate": 1e-2}
    return colored.align(tmp_path_factory.mktemp("tuned") / "run", held_out_ratio=0.2, **options)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_labeled_images_have_to_be_there_to_choose() -> None:
    with pytest.raises(ValueError, match="choose_by=zero_shot needs labeled images"):
        InterpolateConfig(choose_by="zero_shot")


def test_a_damaged_model_is_not_on_the_way(colored: Prepared, tmp_path: Path) -> None:
    """What is written records new golden embeddings, by which the damage would be right."""
    damaged = shutil.copytree(colored.model, tmp_path / "damaged")
    weights = weights_of(damaged)
    weights["visual_projection.weight"][0] = 0
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"from {damaged}: it fails .*image_embeds moved"):
        interpolate(damaged, colored.model, colored.records, tmp_path / "model", CPU)


@pytest.mark.slow
def test_the_best_weights_between_are_written(
    colored: Prepared, tuned: Run, tmp_path: Path
) -> None:
    found = interpolate(
        colored.model, tuned.model, colored.records, tmp_path / "model", CPU,
        caption_store=colored.caption_store,
    )  # fmt: skip
    assert list(found.scores) == [0, 0.25, 0.5, 0.75, 1]
    losses = {share: scores.loss for share, scores in found.scores.items()}
    assert losses[found.chosen] == min(losses.values()) and len(set(losses.values())) == 5
    first, last, between = map(weights_of, (colored.model, tuned.model, tmp_path / "model"))
    changed = [name for name in last if not torch.equal(first[name], last[name])]
    assert any(name.startswith("vision_model.") for name in changed)
    for name, value in between.items():
        # Float32 numbers of about 1.
        wanted = first[name] + found.chosen * (last[name] - first[name])
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-6)
        assert name in changed or torch.equal(value, last[name])
    assert check_model(tmp_path / "model", device="cpu").healthy
    (result,) = read_card_data(tmp_path / "model").results
    assert result.scores["t2i_r1"] == pytest.approx(found.scores[found.chosen].t2i_r1)


@pytest.mark.slow
def test_the_ends_score_as_their_models(colored: Prepared, tuned: Run, tmp_path: Path) -> None:
    """With labeled images, whose accuracy may choose."""
    source = f"image-folder={write_classes(tmp_path / 'classes')}"
    config = InterpolateConfig(device="cpu", num_shares=4, zero_shot=source, choose_by="zero_shot")
    found = interpolate(colored.model, tuned.model, colored.records, tmp_path / "model", config)
    accuracies = {share: scores.zero_shot for share, scores in found.scores.items()}
    for share, folder in ((0, colored.model), (1, tuned.model), (found.chosen, tmp_path / "model")):
        options = EvaluationConfig(
            output=tmp_path / f"scores-{share}", device="cpu", show_progress=False
        )
        (result,) = evaluate(folder, source, tasks=["classification"], config=options)
        assert accuracies[share] == result.scores["top_1"]["value"]
    assert accuracies[found.chosen] == max(accuracies.values())
    assert [r.task for r in read_card_data(tmp_path / "model").results] == [
        "retrieval", "classification",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_shows_every_share(
    colored: Prepared, tuned: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--caption-store", str(colored.captions), "--num-shares", "2", "--device", "cpu"]
    places = [colored.model, tuned.model, colored.data, tmp_path / "model"]
    assert main(["interpolate", *map(str, places), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["share", "0%", "50%", "100%"]
    assert sum(line.endswith("chosen") for line in lines) == 1
    assert lines[-1].startswith(f"Wrote {tmp_path / 'model'}, ")


@pytest.mark.slow
def test_random_projections_are_not_on_the_way(tmp_path: Path) -> None:
    untrained = prepare(tmp_path / "prepared", num_colored=20, trained=False)
    run = untrained.align(tmp_path / "run", vision_training="full", layer_decay=1.0, max_steps=1)
    found = interpolate(
        untrained.model, run.model, untrained.records, tmp_path / "model", CPU,
        caption_store=untrained.caption_store,
    )  # fmt: skip
    last, between = weights_of(run.model), weights_of(tmp_path / "model")
    of_heads = [name for name in last if not name.startswith(("vision_model.", "text_model."))]
    assert of_heads and all(torch.equal(between[name], last[name]) for name in of_heads)
    assert isinstance(found, Interpolation)


@pytest.mark.slow
def test_two_untrained_models_give_an_untrained_one(tmp_path: Path) -> None:
    first = prepare(tmp_path / "first", num_colored=8, has_stores=False, trained=False)
    last = shutil.copytree(first.model, tmp_path / "last")
    weights = weights_of(last)
    weights[next(name for name in weights if name.startswith("vision_model."))] += 1
    save_file(weights, last / "model.safetensors", {"format": "pt"})
    (last / "golden_embeddings.safetensors").unlink()
    interpolate(first.model, last, first.records, tmp_path / "model", CPU)
    config = LLM2CLIPConfig.from_pretrained(tmp_path / "model")
    assert not config.projections_trained


@pytest.mark.slow
def test_models_with_nothing_between_are_refused(colored: Prepared, tmp_path: Path) -> None:
    def refuse(message: str, *, has_store: bool = True, **build: Any) -> None:
        model = colored.model
        if build:
            folder = tmp_path / "-".join(build)
            model = prepare(folder, num_colored=2, has_stores=False, **build).model
        store = colored.caption_store if has_store else None
        with pytest.raises(ValueError, match=message):
            interpolate(
                colored.model, model, colored.records, tmp_path / "model", CPU, caption_store=store
            )

    refuse("have the same weights")
    refuse(r"differ in .*_projection\.bias, ", projection_dim=16)
    refuse("differ in architecture of the vision tower", vision="siglip")
    refuse("differ in pooling of the text tower", has_store=False, text_pooling="last_token")
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_models_with_other_statistics_or_settings_are_refused(tmp_path: Path) -> None:
    """Batch normalization that another training has updated, and a setting of the text adapter."""
    before = prepare(
        tmp_path / "before", num_colored=2, has_stores=False, vision="timm with batch norm"
    )
    after = shutil.copytree(before.model, tmp_path / "after")
    weights = weights_of(after)
    name = next(name for name in weights if name.endswith("running_mean"))
    weights[name] += 1
    save_file(weights, after / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"differ in .*running_mean, and nothing"):
        interpolate(before.model, after, before.records, tmp_path / "model", CPU)
    setting = LLM2CLIPConfig.from_pretrained(before.model)
    setting.normalize_text_before_adapter = not setting.normalize_text_before_adapter
    setting.save_pretrained(after)
    with pytest.raises(ValueError, match=r"differ in .*normalize_text_before_adapter"):
        interpolate(before.model, after, before.records, tmp_path / "model", CPU)
    with pytest.raises(ValueError, match="no image has a negative"):
        interpolate(before.model, before.model, before.records[:1], tmp_path / "model", CPU)
    assert not (tmp_path / "model").exists()
