"""Stage 3, refusals before a tower is loaded, and stops where numbers are not finite."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aligning import NUM_RECORDS, SHORT_RUN, Prepared, Run, prepare, read_losses, write_data
from interruptions import largest_file
from transformers import Trainer

from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.sealed_manifest import read_sealed, write_sealed
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.alignment.align_checks import check_processes
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.alignment.alignment_trainer import (
    AlignmentTrainer,
    ClampTemperatureCallback,
)
from modeling_llm2clip.training.alignment.sampling import ResumableBatchSampler
from modeling_llm2clip.training.losses.loss import LossInputs
from modeling_llm2clip.training.run_folder import find_last_checkpoint


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"long_caption_ratio": 1.5, "learning_rate": 0.0}, r"learning_rate=0.*caption_ratio=1.5"),
        ({"vision_training": "some"}, r"vision_training=.?some.*'frozen', 'lora' or 'full'"),
        ({"global_batch_size": 1}, "global_batch_size=1: Input should be greater"),
        ({"layer_decay": 0.0}, "layer_decay=0.0"),
        (
            dict.fromkeys(("learning_rate", "vision_learning_rate", "weight_decay"), math.inf)
            | {"num_train_epochs": math.nan},
            "num_train_epochs=nan.* learning_rate=inf.*vision_learning_rate=inf.*weight_decay=inf",
        ),
        # Options without effect.
        ({"choose_by": "zero_shot"}, "choose_by=zero_shot needs labeled images"),
        (
            {"vision_learning_rate": 1e-6, "vision_training": "lora"},
            "vision_learning_rate needs vision_training=full, not vision_training=lora and",
        ),
        ({"lora_rank": 2, "vision_training": "full"}, "lora_rank needs vision_training=lora or"),
        # Options that contradict each other.
        ({"max_steps": 0, "projection_init": "model"}, "max_steps=0 with projection_init=model"),
        ({"refit": True, "held_out_ratio": 0}, "refit=True needs held-out images"),
        ({"lock_text": True, "max_steps": 0}, "max_steps=0 with lock_text leaves"),
        ({"lock_text": True, "text_training": "lora"}, "combined with text_training=lora"),
        ({"lock_text": True, "projection_init": "cca"}, "combined with projection_init=cca"),
        ({"distillation_weight": 1.0}, "no effect with vision_training=frozen"),
    ],
)  # fmt: skip
def test_impossible_options_are_all_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignConfig(**changed)


def test_a_card_whose_statements_cannot_be_kept_is_refused_before_the_training(
    prepared: Prepared, tmp_path: Path
) -> None:
    model = shutil.copytree(prepared.model, tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: [mit, cc-by-4.0]\n---\n")
    with pytest.raises(ValueError, match=r"model/README\.md: .*license=\['mit', 'cc-by-4\.0'\] is"):
        dataclasses.replace(prepared, model=model).align(tmp_path / "run", held_out_ratio=0)
    assert not (tmp_path / "run").exists()


def refuse(prepared: Prepared, output: Path, message: str, **given: Any) -> None:
    """Call align with something wrong; no tower may be loaded before it says so."""
    changed = {k: given.pop(k) for k in list(given) if k in AlignConfig.__dataclass_fields__}
    inputs = {"records": prepared.records, "caption_store": prepared.caption_store, **given}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=message):
        patch.setattr(AlignmentModel, "__init__", lambda *_, **__: pytest.fail("tower loaded"))
        config = AlignConfig(**{**SHORT_RUN, **changed})
        align(prepared.model, inputs.pop("records"), output, config, **inputs)
    assert not (output / "run.json").exists()


@pytest.mark.parametrize(
    ("options", "stores", "named"),
    [
        ({"image_noise": 2.0}, ("captions", None), "image_noise=2.0 .*image_store"),
        ({"image_noise": 2.0, "vision_training": "full", "distillation_weight": 1.0},
         ("captions", "images"), "image_noise=2.0"),
        ({"caption_noise": 0.3, "text_training": "frozen-online"}, (None, "images"),
         "caption_noise=0.3 .*caption_store"),
    ],
)  # fmt: skip
def test_noise_on_embeddings_that_are_not_stored_is_refused(
    options: dict[str, Any], stores: tuple[object, object], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        AlignConfig(**options).require_stores(*stores)
    off = dict.fromkeys(options.keys() & {"image_noise", "caption_noise"}, 0.0)
    AlignConfig(**{**options, **off}).require_stores(*stores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jpeg_decoding": "scaled"}, "jpeg_decoding=scaled applies to decoded images"),
        ({"mini_batch_size": 2}, "mini_batch_size=2 has no effect if both sides are stored"),
    ],
)
def test_options_of_towers_that_do_not_run_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AlignConfig(**options).require_stores("captions", "images")
    AlignConfig(**options).require_stores("captions", None)


def test_an_option_that_is_newer_than_a_run_had_its_default(
    prepared: Prepared, finished: Run, tmp_path: Path
) -> None:
    run = finished.copy_without_model(tmp_path / "run")
    record = read_sealed((run / "run.json").read_text())
    del record["config"]["jpeg_decoding"]
    (run / "run.json").write_text(write_sealed(record))
    message = "another run: jpeg_decoding: 'full' then, 'scaled' now"
    with pytest.raises(ValueError, match=message):
        prepared.align(run, jpeg_decoding="scaled", resume=True)
    prepared.align(run, resume=True)


@pytest.mark.slow
def test_bad_data_is_refused_before_a_tower_is_loaded(prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "run"
    refuse(prepared, out, "There are no images", records=[])
    message = r"24 records to train on \(0 held out\), too few for a batch of 25"
    refuse(prepared, out, message, global_batch_size=25)
    refuse(prepared, out, "needs a caption_store", caption_store=None)
    refuse(prepared, out, "the caption_store has no effect", text_training="frozen-online")
    refuse(
        prepared, out, "image_store has no effect",
        image_store=prepared.image_store, vision_training="full",
    )  # fmt: skip
    refuse(prepared, out, "holds vision_embeds, expected", caption_store=prepared.image_store)
    refuse(prepared, out, "needs a caption_store, an image_store", projection_init="cca")
    refuse(
        prepared, out, "max_steps=0 writes the closed-form solution, which needs a",
        max_steps=0, projection_init="auto",
    )  # fmt: skip
    refuse(prepared, out, "loss='other' must be one of contrastive, sigmoid", loss="other")
    wide = r"matryoshka_dims \[32, 99\] must be below the model's projection_dim, 32"
    refuse(prepared, out, wide, matryoshka_dims=(4, 32, 99))
    refuse(
        prepared, out, "needs a caption_store, an image_store and vision_training=frozen",
        distillation_weight=1.0, vision_training="full", projection_init="cca",
        image_store=prepared.image_store,
    )  # fmt: skip
    message = "report_to=unknown: unknown cannot be used"
    refuse(prepared, out, message, report_to=("unknown",))
    records = prepared.records
    without = [dataclasses.replace(record, image=None) for record in records]
    refuse(prepared, out, r"24 records without an image: 00.jpg, ", records=without)
    message = r"2 stored records not in the data: 22.jpg \(en\)"
    refuse(prepared, out, message, records=records[:-2])
    alike = [dataclasses.replace(record, group_id="emoji") for record in records]
    refuse(prepared, out, "All 24 records have the group_id 'emoji'", records=alike)
    message = r"^22 groups of images are held out, which leaves 1 to train on"
    refuse(prepared, out, message, held_out_ratio=0.96)
    # An image that would be its own negative.
    both = [*records, dataclasses.replace(records[0], lang="de", group_id=records[0].name)]
    message = r"1 image whose group_id differs .*: 00\.jpg\. Use one"
    refuse(prepared, out, message, records=both)
    assert not out.exists()


def break_store(store: EmbeddingStore, rows: Any, value: float) -> EmbeddingStore:
    """Make a store read some of its rows as a value."""

    class Broken(EmbeddingStore):
        def read(self, wanted: Any, *, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
            embeds = super().read(wanted, dtype=dtype)
            embeds[np.isin(wanted, rows)] = value
            return embeds

    store.__class__ = Broken
    return store


def test_stored_embeddings_of_zeros_are_refused_by_name(prepared: Prepared, tmp_path: Path) -> None:
    stores = {"caption_store": prepared.caption_store, "image_store": prepared.image_store}
    config = AlignConfig(max_steps=1, device="cpu", held_out_ratio=0.0, projection_init="cca")
    # Row 7: the second record has the captions 2 to 4, the third 5 to 7.
    for name, message in (
        ("caption_store", r"captions: 1 of 71 embeddings .* finite: 02\.jpg \(en\)\. C"),
        ("image_store", r"images: \d of \d+ .* finite: 07\.jpg \(en\)"),
    ):
        broken = stores | {name: break_store(getattr(prepared, name), [7], 0.0)}
        with pytest.raises(ValueError, match=message):
            align(prepared.model, prepared.records, tmp_path / "run", config, **broken)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_batch_that_the_processes_cannot_share_is_refused(batch_size: int) -> None:
    config = AlignConfig(global_batch_size=batch_size, device="cpu")
    with pytest.raises(ValueError, match="not divisible by the 3 processes"):
        check_processes(config, batch_size, 3)


def test_a_lora_is_refused_under_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = AlignConfig(global_batch_size=8, device="cpu", vision_training="lora")
    with pytest.raises(ValueError, match="Training a LoRA under FSDP"):
        check_processes(config, 8, 1)


def test_captions_other_than_the_stored_are_refused(prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = load_records(write_data(tmp_path / "more", count=NUM_RECORDS + 1))
    refuse(prepared, out, r"1 record not in the store: 24.jpg \(en\)", records=more)
    fewer = edit_captions(tmp_path / "fewer", '"image 0", ', "")
    refuse(
        prepared, out, r"1 record with captions that differ from those in .*: 00.jpg", records=fewer
    )
    # As many captions, with one word changed since they were stored.
    edited = edit_captions(tmp_path / "edited")
    message = r"captions that differ from those in .*Extract them again"
    refuse(prepared, out, message, records=edited)


@dataclasses.dataclass(frozen=True)
class MarginLoss:
    """How far each image is from its caption, beyond 1 - margin; negatives do not matter."""

    margin: float

    def __call__(self, inputs: LossInputs) -> torch.Tensor:
        similarities = (inputs.image_embeds * inputs.text_embeds).sum(dim=1)
        return (self.margin - similarities + 1).relu().mean()


def edit_captions(
    folder: Path, old: str = "a photo of thing 7", new: str = "a photo of thing 8"
) -> list[CaptionedImage]:
    """The dataset of `prepared` with other captions of one image."""
    file = write_data(folder) / "captions.jsonl"
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    return load_records(folder)


def test_neither_order_nor_group_ids_of_the_records_matter_to_a_store(prepared: Prepared) -> None:
    records = [dataclasses.replace(r, group_id=r.name) for r in reversed(prepared.records)]
    places = ((records, 0), (None, NUM_RECORDS - 1))
    turned, plain = (
        prepared.dataset(given, "caption").caption_rows(np.array([item] * 2), np.array([0, 1]))
        for given, item in places
    )
    assert turned.tolist() == plain.tolist()


def test_a_run_is_not_continued_with_other_captions(prepared: Prepared, tmp_path: Path) -> None:
    options = {"max_steps": 1, "text_training": "frozen-online"}
    prepared.begin(tmp_path / "run", **options)
    edited = edit_captions(tmp_path / "edited")
    with pytest.raises(ValueError, match=r"another run: data: '\w+' then, '\w+' now"):
        prepared.align(tmp_path / "run", records=edited, resume=True, **options)


def test_a_store_of_another_model_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    other = prepare(tmp_path / "other", llm="qwen2")
    store = other.caption_store
    refuse(prepared, tmp_path / "run", r"another model.*weights: '\w+' in the", caption_store=store)


def test_a_run_keeps_processes_and_precision(
    prepared: Prepared, finished: Run, tmp_path: Path
) -> None:
    run = finished.copy_without_model(tmp_path / "run")
    record = read_sealed((run / "run.json").read_text())
    for name, value in {"num_processes": 2, "is_sharded": True, "in_bfloat16": True}.items():
        changed = {**record, "inputs": {**record["inputs"], name: value}}
        (run / "run.json").write_text(write_sealed(changed))
        message = rf"another run: {name}: {value} then, \w+ now\. .*Choose"
        with pytest.raises(ValueError, match=message):
            prepared.align(run, resume=True)


@pytest.mark.slow
def test_a_run_is_not_continued_with_another_loss(prepared: Prepared, tmp_path: Path) -> None:
    prepared.begin(tmp_path / "run", loss_function=MarginLoss(0.5))
    with pytest.raises(ValueError, match=r"loss_class: 'MarginLoss\(margin=0\.5\)' then, .*0\.1\)"):
        prepared.align(tmp_path / "run", loss_function=MarginLoss(0.1), resume=True)
    prepared.begin(tmp_path / "run", loss_function=MarginLoss(0.5), resume=True)


def test_a_run_whose_loss_is_always_0_writes_no_model(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The loss was 0 in all 2 steps"):
        prepared.align(tmp_path / "run", max_steps=2, loss_function=MarginLoss(-3.0))
    assert not (tmp_path / "run" / "model").exists()


def test_another_run_s_folder_is_refused(prepared: Prepared, finished: Run, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="model exists and is not empty"):
        prepared.align(finished.output, resume=True)
    run = finished.copy_without_model(tmp_path / "run")
    with pytest.raises(ValueError, match="contains an earlier run"):
        prepared.align(run)
    with pytest.raises(ValueError, match=r"another run: learning_rate: 0.001 then, 0.01 now"):
        prepared.align(run, learning_rate=0.01, resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        prepared.align(tmp_path / "full")


def test_stored_embeddings_not_finite_stop_a_run(prepared: Prepared, tmp_path: Path) -> None:
    store = prepared.caption_store
    rows = np.concatenate([store.rows_of(5), store.rows_of(5, long=True)])
    message = r"1 of 8 embeddings just read are all zeros or not finite: 05\.jpg \(en\)"
    with pytest.raises(ValueError, match=message):
        align(
            prepared.model, prepared.records, tmp_path / "run", AlignConfig(**SHORT_RUN),
            caption_store=break_store(store, rows, torch.inf),
        )  # fmt: skip


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_a_run(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed(self: AlignmentModel, caption_embeds: torch.Tensor) -> torch.Tensor:
        embeds = to_text_embeds(self, caption_embeds)
        return torch.cat([embeds[:5], embeds[5:] * torch.inf])

    to_text_embeds = AlignmentModel.to_text_embeds
    monkeypatch.setattr(AlignmentModel, "to_text_embeds", embed)
    sampler = ResumableBatchSampler(np.arange(NUM_RECORDS), batch_size=8, num_steps=1, seed=0)
    groups = [prepared.records[item].group_id for item in next(iter(sampler)).items[5:]]
    message = (
        "loss is nan at step 0, and 3 of the 8 pairs of this process have embeddings that are not "
        f"finite (groups: {', '.join(groups)}). Check"
    )
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        prepared.align(tmp_path / "run")


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_in_no_checkpoint(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_fourth_gradient(self: AlignmentTrainer, *args: Any) -> torch.Tensor:
        loss = Trainer.training_step(self, *args)
        if self.state.global_step == 3:
            self.alignment_model.text_projection.weight.grad[0, 0] = torch.nan
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentTrainer, "training_step", break_fourth_gradient)
        with pytest.raises(FloatingPointError, match="gradient norm is nan at step 3"):
            prepared.align(tmp_path / "run", save_steps=1)
    folders = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    assert sorted(folder.name for folder in folders) == ["checkpoint-2", "checkpoint-3"]
    prepared.align(tmp_path / "run", save_steps=1, resume=True)
    prepared.align(tmp_path / "whole")
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")


def test_weights_that_are_not_finite_are_in_no_checkpoint(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step_too_far(*_: Any, model: AlignmentModel, **__: Any) -> None:
        with torch.no_grad():
            model.text_projection.bias[0] = torch.inf

    monkeypatch.setattr(ClampTemperatureCallback, "on_optimizer_step", step_too_far)
    message = r"1 of \d+ trained weights are not finite after step 1: \['text_projection.bias'\]"
    with pytest.raises(FloatingPointError, match=message):
        prepared.align(tmp_path / "run", max_steps=1)
    assert find_last_checkpoint(tmp_path / "run") is None


def test_the_room_for_the_model_is_asked_for_before_the_first_step(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modeling_llm2clip.model_folders.weights._OTHER_FILES_BYTES", 2**60)
    monkeypatch.setattr(AlignmentModel, "__init__", lambda *_, **__: pytest.fail("tower loaded"))
    with pytest.raises(OSError, match=r"GB free, but the model takes .* Free up space"):
        prepared.align(tmp_path / "run")


@pytest.mark.slow
def test_a_checkpoint_without_room_is_named_with_the_way_on(
    prepared: Prepared, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    # The records of a run are shorter, its weights and the state of its optimizer longer.
    with (
        largest_file(20_000),
        pytest.raises(OSError, match=r"No room for the run .*--resume"),
    ):
        prepared.align(output, held_out_ratio=0)
    assert find_last_checkpoint(output) is None
    assert prepared.align(output, held_out_ratio=0, resume=True).results["steps"] == 6
