"""`train` runs every stage once, and ends with the same bytes however often it was stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_recipe import (
    WEIGHTS,
    make_recipe,
    names_that_differ,
    prepare_proclip,
    read_files,
    signal_at,
    write_recipe,
)

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.building.build_model import build_model
from modeling_llm2clip.configs.train_config import TrainConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.sealed_manifest import read_sealed, write_sealed
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.encoding.precision import DeviceTraits
from modeling_llm2clip.model_folders.model_card import read_card_data
from modeling_llm2clip.recipes import train as stages
from modeling_llm2clip.recipes.recipe_plan import plan_recipe, read_split
from modeling_llm2clip.recipes.train import train
from modeling_llm2clip.scheduling.graceful_stop import StageInterrupt
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.run_folder import _hold

ROOT = Path(__file__).parents[2]
# Files that also record when and how fast something ran.
TIMED = ("metrics.jsonl", "events.out", "retrieval.json")


@dataclass
class Done:
    """A finished recipe and its reports."""

    config: TrainConfig
    model: Path
    reported: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.reported)


def run(config: TrainConfig, **options: Any) -> Done:
    reported: list[str] = []
    model = train(config, report=reported.append, **options)
    return Done(config, model, reported)


@pytest.fixture(scope="module")
def done(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A finished run, whose folder no test may change."""
    return run(make_recipe(sources, tmp_path_factory.mktemp("done") / "run"))


@pytest.fixture
def copied(done: Done, tmp_path: Path) -> TrainConfig:
    """A copy of the finished run for a test to change; a run may be moved."""
    shutil.copytree(done.config.output, tmp_path / "run")
    return replace(done.config, output=tmp_path / "run")


def states_of(config: TrainConfig) -> dict[str, str]:
    return {stage.name: stage.state for stage in plan_recipe(config, read_split(config)).stages}


class StoppedError(Exception):
    """Ends a recipe before a stage, like a kill."""


def stop(*_: Any, **__: Any) -> None:
    raise StoppedError


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainConfig], None]:
    """Run a recipe until its first stage."""
    monkeypatch.setattr(stages, "build_model", stop)

    def begin(config: TrainConfig) -> None:
        with pytest.raises(StoppedError):
            train(config, report=lambda _: None)

    return begin


def read_scores(output: Path) -> dict[str, Any]:
    (file,) = (output / "evaluation").rglob("*.retrieval.json")
    scores: dict[str, Any] = json.loads(file.read_text())["scores"]
    return scores


def test_it_reports_the_plan_the_scores_and_all_paths(done: Done) -> None:
    assert done.model == done.config.output / "model"
    assert done.reported[0].startswith("27 images to train on, 3 to evaluate on.")
    scores = next(text for text in done.reported if "text to image R@1" in text)
    assert "model " in scores and "chance" in scores
    shown = dict(line.split(maxsplit=1) for line in done.reported[-1].splitlines())
    assert set(shown) == {"model", "results", "fine-tuned", "captions", "images", "aligned"}
    # The card also has them, next to those of the alignment.
    _, evaluated = sorted(read_card_data(done.model).results, key=lambda r: r.dataset == "held-out")
    hits = read_scores(done.config.output)["t2i"]["hit_rate_at_1"]
    assert evaluated.dataset == "held-out" and evaluated.scores["t2i.hit_rate_at_1"] == hits
    assert all(Path(path).is_dir() for path in shown.values())


def test_a_second_run_computes_nothing_and_changes_nothing(copied: TrainConfig) -> None:
    before = read_files(copied.output)
    times = {path: path.stat().st_mtime_ns for path in copied.output.rglob("*.safetensors")}
    again = run(copied)
    after = read_files(copied.output)
    assert [name for name in before if before[name] != after[name] and name != "run.json"] == []
    assert set(after) == set(before)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    # Only the plan, the check, the scores and the paths are reported: no stage wrote anything.
    assert len(again.reported) == 4 and "text to image R@1" in again.text
    moved = copied.output.rename(copied.output.with_name("moved"))
    assert "text to image R@1" in run(replace(copied, output=moved)).text


