"""Stage 3, the new folder: all of the old one but what was trained, and healthy."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import (
    SHORT_RUN,
    TOWERS,
    Prepared,
    Run,
    command_of,
    names_that_differ,
    prepare,
    read_losses,
    skip_where_transformers_renames,
    weights_of,
)
from safetensors.torch import load_file
from shared_models import every_vision

from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.cli.options import name_data
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.data import sealed_manifest
from modeling_llm2clip.data.atomic_files import hash_file
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.encoding.pixel_normalization import find_normalization
from modeling_llm2clip.model_folders.fingerprint import fingerprint_vision
from modeling_llm2clip.model_folders.golden_embeddings import GOLDEN_FILE
from modeling_llm2clip.model_folders.model_card import read_card_data
from modeling_llm2clip.model_folders.model_writing import save_trained_model
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.alignment.alignment_report import describe_alignment
from modeling_llm2clip.training.alignment.held_out import embed_batches
from modeling_llm2clip.training.alignment.run_data import open_records
from modeling_llm2clip.training.losses.loss import load_loss


@pytest.mark.slow
def test_only_what_was_trained_differs_in_a_new_folder(prepared: Prepared, tmp_path: Path) -> None:
    run = prepared.align(tmp_path / "run", max_steps=40)
    changed = names_that_differ(prepared.model, run.model)
    assert changed and not [name for name in changed if name.startswith(TOWERS)]
    losses = list(read_losses(tmp_path / "run").values())
    # Batches of eight differ, so that the loss falls in the mean of ten.
    assert len(losses) == 40 and sum(losses[-10:]) < sum(losses[:10])
    report = check_model(run.model)
    assert report.healthy, str(report)
    golden = next(check for check in report.checks if check.name == "golden embeddings")
    assert golden.passed and not golden.skipped


@pytest.mark.slow  # starts processes
def test_no_worker_verifies_a_store_that_the_run_has_verified(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 workers on a store of 984 GB would otherwise read all of it 64 times."""
    log = tmp_path / "hashed.txt"

    def hash_and_log(file: Path) -> str:
        with log.open("a", encoding="utf-8") as lines:  # workers append to the same file
            lines.write(f"{file}\n")
        return hash_file(file)

    monkeypatch.setattr(sealed_manifest, "hash_file", hash_and_log)
    config = ExtractConfig(rows_per_shard=4, device="cpu", show_progress=False)
    store = extract(
        prepared.model, prepared.records, tmp_path / "captions", config, modality="text"
    )
    log.unlink()
    moved = dataclasses.replace(prepared, captions=store)
    moved.align_stored(tmp_path / "run", **SHORT_RUN, num_workers=2)
    hashed = Counter(log.read_text(encoding="utf-8").splitlines())
    shards = [str(shard) for shard in store.glob("*.safetensors")]
    assert len(shards) > 8
    assert {shard: hashed[shard] for shard in shards} == dict.fromkeys(shards, 1)


