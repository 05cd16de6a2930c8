"""The plan of a recipe lists stages in order, with sizes and states, and writes nothing."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from stores import change_manifest
from tiny_recipe import make_recipe, prepare_proclip, read_files, write_recipe

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.train_config import TrainConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.records.splits import split_records
from modeling_llm2clip.recipes.recipe_plan import (
    PlannedStage,
    RecipePlan,
    plan_recipe,
    read_split,
)
from modeling_llm2clip.recipes.train import check_recipe, plan_train, train
from modeling_llm2clip.training.alignment.held_out import choose_held_out
from modeling_llm2clip.training.finetuning import finetune_llm
from modeling_llm2clip.training.run_folder import read_results


@pytest.fixture(scope="module")
def finished(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished recipe with epochs, whose folder no test may change."""
    config = make_recipe(
        sources,
        tmp_path_factory.mktemp("finished") / "run",
        finetune={"max_steps": None, "num_held_out": None},
        align={"max_steps": None, "num_train_epochs": 2, "early_stopping_patience": 0},
    )
    train(config, report=lambda _: None)
    return config


def plan_of(config: TrainConfig) -> RecipePlan:
    return plan_recipe(config, read_split(config))


def stages_of(config: TrainConfig) -> dict[str, PlannedStage]:
    return {stage.name: stage for stage in plan_of(config).stages}


def states_of(config: TrainConfig) -> dict[str, str]:
    return {name: stage.state for name, stage in stages_of(config).items()}


def test_stages_are_listed_in_order_with_their_sizes(sources: Path, tmp_path: Path) -> None:
    plan = plan_of(make_recipe(sources, tmp_path / "run"))
    # 30 images, two of them in one group: 29 groups, a tenth of which is held out.
    assert plan.num_images == (27, 3)
    sizes = {stage.name: stage.size for stage in plan.stages}
    assert sizes == {
        "build": "vision + llm",
        "finetune-llm": "4 steps of 4 pairs",
        "extract text": sizes["extract text"],
        "extract image": "27 images",
        "align": "6 steps of 4 images, vision tower frozen",
        "export": "full, unchanged dtype",
        "doctor": "every check",
        "evaluate": "3 held-out images",
    }
    assert re.fullmatch(r"8[01] captions", sizes["extract text"])  # the first image has no long one
    text = str(plan)
    lines = text.splitlines()
    assert lines[0].startswith("27 images to train on, 3 to evaluate on. Everything is written to")
    assert [line.split("|")[1].strip() for line in lines[3:]] == list(sizes)


@pytest.mark.parametrize(
    ("changed", "left_out"),
    [
        ({"finetune": None}, {"finetune-llm"}),
        ({"export": None}, {"export"}),
        ({"test_size": 0}, {"evaluate"}),
        ({"align": {"vision_training": "full"}}, {"extract image"}),
        (
            {"align": {"vision_training": "lora", "text_training": "frozen-online"}},
            {"extract text", "extract image"},
        ),
    ],
)
def test_unneeded_stages_are_not_listed(
    sources: Path, tmp_path: Path, changed: dict[str, Any], left_out: set[str]
) -> None:
    everything = set(states_of(make_recipe(sources, tmp_path / "all")))
    assert (
        everything - set(states_of(make_recipe(sources, tmp_path / "run", **changed))) == left_out
    )


