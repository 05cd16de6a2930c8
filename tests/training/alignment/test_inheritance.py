"""The text side inherits from the tower's own text encoder, and the contrast starts there."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inheriting import (
    EXTRACTED,
    LONG,
    STAGE,
    Inheriting,
    build,
    copy_into_other_spaces,
    prepare,
)
from running_ahead import run_ahead
from safetensors.torch import load_file
from shared_models import mostly_slow
from tiny import tiny_vision
from torch import Tensor

from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.configs.encoding_config import DUAL_ENCODERS
from modeling_llm2clip.configs.evaluation_config import EncoderConfig
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.embedding.extract import describe_extraction, extract
from modeling_llm2clip.encoding.encode import encode_images
from modeling_llm2clip.evaluation.encoders.transformers_models import TransformersEncoder
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.training.alignment import inheritance
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.alignment.align_checks import require_same_space
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.alignment.alignment_report import describe_alignment
from modeling_llm2clip.training.losses.terms import distill


@pytest.fixture(scope="module")
def inheriting(tmp_path_factory: pytest.TempPathFactory) -> Inheriting:
    return prepare(tmp_path_factory.mktemp("clip"), "clip", count=60)


def test_the_store_of_a_teacher_is_continued_in_its_precision_alone(
    inheriting: Inheriting, tmp_path: Path
) -> None:
    clip, records = inheriting.clip, inheriting.records[:2]
    rounds = replace(EXTRACTED, precision="bfloat16")
    folder = extract(clip, records, tmp_path / "store", rounds, modality="text")
    with pytest.raises(ValueError, match="precision: 'bfloat16' in the store, None now"):
        extract(clip, records, folder, EXTRACTED, modality="text")


@pytest.mark.parametrize("family", mostly_slow(DUAL_ENCODERS))
def test_a_store_has_the_embeddings_of_the_dual_encoder(tmp_path: Path, family: str) -> None:
    found = prepare(tmp_path, family, count=8, has_stores=False)
    store = EmbeddingStore.open(found.teacher, check="full")
    evaluated = TransformersEncoder(found.clip, EncoderConfig(device="cpu"), source="clip")
    captions = [(*record.captions, *record.long_captions) for record in found.records]
    pairs = [(item, number) for item in range(len(store)) for number in range(len(captions[item]))]
    texts = [captions[item][number] for item, number in pairs]
    rows = store.rows_at(*np.array(pairs).T)
    wanted = F.normalize(evaluated.encode_texts(texts).embeds, dim=-1)
    wanted[texts.index(LONG.strip())] = 0
    # Float32, in batches of other sizes.
    torch.testing.assert_close(store.read(rows), wanted, atol=1e-5, rtol=0)
    assert store.manifest.num_truncated == 1
    assert "1 too long" in describe_extraction(found.teacher)[0]
    # By the weights of both.
    require_same_space(store.folder, store.manifest.fingerprint, found.model)
    # And the model's images are where that encoder puts them: nothing of it is lost.
    sources = [record.image for record in found.records[:5]]
    embeds = encode_images(*load_model(found.model, device="cpu"), sources)  # type: ignore[arg-type]
    expected = evaluated.encode_images(sources, names=[""] * 5)
    torch.testing.assert_close(embeds, F.normalize(expected, dim=-1), atol=1e-5, rtol=0)


def measure(inheriting: Inheriting, folder: Path) -> float:
    """The distance from the teacher by the formula of the self-distillation, over all captions."""
    captions, teacher = (EmbeddingStore.open(f) for f in (inheriting.captions, inheriting.teacher))
    wanted = teacher.read(range(teacher.manifest.num_rows))
    has_teacher = wanted.any(dim=1)
    embeds = captions.read(range(captions.manifest.num_rows))[has_teacher]
    with torch.no_grad():
        model = LLM2CLIPModel.from_pretrained(folder)
        return float(distill(model.to_text_embeds(embeds), wanted[has_teacher]))


def test_the_text_side_comes_near_its_teacher(inheriting: Inheriting, tmp_path: Path) -> None:
    run = inheriting.align(tmp_path / "run", held_out_ratio=0.0, global_batch_size=60)
    found = run.results["start"]["inheritance"]
    distance = found["distance"]
    assert not found["is_held_out"] and found["num_too_long"] == 1 and found["best_step"] == 40
    assert found["num_captions"] == found["num_measured"] == 120
    # What is trained on is descended on.
    assert distance["after"] < distance["closed_form"] < distance["before"]
    # The record is in batches of half of the captions, where there are fewer pairs.
    assert measure(inheriting, run.model) < measure(inheriting, inheriting.model)
    before, after = (LLM2CLIPModel.from_pretrained(f) for f in (inheriting.model, run.model))
    for name, weight in before.state_dict().items():
        is_same = torch.equal(weight, after.state_dict()[name])
        assert is_same != name.startswith(("text_adapter.", "text_projection.")), name
    assert not after.config.random_heads
    assert "inherited 120 captions" in describe_alignment(run.output)[0]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_gradient_that_is_not_finite_ends_the_inheritance(
    inheriting: Inheriting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """At once, or where the device runs ahead at the next score, every second step here."""
    if ahead:
        run_ahead(monkeypatch)
    calls: list[bool] = []

    def distill_and_break(*sides: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return distill(*sides) * (math.inf if calls[-1] and calls.count(True) >= 3 else 1.0)

    monkeypatch.setattr(inheritance, "distill", distill_and_break)
    with pytest.raises(FloatingPointError, match="norm is nan at step 3 of the inherit"):
        inheriting.align(tmp_path / "run", held_out_ratio=0.0, global_batch_size=60)
    assert calls.count(True) == (4 if ahead else 3)


@pytest.mark.slow
def test_views_of_held_out_captions_are_held_out_and_the_start_is_written_as_it_is(
    tmp_path: Path,
) -> None:
    viewed = prepare(tmp_path, "clip", count=30, num_views=3)
    run = viewed.align(tmp_path / "run", held_out_ratio=0.2, inherit_steps=4)
    record = run.results["start"]["inheritance"]
    teacher = EmbeddingStore.open(viewed.teacher)
    num_taught = int(teacher.read(range(teacher.manifest.num_rows)).any(dim=1).sum())
    # A caption is trained on or measured.
    assert record["is_held_out"]
    assert record["num_captions"] + record["num_measured"] == num_taught
    assert record["num_measured"] > 2 * run.results["held_out"]["best"]["num_images"]
    # No step followed, so there was nothing to fit once more.
    inherited = load_file(run.output / "inherited.safetensors")
    written = load_file(run.model / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in inherited.items())
    assert "refit" not in " ".join(describe_alignment(run.output))


@pytest.mark.slow
def test_the_contrast_starts_from_the_inheritance(inheriting: Inheriting, tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_steps": 2, "global_batch_size": 16, "inherit_steps": 4}
    run = inheriting.align(tmp_path / "run", **options)
    assert run.results["start"]["method"] == "inherited"
    again = inheriting.align(tmp_path / "again", **options)
    shutil.rmtree(again.output / "model")
    shutil.rmtree(again.output / "refit", ignore_errors=True)
    shutil.rmtree(again.output / "checkpoints" / "checkpoint-6")
    inheriting.align(tmp_path / "again", resume=True, **options)
    names = ("model/model.safetensors", "inherited.safetensors")
    for name in names:
        assert (run.output / name).read_bytes() == (again.output / name).read_bytes()


@pytest.mark.slow
def test_what_does_not_fit_the_teacher_is_refused(inheriting: Inheriting, tmp_path: Path) -> None:
    def refuse(message: str, **changed: Any) -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setattr(AlignmentModel, "__init__", lambda *_, **__: pytest.fail("tower loaded"))
            inheriting.align(tmp_path / "run", **changed)
        assert not (tmp_path / "run").exists()

    def extract_both(records: list[CaptionedImage], name: str) -> dict[str, Path]:
        sources = {"caption_store": inheriting.model, "inherit_from": inheriting.clip}
        return {
            store: extract(source, records, tmp_path / name / store, EXTRACTED, modality="text")
            for store, source in sources.items()
        }

    refuse("holds caption_embeds, expected teacher_text_embeds", inherit_from=inheriting.captions)
    refuse("holds teacher_text_embeds, expected caption_embeds", caption_store=inheriting.teacher)
    refuse("inherit_steps needs inherit_from", inherit_from=None, inherit_steps=9)
    refuse("lock_text cannot be combined with inherit_from", lock_text=True, max_steps=None)
    refuse("leave projection_init out", projection_init="cca")
    refuse("needs a caption_store", caption_store=None, text_training="frozen-online", max_steps=1)
    long = [
        replace(record, captions=(f"{LONG} {number}",), long_captions=())
        for number, record in enumerate(inheriting.records)
    ]
    stores = extract_both(long[:4], "long")
    refuse("every caption exceeds", **stores)
    refuse("does not have the same rows as", inherit_from=stores["inherit_from"])
    short = inheriting.records[0]
    few = [replace(short, captions=short.captions[:1], long_captions=()), *long[1:]]
    with pytest.raises(ValueError, match="nothing to inherit"):
        align(
            inheriting.model, few, tmp_path / "few-run", AlignConfig(**STAGE),
            image_store=inheriting.images, **extract_both(few, "few"),
        )  # fmt: skip
    # Of other models the captions' store is made by the same LLM.
    for message, folder in copy_into_other_spaces(inheriting.model, tmp_path):
        images = extract(
            folder,
            inheriting.records[:2],
            tmp_path / f"{folder.name}-images",
            EXTRACTED,
            modality="image",
        )
        refuse(message, model=folder, image_store=images)


def test_a_tower_without_a_text_encoder_is_refused_with_the_way_out(
    inheriting: Inheriting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dino = tmp_path / "dino"
    tower, image_processor = tiny_vision("dinov2")
    tower.save_pretrained(dino)
    image_processor.save_pretrained(dino)
    with pytest.raises(ValueError, match="'dinov2', which has no text encoder"):
        build(dino, tmp_path / "model")
    with pytest.raises(ValueError, match="Pass its folder or Hub id"):
        build((tower, image_processor), tmp_path / "model")
    with pytest.raises(ValueError, match="16 dimensions"):
        build(inheriting.clip, tmp_path / "model", projection_dim=32)
    for changed, message in (
        ({"vision_pooling": "cls"}, "Use vision_pooling=pooler"),
        ({"normalization": "imagenet"}, "Use normalization=own"),
        ({"dtype": "float16"}, "not float16"),
    ):
        with pytest.raises(ValueError, match=message):
            BuildConfig(prompt="llama-3", keep_projection=True, **changed)
    lacking = "An LLM2CLIP model is needed here"
    with pytest.raises(ValueError, match=rf"is a 'clip' .*{lacking}"):
        extract(inheriting.clip, inheriting.records, tmp_path / "s", EXTRACTED, modality="image")
    pickled = shutil.copytree(inheriting.clip, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"A pytorch_model\.bin is not read: .*save_pretrained"):
        extract(pickled, inheriting.records, tmp_path / "s", EXTRACTED, modality="text")
    words = ["extract", str(dino), str(inheriting.data), str(tmp_path / "s"), "--modality", "text"]
    assert main(words) != 0
    assert "or a CLIP or SigLIP with its own text encoder" in capsys.readouterr().err
