"""A run is continued with what it was begun with, and a store of images used with these."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aligning import NUM_RECORDS, KillAtBegin, Prepared
from safetensors.torch import load_file, save_file
from tiny import draw_noise, tiny_model
from tuning import RECORDS, SHORT, Tuned, tune

from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.data.store.store_manifest import StoreManifest
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.training.alignment.alignment_data import AlignmentDataset
from modeling_llm2clip.training.finetuning.finetune_llm import finetune_llm

pytestmark = pytest.mark.slow


@pytest.fixture
def here(prepared: Prepared, tmp_path: Path) -> Prepared:
    """A copy of `prepared` that a test may change, with a run that was begun on it."""
    root = tmp_path / "prepared"
    shutil.copytree(prepared.model.parent, root)
    copied = Prepared(root / "data", root / "exported", root / "captions", root / "images")
    copied.begin(root / "run")
    return copied


def move_weight(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, name: weights[name] + 1}, file, metadata={"format": "pt"})


def move_head(here: Prepared) -> Prepared:
    move_weight(here.model, "visual_projection.weight")
    return here


def replace_image(here: Prepared) -> Prepared:
    draw_noise(seed=1).save(here.data / "07.jpg")
    return here


def change_bytes(here: Prepared) -> Prepared:
    """As many others: the last ones of a JPEG are of its pixels and its end."""
    file = here.data / "07.jpg"
    content = file.read_bytes()
    file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    return here


def move_images(here: Prepared) -> Prepared:
    """As many bytes of each name in another folder, which `--image-dir` may say."""
    return replace(here, data=Path(shutil.copytree(here.data, here.data.parent / "other")))


def store_in_another_dtype(here: Prepared) -> Prepared:
    shutil.rmtree(here.captions)
    config = ExtractConfig(store_dtype="float16", device="cpu")
    extract(here.model, here.records, here.captions, config, modality="text")
    return here


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (move_head, "fingerprint.head.weights"),
        (replace_image, "images.content"),
        (change_bytes, "images.content"),
        (move_images, "images.first"),
        (store_in_another_dtype, "caption_store.manifest"),
    ],
)
def test_an_alignment_is_not_continued_on(
    here: Prepared, change: Callable[[Prepared], Prepared], named: str
) -> None:
    run = here.model.parent / "run"
    here.begin(run, resume=True)
    changed = change(here)
    with pytest.raises(ValueError, match=rf"another run: {named}: '[^']+' then, '[^']+' now\. "):
        changed.align(run, resume=True)


def test_a_fine_tuning_is_not_continued_by_other_processes_or_in_another_precision(
    tuned: Tuned, tmp_path: Path
) -> None:
    run = tuned.copy_unfinished(tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    for name, value in {"num_processes": 2, "in_bfloat16": True}.items():
        changed = {**record, "inputs": {**record["inputs"], name: value}}
        (run / "run.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"another run: {name}: {value} then, \w+ now\. Cho"):
            tune(run, resume=True)


def test_a_fine_tuning_is_not_continued_on_another_llm(tmp_path: Path) -> None:
    folder = save_model(*tiny_model(), tmp_path / "base")
    with pytest.raises(KeyboardInterrupt):
        finetune_llm(folder, RECORDS, tmp_path / "run", SHORT, callbacks=[KillAtBegin()])
    move_weight(folder, "text_model.norm.weight")
    with pytest.raises(ValueError, match=r"another run: fingerprint\.weights: '"):
        finetune_llm(folder, RECORDS, tmp_path / "run", SHORT, resume=True)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{}", "run.json has no config and inputs, so this package did not write it"),
        ("[]", "run.json has no config and inputs"),
        ("half", "run.json cannot be read"),
        (
            '{"config": {"max_steps": 2}, "inputs": {}}',
            "another run: .*caption_noise: None then, 0.0 now",
        ),
    ],
)
def test_a_record_that_is_not_ours_or_older_is_refused_as_such(
    prepared: Prepared, tmp_path: Path, record: str, message: str
) -> None:
    (tmp_path / "run.json").write_text(record)
    with pytest.raises(ValueError, match=message):
        prepared.align(tmp_path, resume=True)


def test_options_that_change_no_number_may_differ(tuned: Tuned, tmp_path: Path) -> None:
    run = tuned.copy_unfinished(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        tune(run, replace(SHORT, report_to=("none",)), resume=True, callbacks=[KillAtBegin()])


def open_dataset(here: Prepared, records: Any) -> AlignmentDataset:
    processor = LLM2CLIPProcessor.from_pretrained(here.model)
    return AlignmentDataset(records, processor, image_store=here.image_store)


@pytest.mark.parametrize("change", [replace_image, change_bytes])
def test_a_store_of_other_images_of_the_same_names_is_refused(
    here: Prepared, change: Callable[[Prepared], Prepared]
) -> None:
    change(here)
    with pytest.raises(ValueError, match=r"other images of these names \(images \w+ then, \w+"):
        open_dataset(here, here.records)


def test_a_store_of_images_outlives_other_captions_of_them(prepared: Prepared) -> None:
    edited = [replace(r, captions=("another",)) for r in reversed(prepared.records)]
    assert len(open_dataset(prepared, edited)) == NUM_RECORDS


def test_without_the_images_a_store_of_them_belongs_to_its_own_data(prepared: Prepared) -> None:
    bare = [replace(record, image=None) for record in prepared.records]
    assert len(open_dataset(prepared, bare)) == NUM_RECORDS
    edited = [replace(record, captions=("another",)) for record in bare]
    with pytest.raises(ValueError, match=r"other images of these names \(data \w+ then, \w+ now"):
        open_dataset(prepared, edited)


def test_a_name_of_two_images_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    first, second = prepared.records[:2]
    twice = [first, replace(second, name=first.name, lang="de")]
    config = ExtractConfig(device="cpu")
    with pytest.raises(ValueError, match=r"1 name shared by several images: 00\.jpg"):
        extract(prepared.model, twice, tmp_path / "store", config, modality="image")
    copied = tmp_path / "copy.jpg"
    shutil.copy(first.path, copied)
    same = [first, replace(first, image=copied, lang="de")]
    folder = extract(prepared.model, same, tmp_path / "store", config, modality="image")
    assert StoreManifest.read(folder).num_rows == 1