def test_changed_options_are_refused_by_name(done: Done) -> None:
    before = read_files(done.config.output)
    for section, option, value, then in (
        ("build", "projection_dim", 8, "16"),
        ("finetune", "lora_rank", 4, "16"),
        ("extract", "store_dtype", "float32", "'float16'"),
        ("align", "learning_rate", 1e-3, "None"),
        ("export", "dtype", "bfloat16", "None"),
    ):
        options = replace(getattr(done.config, section), **{option: value})
        message = rf"another run: {section}\.{option}: {then} then, {value!r} now\. Choose a new"
        with pytest.raises(ValueError, match=message):
            train(replace(done.config, **{section: options}))
    assert read_files(done.config.output) == before
    all_changed = r"another run: test: .*test_size: .*text_model: .*train: "
    with pytest.raises(ValueError, match=all_changed):
        train(replace(done.config, text_model="vision", test_size=0.2))


def test_a_recipe_with_a_base_runs_and_resumes_as_both_merged(
    copied: TrainConfig, sources: Path, tmp_path: Path
) -> None:
    write_recipe(sources, tmp_path / "base.yaml", output=copied.output, test_size=0.5)
    recipe = tmp_path / "own.yaml"
    recipe.write_text("base: base.yaml\ntest_size: 0.1\n", "utf-8")
    # The run of one file without a base has the same options, so nothing is computed.
    assert train(recipe, report=lambda _: None) == copied.output / "model"
    write_recipe(sources, tmp_path / "base.yaml", output=copied.output, build={"projection_dim": 8})
    with pytest.raises(ValueError, match=r"another run: build\.projection_dim: 16 then, 8 now"):
        train(recipe)


def test_a_run_resumes_after_a_section_got_another_option(copied: TrainConfig) -> None:
    file = copied.output / "run.json"
    record = read_sealed(file.read_text("utf-8"))
    assert record["config"]["align"].pop("compile") is False
    assert record["config"]["build"].pop("logit_scale_init_value") is None
    file.write_text(write_sealed(record), "utf-8")
    for section, options in (("build", {"logit_scale_init_value": 4.0}), ("finetune", None)):
        changed = options and replace(getattr(copied, section), **options)
        with pytest.raises(ValueError, match=rf"another run: {section}\.[^;]+ None"):
            train(replace(copied, **{section: changed}))
    assert "text to image R@1" in run(copied).text


def test_other_captions_are_another_run(copied: TrainConfig) -> None:
    """Even if the data have no others; a run from before there was a choice resumes."""
    file = copied.output / "run.json"
    record = read_sealed(file.read_text("utf-8"))
    assert record["config"].pop("caption_fields") is None
    file.write_text(write_sealed(record), "utf-8")
    assert "text to image R@1" in run(copied).text
    with pytest.raises(ValueError, match=r"caption_fields: None then, \['captions'\] now.*train: "):
        train(replace(copied, caption_fields=("captions",)))


@pytest.fixture
def moved(copied: TrainConfig, sources: Path, tmp_path: Path) -> TrainConfig:
    """A copy of the finished run and its data, with paths changed as if it had used the copy."""
    data = shutil.copytree(sources / "data", tmp_path / "data")
    file = copied.output / "run.json"
    record = read_sealed(file.read_text("utf-8"))
    moved = json.loads(json.dumps(record).replace(str(sources / "data"), str(data)))
    file.write_text(write_sealed(moved), "utf-8")
    return replace(copied, data=str(data))


def test_copied_images_are_the_same_data_and_changed_images_are_refused(moved: TrainConfig) -> None:
    assert "text to image R@1" in run(moved).text
    before = read_files(moved.output)
    for part, records in zip(("train", "test"), read_split(moved), strict=True):
        image = records[0].image
        assert isinstance(image, Path)
        content = image.read_bytes()
        same_size = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
        image.write_bytes(same_size if part == "train" else content + b"more")
        with pytest.raises(ValueError, match=rf"another run: {part}_images: "):
            train(replace(moved, check_images=False), report=lambda _: None)
        assert read_files(moved.output) == before
        image.write_bytes(content)


