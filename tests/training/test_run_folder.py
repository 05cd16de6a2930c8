"""A run resumes only with the same inputs and in one process at a time, from intact checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aligning import NUM_RECORDS, KillAtBegin, Prepared, Run, names_that_differ, read_losses
from launches import ROOT
from safetensors.torch import load_file, save_file
from tiny import draw_noise
from tiny_recipe import read_files
from tuning import SHORT, Tuned, tune

from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.data.sealed_manifest import read_sealed, write_sealed
from modeling_llm2clip.data.store.store_manifest import StoreManifest
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.training.alignment.alignment_data import AlignmentDataset
from modeling_llm2clip.training.run_folder import (
    CHECKPOINTS,
    LOCK_FILE,
    NEAREST_FILE,
    _hold,
    discard_later_steps,
    lock_run,
    mark_complete,
    require_intact_checkpoint,
)


@pytest.fixture
def here(prepared: Prepared, tmp_path: Path) -> Prepared:
    """A copy of `prepared` that a test may change, with a started run."""
    root = tmp_path / "prepared"
    shutil.copytree(prepared.model.parent, root)
    copied = Prepared(root / "data", root / "exported", root / "captions", root / "images")
    copied.begin(root / "run")
    return copied


def move_head(here: Prepared) -> Prepared:
    file, name = here.model / "model.safetensors", "visual_projection.weight"
    weights = load_file(file)
    save_file({**weights, name: weights[name] + 1}, file, metadata={"format": "pt"})
    return here


def replace_image(here: Prepared) -> Prepared:
    draw_noise(seed=1).save(here.data / "07.jpg")
    return here


def change_bytes(here: Prepared) -> Prepared:
    """Change a pixel byte of a JPEG, keeping its size."""
    file = here.data / "07.jpg"
    content = file.read_bytes()
    file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    return here


def move_images(here: Prepared) -> Prepared:
    """Copy the images to another folder, as `--image-dir` may name."""
    return replace(here, data=Path(shutil.copytree(here.data, here.data.parent / "other")))


def store_in_another_dtype(here: Prepared) -> Prepared:
    shutil.rmtree(here.captions)
    config = ExtractConfig(store_dtype="float16", device="cpu")
    extract(here.model, here.records, here.captions, config, modality="text")
    return here


@pytest.mark.slow
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
def test_an_alignment_needs_the_same_inputs(
    here: Prepared, change: Callable[[Prepared], Prepared], named: str
) -> None:
    run = here.model.parent / "run"
    here.begin(run, resume=True)
    changed = change(here)
    with pytest.raises(ValueError, match=rf"another run: {named}: '[^']+' then, '[^']+' now\. "):
        changed.align(run, resume=True)
    if named == "images.content":
        with pytest.raises(
            ValueError, match=r"other images with these names \(images \w+ then, \w+"
        ):
            open_dataset(here, here.records)


def test_a_fine_tuning_needs_the_same_llm_processes_and_precision(
    tuned: Tuned, tmp_path: Path
) -> None:
    run = tuned.copy_unfinished(tmp_path / "run")
    record = read_sealed((run / "run.json").read_text())
    llm = {"fingerprint": {**record["inputs"]["fingerprint"], "weights": 1}}
    for name, value, changed, reason in (
        ("num_processes", 2, {"num_processes": 2}, "Each process has its own random numbers.* Cho"),
        ("in_bfloat16", True, {"in_bfloat16": True}, "Cho"),
        (r"fingerprint\.weights", 1, llm, "Cho"),
    ):
        edited = {**record, "inputs": {**record["inputs"], **changed}}
        (run / "run.json").write_text(write_sealed(edited))
        message = rf"another run: {name}: {value} then, \S+ now\. {reason}ose a new folder"
        with pytest.raises(ValueError, match=message):
            tune(run, resume=True)


def test_more_steps_are_refused_with_a_way_to_train_longer(tuned: Tuned, tmp_path: Path) -> None:
    run = tuned.copy_unfinished(tmp_path / "run")
    before = read_files(run)
    message = r"max_steps: 6 then, 9 now.* decays .* start a new run from this run's result\. Cho"
    with pytest.raises(ValueError, match=message):
        tune(run, replace(SHORT, max_steps=9), resume=True)
    assert read_files(run) == before


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("[]", "run.json cannot be read .it holds list, not an object"),
        ("half", "run.json cannot be read"),
        ('{"config": {}, "inputs": {}, "sha256_of_this_file": "0"}', "has the SHA-256"),
        ('{"config": {}, "inputs": {}}', "has the SHA-256"),
    ],
)
def test_a_foreign_record_is_refused(
    prepared: Prepared, tmp_path: Path, record: str, message: str
) -> None:
    (tmp_path / "run.json").write_text(record)
    with pytest.raises(ValueError, match=message):
        prepared.align(tmp_path, resume=True)


def test_options_that_do_not_affect_results_may_differ(tuned: Tuned, tmp_path: Path) -> None:
    run = tuned.copy_unfinished(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        tune(run, replace(SHORT, report_to=("none",)), resume=True, callbacks=[KillAtBegin()])


def open_dataset(here: Prepared, records: Any) -> AlignmentDataset:
    processor = LLM2CLIPProcessor.from_pretrained(here.model)
    return AlignmentDataset(records, processor, image_store=here.image_store)


def test_an_image_store_stays_valid_for_other_captions_of_the_same_images(
    prepared: Prepared,
) -> None:
    edited = [replace(r, captions=("another",)) for r in reversed(prepared.records)]
    assert len(open_dataset(prepared, edited)) == NUM_RECORDS
    # Without the images, only the same data identify them.
    bare = [replace(record, image=None) for record in prepared.records]
    assert len(open_dataset(prepared, bare)) == NUM_RECORDS
    edited = [replace(record, captions=("another",)) for record in bare]
    with pytest.raises(ValueError, match=r"other images with these names \(data \w+ then, \w+ now"):
        open_dataset(prepared, edited)


def test_a_name_shared_by_two_images_is_refused(prepared: Prepared, tmp_path: Path) -> None:
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


FUTURE = time.time() + 10 * 365 * 86_400
IN_USE = "run is in use by another training process"


def list_steps(output: Path) -> list[int]:
    folders = (output / CHECKPOINTS).glob("checkpoint-*")
    return sorted(int(folder.name.removeprefix("checkpoint-")) for folder in folders)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are forked")
def test_the_lock_ends_with_its_process_and_not_with_its_workers(tmp_path: Path) -> None:
    output = tmp_path / "run"
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from modeling_llm2clip.training.run_folder import _hold\n"
        "with _hold(Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n"
        "        os.close(1)\n"
        "        time.sleep(5)\n"
        "        os._exit(0)\n"
        "    time.sleep(0.5)\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(300)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(output)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=IN_USE), lock_run(output):
            pytest.fail("both hold it")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=60)
    assert (output / LOCK_FILE).is_file()  # left behind, but unlocked
    with lock_run(output):
        pass
    assert not output.exists()


def test_a_refused_run_leaves_no_folder(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few for a batch"):
        prepared.align(tmp_path / "run", global_batch_size=20, held_out_ratio=0.5)
    assert not (tmp_path / "run").exists()


def test_runs_that_start_and_end_at_the_same_time_are_refused_or_run(tmp_path: Path) -> None:
    """One may remove its empty folder just as another opens it."""

    def begin_and_end(_: int) -> int:
        held = 0
        for _ in range(300):
            with _hold(tmp_path / "run") as is_held:
                held += is_held
        return held

    with ThreadPoolExecutor(4) as pool:
        held = list(pool.map(begin_and_end, range(4)))
    assert sum(held) > 0
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError), _hold(tmp_path / "file"):
        pass


def test_the_last_two_checkpoints_are_kept_whatever_their_times(tmp_path: Path) -> None:
    """Folders with similar names that are not checkpoints stay."""
    others = {"checkpoint-3-backup", "checkpoint-best", "checkpoint-"}
    for name in others:
        (tmp_path / CHECKPOINTS / name).mkdir(parents=True)
    for step, seconds in ((9, FUTURE), (10, FUTURE), (100, 0.0), (11, FUTURE)):
        folder = tmp_path / CHECKPOINTS / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        os.utime(folder, (seconds, seconds))
    mark_complete(tmp_path, 100)
    assert {path.name for path in (tmp_path / CHECKPOINTS).iterdir()} == {
        "checkpoint-11", "checkpoint-100", *others,
    }  # fmt: skip
    discard_later_steps(tmp_path, None)
    assert {path.name for path in (tmp_path / CHECKPOINTS).iterdir()} == others


@pytest.mark.slow
def test_an_incomplete_checkpoint_is_ignored_and_no_run_logs_whole_run_averages(
    prepared: Prepared, finished: Run, tmp_path: Path
) -> None:
    """A resumed run could not know these averages."""
    run = finished.copy_without_model(tmp_path / "run")
    (run / "checkpoints" / "checkpoint-6" / "complete").unlink()
    (run / "checkpoints" / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
    assert prepared.align(run, resume=True).results["steps"] == 6
    # Bit for bit.
    assert read_losses(run) == read_losses(finished.output)
    assert not names_that_differ(run / "model", finished.model)
    for output in (run, finished.output):
        last = json.loads((output / "metrics.jsonl").read_text().split("\n")[-2])
        assert {name for name in last if name.startswith("train_")} == {"train_runtime"}


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_no_alignment_resumes_from_a_checkpoint_with_a_flipped_bit(
    prepared: Prepared, finished: Run, tmp_path: Path
) -> None:
    for name in ("trained.safetensors", "optimizer.pt", "complete"):
        run = finished.copy_without_model(tmp_path / name)
        flip_bit(run / CHECKPOINTS / "checkpoint-6" / name)
        with pytest.raises(ValueError, match=r"checkpoint-6 is damaged: .*run from checkpoint-4"):
            prepared.align(run, resume=True)


def test_no_fine_tuning_resumes_from_damaged_files(tuned: Tuned, tmp_path: Path) -> None:
    """Neither of a checkpoint, nor the record, the metrics and files that later steps need."""
    run = tuned.copy_unfinished(tmp_path / "run")

    def refuse(message: str, check: Callable[[], object]) -> None:
        with pytest.raises(ValueError, match=message):
            check()

    flip_bit(run / CHECKPOINTS / "checkpoint-3" / "adapter_model.safetensors")
    damaged = r"damaged: adapter_model\.saf.*to resume the run from the start"
    refuse(damaged, lambda: tune(run, resume=True))
    (run / CHECKPOINTS / "checkpoint-3" / "complete").write_bytes(b"")  # by a power failure
    refuse(r"checkpoint-3 is damaged: complete: ", lambda: tune(run, resume=True))
    np.save(run / NEAREST_FILE, np.arange(6))
    mark_complete(run, 3)
    require_intact_checkpoint(run)
    flip_bit(run / NEAREST_FILE)
    refuse(r"checkpoint-3 is damaged: \S*nearest", lambda: require_intact_checkpoint(run))
    file = run / "metrics.jsonl"
    file.write_text(f'{file.read_text(encoding="utf-8")}{{"step": 3, "lo\n', encoding="utf-8")
    refuse(r"metrics\.jsonl has a damaged line", lambda: discard_later_steps(run, None))
    text = (run / "run.json").read_text(encoding="utf-8")
    before = f'"cra_before": {tuned.results["cra_before"]}'
    (run / "run.json").write_text(text.replace(before, '"cra_before": 0.9'), encoding="utf-8")
    refuse(r"run\.json cannot be read .its content has", lambda: tune(run, resume=True))


@pytest.mark.parametrize("stage", ["align", "finetune-llm"])
@pytest.mark.slow
def test_checkpoints_of_the_future_are_resumed(
    stage: str, prepared: Prepared, tmp_path: Path
) -> None:
    output = tmp_path / "run"

    def run(**options: Any) -> None:
        if stage == "align":
            prepared.align(output, save_steps=1, max_steps=3, **options)
        else:
            tune(output, replace(SHORT, save_steps=1, max_steps=3, warmup_steps=1), **options)

    run()
    wanted = read_losses(output)
    assert list_steps(output) == [2, 3]
    checkpoints = output / CHECKPOINTS
    shutil.rmtree(output / "model", ignore_errors=True)
    shutil.rmtree(checkpoints / "checkpoint-3")
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-1")
    for folder in checkpoints.iterdir():
        os.utime(folder, (FUTURE, FUTURE))
    run(resume=True)
    assert list_steps(output) == [2, 3] and read_losses(output) == wanted