@every_vision
@pytest.mark.slow
def test_a_trained_tower_comes_back_under_its_saved_names(vision: str, tmp_path: Path) -> None:
    skip_where_transformers_renames(vision)
    here = prepare(tmp_path / "parts", vision=vision)
    run = here.align(tmp_path / "run", vision_training="full", max_steps=1, learning_rate=0.05)
    changed = names_that_differ(here.model, run.model)
    assert any(name.startswith("vision_model.") for name in changed)
    assert not any(name.startswith("text_model.") for name in changed)
    here.image_store.require_fingerprint(fingerprint_vision(here.model))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A model in bfloat16."""
    return prepare(tmp_path_factory.mktemp("half"), dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("vision_training", ["full", "lora"])
def test_what_rounding_keeps_is_counted(
    vision_training: str, half: Prepared, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"vision_training": vision_training, "layer_decay": 1.0}
    with pytest.warns(UserWarning, match=r"vision_model changes \d.*% of the entries .*bfloat16"):
        run = half.align(tmp_path / "run", max_steps=1, learning_rate=3e-5, **options)
    before, after = weights_of(half.model), weights_of(run.model)
    names = [name for name in before if name.startswith("vision_model.")]
    if vision_training == "lora":
        names = [name for name in names if "_attn." in name and name.endswith(".weight")]
    differ = [before[name] != after[name] for name in names]
    share = sum(int(part.sum()) for part in differ) / sum(part.numel() for part in differ)
    assert run.results["share_changed_by_training"] == {"vision_model": share}
    assert share < 0.5
    lines = "\n".join(describe_alignment(run.output))
    assert "Loss on a training batch, with float32 weights: " in lines


def test_the_start_is_no_training_that_was_rounded_away(half: Prepared, tmp_path: Path) -> None:
    options: dict[str, Any] = {"vision_training": "full", "held_out_ratio": 0.25, "max_steps": 1}
    run = half.align(tmp_path / "run", learning_rate=1e-12, **options)  # moves no float32 number
    assert run.best_step == 0
    assert "share_changed_by_training" not in run.results


@pytest.mark.slow
def test_weights_are_copied_file_by_file(prepared: Prepared, tmp_path: Path) -> None:
    sharded, written = tmp_path / "sharded", tmp_path / "model"
    shutil.copytree(prepared.model, sharded)
    (sharded / "model.safetensors").unlink()
    model = LLM2CLIPModel.from_pretrained(prepared.model)
    model.save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    moved = model.text_projection.weight.detach() + 1
    save_trained_model(sharded, {"text_projection.weight": moved}, written)
    names = {path.name for path in sharded.iterdir()}
    assert {path.name for path in written.iterdir()} == names
    assert names_that_differ(sharded, written) == {"text_projection.weight"}
    assert torch.equal(weights_of(written)["text_projection.weight"], moved)
    # A source without recorded captions.
    (sharded / GOLDEN_FILE).unlink()
    save_trained_model(sharded, {"text_projection.weight": moved}, tmp_path / "other")
    assert {path.name for path in (tmp_path / "other").iterdir()} == names - {GOLDEN_FILE}
    assert check_model(tmp_path / "other").healthy


@pytest.mark.slow
def test_a_loaded_pair_is_aligned_alike(prepared: Prepared, finished: Run, tmp_path: Path) -> None:
    model = LLM2CLIPModel.from_pretrained(prepared.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = (model, prepared.processor)
    config = AlignConfig(**SHORT_RUN)
    folder = align(
        loaded, prepared.records, tmp_path / "pair", config, caption_store=prepared.captions
    )
    assert not names_that_differ(folder, finished.model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_the_card_names_the_folder_of_the_data_however_it_was_given(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared.data)
    command = command_of(prepared, tmp_path / "run", max_steps=1, vision_training="frozen")
    command[2] = "."
    assert main(command) == 0
    stated = read_card_data(tmp_path / "run" / "model")
    assert (stated.training_data, stated.language) == (("data",), ("en",))


def test_the_name_of_shards_on_a_card_gives_nobody_access() -> None:
    signed = "https://host/{00..09}.tar?version=2&X-Amz-Signature=secret"
    assert name_data(signed, is_elsewhere=True) == "https://host/{00..09}.tar?version=2"


@pytest.mark.slow
@pytest.mark.parametrize("vision_training", ["frozen", "lora"])
def test_scores_are_of_written_weights(
    vision_training: Any, half: Prepared, tmp_path: Path
) -> None:
    options = {"held_out_ratio": 0.25, "vision_training": vision_training, "learning_rate": 0.01}
    run = half.align(tmp_path / "run", **options)
    checkpoint = load_file(run.output / "checkpoints" / "checkpoint-6" / "trained.safetensors")
    assert checkpoint["text_projection.weight"].dtype == torch.float32
    before, after = weights_of(half.model), weights_of(run.model)
    assert {n: v.dtype for n, v in before.items()} == {n: v.dtype for n, v in after.items()}
    data = open_records(
        RecordTable.from_records(half.records), half.processor, AlignConfig(held_out_ratio=0.25),
        half.caption_store, None,
    )  # fmt: skip
    held_out = data.held_out
    assert held_out is not None
    written = AlignmentModel.from_pretrained(run.model, with_llm=False, with_vision_tower=True)
    written.normalization = find_normalization(half.processor, torch.device("cpu"))
    inputs = embed_batches(written, held_out.iterate_batches(), torch.device("cpu"))
    scores = held_out.score(load_loss("contrastive"), inputs)
    assert run.after == scores
    assert run.results["held_out"]["in_training"]["loss"] != scores.loss
    (shown,) = read_card_data(run.model).results
    assert shown.scores["t2i_r1"] == pytest.approx(scores.t2i_r1)
    assert shown.intervals["t2i_r1"] == pytest.approx(scores.find_interval(scores.t2i_r1))
    assert shown.count == f"{scores.num_images} images, {scores.num_texts} texts"