def test_text_pairs_and_kept_texts_that_were_replaced_are_refused(
    sources: Path, tmp_path: Path, begin: Callable[[TrainConfig], None]
) -> None:
    pairs, names = tmp_path / "pairs.jsonl", tmp_path / "names.txt"
    keeping = prepare_proclip(tmp_path)
    keeping["align"]["keep_texts"] = str(names)
    lines = [json.dumps({"query": f"q{n}", "positive": f"p{n}"}) for n in range(8)]
    for file, texts, recipe in (
        (pairs, lines, {"finetune": {"text_pairs": [[str(pairs), 1.0]]}}),
        (names, ["red", "blue"], keeping),
    ):
        file.write_text("\n".join(texts), "utf-8")
        config = make_recipe(sources, tmp_path / file.stem, **recipe)
        begin(config)
        file.write_text("\n".join(texts[::-1]), "utf-8")
        with pytest.raises(ValueError, match=rf"another run: files\..*{file.name}"):
            train(config, report=lambda _: None)


@pytest.mark.parametrize("place", ["vision", "llm"])
def test_towers_that_were_replaced_are_refused(
    place: str, sources: Path, tmp_path: Path, begin: Callable[[TrainConfig], None]
) -> None:
    towers = Path(shutil.copytree(sources, tmp_path / "sources"))
    config = make_recipe(towers, tmp_path / "run")
    begin(config)
    folder = Path(config.vision_model if place == "vision" else config.text_model)
    (folder / "README.md").write_text("A new card.", "utf-8")
    begin(config)
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    save_file(
        {name: value + 0.1 for name, value in load_file(file).items()}, file, {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"another run: towers\.(vision|text)_model"):
        train(config, report=lambda _: None)
    file.write_bytes(content)
    (folder / "1_Pooling").mkdir()  # as in the folder of an embedder
    (folder / "1_Pooling" / "config.json").write_text(" " * 64, "utf-8")
    with pytest.raises(ValueError, match=r"another run: towers\.(vision|text)_model"):
        train(config, report=lambda _: None)


def test_a_dry_run_refuses_what_the_run_would_refuse(
    done: Done, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_files(done.config.output)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"output": done.config.output, "build": {"projection_dim": 8}}, "build.projection_dim"),
        ({"align": {"loss": "triplet"}}, "'triplet'"),
        ({"output": tmp_path / "recipe.yaml"}, "is not a folder"),
        ({"seed": -1}, "seed='-1': Input should be greater"),
        ({"seed": 2**32}, f"seed='{2**32}': Input should be less"),
    ]
    for changed, error in changes:
        changed = {"output": tmp_path / "run", **changed}
        file = write_recipe(sources, tmp_path / "recipe.yaml", **changed)
        assert main(["train", str(file), "--dry-run"]) == 2
        assert error in capsys.readouterr().err
    assert read_files(done.config.output) == before and not (tmp_path / "run").exists()


def test_an_invalid_output_is_refused_before_the_data_are_read(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "read_split", lambda *_: pytest.fail("the data were read"))
    (tmp_path / "file").write_text("not a folder")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        config = replace(make_recipe(sources, tmp_path / "recipe"), output=output)
        with pytest.raises(NotADirectoryError, match=r"cannot be written: .*file is not a folder"):
            train(config)
    monkeypatch.undo()
    config = make_recipe(sources, tmp_path / "run")
    config.output.mkdir()
    (config.output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"run is not empty and has no run\.json"):
        train(config)
    assert list(read_files(config.output)) == ["notes.txt"]


def test_a_recipe_that_another_process_runs_is_refused(sources: Path, tmp_path: Path) -> None:
    """Even before it starts a stage: the record and the model could come from different runs."""
    config = make_recipe(sources, tmp_path / "run")
    with (
        _hold(config.output),
        pytest.raises(ValueError, match=r"in use by .*with the same call, or"),
    ):
        train(config)
    assert not config.output.exists()