def test_a_teacher_is_planned_or_refused(sources: Path, tmp_path: Path) -> None:
    recipe = prepare_proclip(tmp_path)
    stages = stages_of(make_recipe(sources, tmp_path / "run", **recipe))
    assert list(stages) == [
        "build", "extract text", "extract image", "extract teacher", "align", "export", "doctor",
        "evaluate",
    ]  # fmt: skip
    text, teacher = stages["extract text"], stages["extract teacher"]
    assert text.size == teacher.size  # the captions are the same

    def refuse(message: str, **changed: Any) -> None:
        changed = {**recipe, **changed}
        with pytest.raises(ValueError, match=message):
            plan_train(make_recipe(sources, tmp_path / "run", **changed))

    refuse("no text encoder that is supported", vision_model=str(sources / "vision"))
    refuse("Leave build.keep_projection out", vision_model="embedded")
    refuse("Set build.keep_projection=True", build={"prompt": "none"})
    refuse("leave build.image_size out", build={**recipe["build"], "image_size": 64})
    refuse(r"inherit_steps needs inherit_from.*\(in a recipe, inherit=True\)", inherit=False)
    refuse(r"\[16\] must be below .* projection_dim, 16", align={"matryoshka_dims": [16, 8]})
    refuse("leave projection_init out", align={"projection_init": "cca"})
    refuse("There is no dataset or folder named 'names.txt'", align={"keep_texts": "names.txt"})
    refuse(
        "align.keep_texts needs images", build={"prompt": "none"}, align={"keep_texts": "names.txt"}
    )
    refuse("Leave align.text_training out", align={"text_training": "frozen-online"})
    kept = {"prompt": "own", "keep_embeddings": True, "projection_dim": None}
    refuse("the teacher's layers are not compiled", extract={"compile": True})
    refuse("Set align.lock_text=True", inherit=False, finetune=None, build=kept)
    pickled = shutil.copytree(tmp_path / "clip", tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    names = tmp_path / "names.txt"
    names.write_text("red\n", encoding="utf-8")
    for teaches in ({"inherit": True}, {"inherit": False, "align": {"keep_texts": str(names)}}):
        refuse("pytorch_model.bin is not read", vision_model=str(pickled), **teaches)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_stopped_stage_is_reported_and_nothing_written(
    sources: Path, tmp_path: Path, finished: TrainConfig
) -> None:
    config = make_recipe(sources, tmp_path / "run")
    for name, state, removed in (
        ("finetune-llm", "stopped", "fine-tuned/model"),
        ("extract text", "stopped", None),
        ("align", "stopped", "aligned/model"),
        ("export", "to do", "model"),
    ):
        shutil.rmtree(config.output, ignore_errors=True)
        shutil.copytree(finished.output, config.output)
        whole = states_of(config)
        assert set(whole.values()) == {"finished", "repeated"}
        if removed is None:
            change_manifest(config.output / "captions", complete=False)
        else:
            shutil.rmtree(config.output / removed)
        before = {path: path.stat().st_mtime_ns for path in config.output.rglob("*")}
        assert states_of(config) == {**whole, name: state}
        assert {path: path.stat().st_mtime_ns for path in config.output.rglob("*")} == before


@pytest.mark.slow
def test_the_planned_steps_are_the_actual_ones(finished: TrainConfig) -> None:
    planned = stages_of(finished)
    for stage, folder in (("finetune-llm", "fine-tuned"), ("align", "aligned")):
        num_steps = read_results(finished.output / folder)["steps"]
        assert planned[stage].size.startswith(f"{num_steps} steps of 4")


@pytest.mark.slow
def test_a_recipe_accepts_datasets_like_every_stage(sources: Path, tmp_path: Path) -> None:
    """`NAME=FOLDER` and `NAME` of a known dataset, a folder, and the package's own images."""
    by_name = make_recipe(sources, tmp_path / "run", data=f"folder={sources / 'data'}")
    plain = make_recipe(sources, tmp_path / "run")
    names = [[record.name for record in part] for part in read_split(by_name)]
    assert names == [[record.name for record in part] for part in read_split(plain)]
    emoji, _ = read_split(make_recipe(sources, tmp_path / "run", data="emoji", test_size=0))
    assert len({record.lang for record in emoji}) > 1
    embedded, held_out = read_split(make_recipe(sources, tmp_path / "run", data="embedded"))
    assert {record.lang for record in embedded} == {"en"} and held_out
    with pytest.raises(ValueError, match="data=embedded is read as it is"):
        read_split(
            make_recipe(sources, tmp_path / "run", data="embedded", caption_fields=("caption",))
        )


def test_captions_on_both_sides_of_the_split_are_counted(sources: Path, tmp_path: Path) -> None:
    records = [
        replace(r, captions=(*r.captions, "the same")) for r in load_records(sources / "data")
    ]
    train, test = split_records(records, test_size=0.1, seed=0, allow_shared_captions=True)
    plan = plan_recipe(make_recipe(sources, tmp_path / "run"), (train, test))
    assert plan.num_shared_captions == len(train)
    assert "27 training captions also in the evaluation data" in str(plan)
    data = shutil.copytree(sources / "data", tmp_path / "data")
    lines = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    lines = [json.dumps({**line, "captions": ["the same"]}) for line in lines]
    (data / "captions.jsonl").write_text("\n".join(lines))
    assert len(read_split(make_recipe(sources, tmp_path / "again", data=str(data)))[1]) == 3


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_recipe(sources, tmp_path / "recipe.yaml", output=tmp_path / "run")
    assert main(["train", str(file), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "| finetune-llm " in printed and "Nothing was computed or written." in printed
    assert list(read_files(tmp_path)) == ["recipe.yaml"]


def test_a_dry_run_counts_the_steps_of_the_run_without_writing_pairs(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With odd groups, captions that held-out images also have, several languages and pairs."""
    records = [
        CaptionedImage(None, f"{n}.jpg", f"{n}.jpg", tuple(f"{t} of {n}" for t in "abcde"[: n % 6]))
        for n in range(120)
    ]
    records += [replace(r, captions=("shared", f"von {r.name}"), lang="de") for r in records[::4]]
    pairs = [{"query": f"{n}", "positive": f"b of {n}"} for n in range(90)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)), "utf-8")
    config = make_recipe(
        sources, tmp_path / "run", test_size=0,
        finetune={"max_steps": None, "num_train_epochs": 3, "num_pairings": 2, "num_held_out": 30,
                  "text_pairs": [[str(file), 0.7]], "skip_single_captions": True},
        align={"max_steps": None, "num_train_epochs": 3},
    )  # fmt: skip
    split = RecordTable.from_records(records), RecordTable.from_records([])
    with monkeypatch.context() as patch:
        patch.setattr(pa, "OSFile", lambda *_: pytest.fail("a file was written"))
        check_recipe(config, split)
        planned = {stage.name: stage.size for stage in plan_recipe(config, split).stages}
    assert config.finetune is not None
    data, decided = finetune_llm._prepare(split[0], config.finetune, tmp_path)
    assert data.counts["num_text_pairs_lost"] and data.counts["num_captions_lost"]
    assert planned["finetune-llm"] == f"{decided['schedule']['steps']} steps of 4 pairs"
    items, _ = choose_held_out(split[0], config.align.held_out_ratio, seed=config.seed)
    assert planned["align"].startswith(f"{3 * (len(items) // 4)} steps of 4 images")
    texts = {text for record in records for text in record.captions}
    assert planned["extract text"] == f"{len(texts)} captions"


BAD = """
vision_model: vision
text_model: llm
data: 7
output: run
test_size: 1.5
seeds: 3
align: {max_step: 5, vision_training: all}
finetune: {warmup_steps: 2.5}
"""


def test_all_errors_of_a_recipe_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(BAD, encoding="utf-8")
    assert main(["train", str(file), "--dry-run"]) == 2
    reported = capsys.readouterr().err
    for error in (
        "test_size='1.5': Input should be less than 1.",
        "seeds is not an option. Did you mean seed",
        "max_step is not an option. Did you mean max_steps",
        "vision_training='all': Input should be 'frozen', 'lora' or 'full'.",
        "finetune: warmup_steps=2.5 must be a share below 1 or an integer.",
    ):
        assert error in reported
    assert list(tmp_path.iterdir()) == [file]


def test_all_conflicts_between_stages_are_named(sources: Path, tmp_path: Path) -> None:
    changed = {"finetune": {"merge": False}, "export": {"components": "text"}, "align": {"seed": 3}}
    message = r"finetune\.merge=False.*export\.components must be full.*align\.seed"
    with pytest.raises(ValueError, match=message):
        make_recipe(sources, tmp_path / "run", **changed)
    message = r"random weights.*Set build\.prompt=own and build\.keep_emb"
    with pytest.raises(ValueError, match=message):
        make_recipe(sources, tmp_path / "run", align={"lock_text": True})
