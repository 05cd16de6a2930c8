"""Texts stay where the teacher has them: the term, its samples, the record, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from aligning import Run, read_losses
from inheriting import LONG, Inheriting, copy_into_other_spaces, prepare
from keeping_texts import keep
from labeled_colors import write_classes
from launches import run_python
from safetensors.torch import load_file
from tiny import tiny_vision

from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.evaluation_config import EncoderConfig
from modeling_llm2clip.configs.export_config import ExportConfig
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.evaluation.encoders.transformers_models import TransformersEncoder
from modeling_llm2clip.model_folders.model_card import read_card_data
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.publishing.export_model import export_model
from modeling_llm2clip.training.alignment import kept_texts
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.alignment.held_out import load_labeled_images
from modeling_llm2clip.training.alignment.kept_texts import read_kept_texts
from modeling_llm2clip.training.alignment.sampling import sample_rows
from modeling_llm2clip.training.run_folder import read_run_record

NAMES = ("red", "deep blue", "orange", "a wheel", "Paris", "seven", "nothing")


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Inheriting:
    prepared = prepare(tmp_path_factory.mktemp("clip"), "clip", count=24)
    (prepared.data.parent / "names.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    return prepared


def measure(keeping: Inheriting, folder: Path, texts: list[str]) -> float:
    """The error by other paths to both embeddings, in float64."""
    model, processor = load_model(folder)
    found = encode_texts(model, processor, texts).double()
    teacher = TransformersEncoder(keeping.clip, EncoderConfig(device="cpu"), source="clip")
    wanted = F.normalize(teacher.encode_texts(texts).embeds.double(), dim=-1)
    return float((found - wanted).square().sum(dim=1).mean())


def prompts_of(names: tuple[str, ...]) -> list[str]:
    return [text for name in names for text in (name, f"a photo of a {name}.")]


def list_weights(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.model.glob("*.safetensors"))}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"vision_training": "frozen", "loss": "sigmoid", "matryoshka_dims": (4,)},
        {"vision_training": "full", "layer_decay": 1.0},
    ],
)
def test_the_term_is_added_to_any_loss_with_its_weight(
    keeping: Inheriting, tmp_path: Path, options: dict[str, Any]
) -> None:
    without = keep(keeping, tmp_path / "without", keep_texts=None, **options)
    kept = keep(keeping, tmp_path / "kept", keep_weight=3.0, **options)
    texts = prompts_of(NAMES)
    term = measure(keeping, keeping.model, texts)
    added = read_losses(kept.output)[1] - read_losses(without.output)[1]
    assert added == pytest.approx(3.0 * term, rel=1e-4)  # the Trainer's log has four digits or more
    objectives = [run.results["objective"]["before"] for run in (without, kept)]
    assert objectives[1] - objectives[0] == pytest.approx(3.0 * term, rel=1e-4)
    assert measure(keeping, kept.model, texts) < measure(keeping, without.model, texts) < 2 * term


@pytest.mark.slow
def test_a_weight_of_0_is_as_no_option_bit_for_bit(keeping: Inheriting, tmp_path: Path) -> None:
    without = keep(keeping, tmp_path / "without", keep_texts=None)
    weightless = keep(keeping, tmp_path / "weightless", keep_weight=0.0)
    assert list_weights(without) == list_weights(weightless)
    assert read_losses(without.output) == read_losses(weightless.output)
    assert read_card_data(weightless.model).kept_texts is None
    assert "keep_texts" not in read_run_record(weightless.output)["inputs"]


@pytest.mark.slow
def test_a_resumed_run_equals_one_without_a_stop_and_takes_no_other_list(
    keeping: Inheriting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples are of less than half of the texts, so that those of the steps differ."""
    monkeypatch.setattr(kept_texts, "MOST_SAMPLED", 5)
    file = tmp_path / "names.txt"
    file.write_text("\n".join(NAMES), encoding="utf-8")
    options: dict[str, Any] = {"keep_texts": str(file), "keep_weight": 10.0}
    whole = keep(keeping, tmp_path / "whole", **options)
    stopped = Run(whole.copy_without_model(tmp_path / "stopped"))
    shutil.rmtree(stopped.output / "checkpoints" / "checkpoint-6")
    file.write_text("\n".join([*NAMES, "one more"]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"keep_texts\.digest: '\w+' then, '\w+' now"):
        keep(keeping, stopped.output, resume=True, **options)
    file.write_text("\n".join(NAMES), encoding="utf-8")
    keep(keeping, stopped.output, resume=True, **options)
    assert list_weights(whole) == list_weights(stopped)


@pytest.mark.slow
def test_two_processes_keep_as_one_does(keeping: Inheriting, tmp_path: Path) -> None:
    options = {"keep_weight": 10.0, "learning_rate": 1e-3}
    keep(keeping, tmp_path / "one", **options)
    script = Path(__file__).parents[2] / "helpers" / "keeping_texts.py"
    run_python(script, keeping.data.parent, tmp_path / "two", json.dumps(options), processes=2)
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        # Six steps carry the rounding of sums in another order on.
        torch.testing.assert_close(two[name], value, atol=1e-3, rtol=1e-3)
    losses = [read_losses(tmp_path / name) for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
    assert losses[0][1] > 10 * measure(keeping, keeping.model, prompts_of(NAMES))


def test_samples_depend_on_seed_and_step_alone_and_leave_no_text_out() -> None:
    samples = [sample_rows(40, 10, seed=3, step=step) for step in range(400)]
    assert all(len(rows.unique()) == 10 and torch.equal(rows, rows.sort()[0]) for rows in samples)
    assert torch.equal(samples[7], sample_rows(40, 10, seed=3, step=7))
    assert not torch.equal(samples[7], sample_rows(40, 10, seed=4, step=7))
    assert torch.equal(sample_rows(10, 10, seed=3, step=0), torch.arange(10))
    counts = np.bincount(torch.cat(samples).numpy(), minlength=40)
    # Binomial, 400 draws of 1/4: a deviation above 5 standard deviations of 8.7 has odds of 2e-5.
    assert abs(counts - 100).max() < 44


@pytest.mark.slow
def test_record_and_card_name_what_was_kept_and_the_next_training_forgets_it(
    keeping: Inheriting, tmp_path: Path
) -> None:
    run = keep(keeping, tmp_path / "run")
    described = read_run_record(run.output)["inputs"]["keep_texts"]
    assert (described["num_names"], described["num_texts"]) == (7, 14)
    card = (run.model / "README.md").read_text(encoding="utf-8")
    assert "7 names (red, deep blue, orange, a wheel, Paris and 2 more)" in card
    assert "Other classes\nwere not kept close" in card
    assert read_card_data(run.model).kept_texts in card
    again = keep(keeping, tmp_path / "again", model=run.model, keep_texts=None)
    assert read_card_data(again.model).kept_texts is None
    vision = export_model(run.model, tmp_path / "vision", ExportConfig(components="vision"))
    assert "kept the text side" not in (vision / "README.md").read_text(encoding="utf-8")
    stated = read_card_data(run.model).kept_texts
    # A run whose best step is 0 writes the weights that the statement is about.
    start = {"held_out_ratio": 0.25, "learning_rate": 1e-12, "max_steps": 1}
    none = keep(keeping, tmp_path / "none", model=run.model, keep_texts=None, **start)
    assert none.best_step == 0
    assert read_card_data(none.model).kept_texts == stated


def test_classes_of_labeled_images_are_read_once_with_their_templates(
    keeping: Inheriting, tmp_path: Path
) -> None:
    folder = write_classes(tmp_path / "classes")
    source = f"image-folder={folder}"
    labeled = load_labeled_images(source)
    config = AlignConfig(keep_texts=source, zero_shot=source)
    kept = read_kept_texts(config, keeping.clip, labeled)
    assert kept is not None and kept.names == labeled.class_names
    assert list(kept.texts) == prompts_of(labeled.class_names)
    # A file of names, of which one has a prompt of its own, beside other labeled images.
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({"red": ["a red square"], "blue": "blue"}), encoding="utf-8")
    kept = read_kept_texts(AlignConfig(keep_texts=str(file)), keeping.clip, labeled)
    assert kept is not None and kept.names == ("red", "blue")
    assert kept.texts == (
        "red", "a red square", "a photo of a red.", "blue", "a photo of a blue.",
    )  # fmt: skip


def test_what_cannot_be_kept_is_refused_before_a_tower_is_loaded(
    keeping: Inheriting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AlignmentModel, "__init__", lambda *_, **__: pytest.fail("tower loaded"))

    def refuse(message: str, *names: str, **changed: Any) -> None:
        file = tmp_path / "names.txt"
        file.write_text("\n".join(names or NAMES) + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=message) as refused:
            keep(keeping, tmp_path / "run", **{"keep_texts": str(file), **changed})
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "run").exists()

    for part in tiny_vision("dinov2"):
        part.save_pretrained(tmp_path / "tower")
    refuse("needs a teacher: .*chinese_clip.*DINOv3, cannot use keep_texts", teacher=None)
    refuse("'dinov2', which has no text encoder", teacher=tmp_path / "tower")
    refuse("has no effect without keep_texts", keep_texts=None, teacher=keeping.clip)
    refuse("1 repeated label: .*red", "red", "blue", "red")
    refuse("there are no labels", " ")
    (tmp_path / "blank.json").write_text('["red", ""]', encoding="utf-8")
    refuse("label number 2 is blank", keep_texts=str(tmp_path / "blank.json"))
    (tmp_path / "half.json").write_text(r'["red", "\ud83d"]', encoding="utf-8")
    refuse("number 3 has an unpaired surrogate", keep_texts=str(tmp_path / "half.json"))
    refuse(r"2 texts longer than \d+ tokens, the limit of .*: red and", "red", LONG)
    long = "a " * 62  # the model reads 64 tokens, this teacher 77
    refuse(r"has 2 texts longer than 64 tokens, the limit of the model's LLM: a a", long)
    refuse("There is no dataset", keep_texts="missing.txt")
    refuse("keep_texts has no effect with lock_text", lock_text=True)
    refuse("keep_texts cannot be combined with text_training=lora", text_training="lora")
    refuse("keep_texts cannot be combined with projection_init=cca", projection_init="cca")
    refuse("keep_texts has no effect with max_steps=0", max_steps=0)
    refuse("keep_weight has no effect without keep_texts", keep_texts=None, keep_weight=2.0)
    for message, folder in copy_into_other_spaces(keeping.model, tmp_path):
        refuse(message, model=folder, vision_training="full")


@pytest.mark.slow
def test_the_command_keeps_after_an_inheritance(keeping: Inheriting, tmp_path: Path) -> None:
    names = keeping.data.parent / "names.txt"
    words: list[Any] = [
        "align", keeping.model, keeping.data, tmp_path / "run",
        "--caption-store", keeping.captions, "--inherit-from", keeping.teacher,
        "--keep-texts", names, "--teacher", keeping.clip,
        "--vision-training", "full", "--max-steps", 2, "--global-batch-size", 8,
        "--held-out-ratio", 0, "--device", "cpu", "--layer-decay", 1,
    ]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    record = read_run_record(tmp_path / "run")
    assert record["results"]["start"]["method"] == "inherited"
    assert "kept_texts=10.0" in record["inputs"]["loss_class"]
    assert record["config"]["keep_texts"] == str(names)
    model = LLM2CLIPModel.from_pretrained(tmp_path / "run" / "model")
    assert not model.config.random_heads