def test_what_is_evaluated_may_change(copied: TrainConfig, sources: Path) -> None:
    models = read_files(copied.output, parts=WEIGHTS)
    more = run(replace(copied, eval_datasets=(f"folder={sources / 'data'}",)))
    assert len(list((copied.output / "evaluation").rglob("*.retrieval.json"))) == 2
    assert "folder: text to image R@1" in more.text
    changed = read_files(copied.output, parts=WEIGHTS)
    assert {name for name in models if models[name] != changed[name]} == {"model/README.md"}


def test_a_gpu_scores_the_model_in_its_own_dtype_for_its_card(
    copied: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = DeviceTraits("cuda", has_bfloat16=True, free_bytes=2**40)
    monkeypatch.setattr(DeviceTraits, "read", lambda _: gpu)
    shutil.rmtree(copied.output / "evaluation")
    scores = {result.dataset: result.scores for result in read_card_data(run(copied).model).results}
    hits = read_scores(copied.output)["t2i"]["hit_rate_at_1"]
    assert scores["held-out"]["t2i.hit_rate_at_1"] == hits


@pytest.mark.slow
def test_records_replace_the_data(sources: Path, tmp_path: Path) -> None:
    """The recipe also leaves out fine-tuning, stores, export and evaluation."""
    config = make_recipe(
        sources,
        tmp_path / "run",
        data="nowhere",
        finetune=None,
        export=None,
        align={"vision_training": "lora", "text_training": "frozen-online", "max_steps": 2},
    )
    without = run(config, records=(load_records(sources / "data"), []))
    assert without.model == config.output / "aligned" / "model"
    assert check_model(without.model).healthy
    assert {path.name for path in config.output.iterdir()} == {"aligned", "built", "run.json"}
    shown = [line.split()[0] for line in without.reported[-1].splitlines()]
    assert shown == ["model", "aligned"]


@pytest.mark.slow
def test_an_unhealthy_model_is_an_error_on_every_call(copied: TrainConfig) -> None:
    """Also if it was damaged after it was checked, because it would be evaluated."""
    file = copied.output / "model" / "model.safetensors"
    intact = file.read_bytes()
    weights = load_file(file)
    name = "visual_projection.weight"
    save_file({**weights, name: weights[name].flip(0)}, file, {"format": "pt"})
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"(?s)The model is not healthy:.*image_embeds moved by"
        ):
            train(copied, report=lambda _: None)
    file.write_bytes(intact)
    assert "model: healthy" in run(copied).text


def test_refusals_of_stages_come_before_the_first(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Towers, fine-tuning, extraction, alignment and evaluation are all checked first."""
    monkeypatch.setenv("CXX", "no-compiler")
    records = [
        replace(record, captions=record.captions[:1], long_captions=())
        for record in load_records(sources / "data")
    ]
    config = make_recipe(
        sources,
        tmp_path / "run",
        vision_model="no tower",
        build={"prompt": "chatml"},
        extract={"compile": True},
        align={"loss": "triplet", "projection_init": "cca", "vision_training": "full"},
        eval_tasks=["swimming"],
    )
    with pytest.raises(ValueError, match="no tower: no such vision tower") as caught:
        train(config, records=(records[:1], records[1:]))
    for error in ("only one caption", "projection_init=cca needs", "'triplet'", "swimming",
                  "too few for a batch of 4", "no-compiler is missing"):  # fmt: skip
        assert error in str(caught.value)
    with pytest.raises(ValueError, match="Choose one of llama-3"):
        train(make_recipe(sources, tmp_path / "run", build={"prompt": None}))
    assert not config.output.exists()


@pytest.mark.slow
def test_the_same_call_resumes_after_sigterm(sources: Path, tmp_path: Path) -> None:
    long = {"max_steps": 60, "save_steps": 100, "logging_steps": 1}
    config = make_recipe(
        sources, tmp_path / "run", finetune=long,
        align={**long, "eval_steps": 10, "early_stopping_patience": 0},
    )  # fmt: skip
    message = r"Stopped after step \d+ of 60;.*Continue with the same call\.$"
    for folder, stage in (("fine-tuned", "finetune-llm"), ("aligned", "align")):
        with (
            signal_at(config.output / folder / "metrics.jsonl"),
            pytest.raises(StageInterrupt, match=message) as caught,
        ):
            train(config, report=lambda _: None)
        assert caught.value.signal == signal.SIGTERM
        states = states_of(config)
        assert states["build"] == "finished" and states[stage] == "stopped"
    continued = run(config)
    whole = run(replace(config, output=tmp_path / "whole"))
    assert names_that_differ(continued.config.output, whole.config.output) == []


@pytest.mark.slow
def test_a_recipe_with_a_teacher_equals_its_commands_one_by_one_and_resumes(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = prepare_proclip(tmp_path)
    recipe["align"] |= {"max_steps": 20, "save_steps": 100, "logging_steps": 1, "eval_steps": 10}
    names = tmp_path / "names.txt"
    names.write_text("red\nblue\n", encoding="utf-8")
    recipe["align"]["keep_texts"] = str(names)
    config = make_recipe(sources, tmp_path / "run", **recipe)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(stages, "align", stop)
        train(config, report=lambda _: None)
    states = states_of(config)
    assert states["extract teacher"] == "finished" and states["align"] == "to do"
    extracted = read_files(config.output / "teacher")
    file = config.output / "aligned" / "metrics.jsonl"
    with signal_at(file), pytest.raises(StageInterrupt):
        train(config, report=lambda _: None)
    done = run(config)
    assert read_files(config.output / "teacher") == extracted
    assert "inherited" in done.text and f"teacher      {config.output}" in done.text
    assert len(run(config).reported) == 4

    by_hand, (records, _) = tmp_path / "by-hand", read_split(config)
    clip = Path(config.vision_model)
    build_model(clip, config.text_model, by_hand / "built", config.build)
    stores = {
        name: extract(source, records, by_hand / name, config.extract, modality=modality)
        for name, source, modality in (
            ("captions", by_hand / "built", "text"), ("images", by_hand / "built", "image"),
            ("teacher", clip, "text"),
        )
    }  # fmt: skip
    align(
        by_hand / "built", records, by_hand / "aligned", config.align,
        caption_store=stores["captions"], image_store=stores["images"],
        inherit_from=stores["teacher"], teacher=clip,
    )  # fmt: skip
    parts = ("teacher", "aligned/model")
    ours, theirs = (
        {n: b for n, b in read_files(folder, parts=parts).items() if n.endswith(".safetensors")}
        for folder in (config.output, by_hand)
    )
    # Only the name of the data in the image summary differs.
    summary = "aligned/model/training_images.safetensors"
    assert ours.keys() == theirs.keys() and len(ours) > 2
    assert [n for n in ours if ours[n] != theirs[n] and n != summary] == []


@pytest.mark.slow
def test_no_file_depends_on_the_process_that_wrote_it(sources: Path, tmp_path: Path) -> None:
    """Python hashes strings differently in each process, so sets have a different order."""
    written = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        write_recipe(
            sources,
            folder / "recipe.yaml",
            output="run",
            finetune={"num_hard_negatives": 2, "num_pairings": 2},
            align={"vision_training": "lora", "text_training": "lora", "max_steps": 2},
        )
        completed = subprocess.run(
            [sys.executable, "-m", "modeling_llm2clip", "train", "recipe.yaml"], cwd=folder,
            capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert completed.returncode == 0, completed.stderr[-3000:]
        # The command prints scores and paths.
        assert "text to image R@1" in completed.stdout and "run/model" in completed.stdout
        files = read_files(folder / "run")
        written.append({n: b for n, b in files.items() if not any(mark in n for mark in TIMED)})
    first, second = written
    assert [name for name in first if first[name] != second.get(name)] == []
    assert set(first) == set(second)
