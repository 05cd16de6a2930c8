"""`llm2clip evaluate`: what its flags choose, and what a wrong command is answered."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from modeling_llm2clip.__main__ import LINE, main
from modeling_llm2clip.cli.command import parse
from modeling_llm2clip.cli.evaluate import _choose_datasets, _choose_models
from modeling_llm2clip.configs.evaluation_config import (
    EvaluatedDataset,
    EvaluatedModel,
    EvaluationConfig,
)
from modeling_llm2clip.evaluation.evaluate import _read_prompt_files
from modeling_llm2clip.evaluation.results import read_result


def test_the_command_evaluates_and_shows_a_table(
    sources: Any, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    words = ["evaluate", f"ours={sources('llm2clip')}", sources("clip"), "--tasks", "cra"]
    words += ["--datasets", f"folder={data}", "--languages", "en", "--output", output]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "ours: cra on folder" in shown.err
    assert "folder: CRA" in shown.out and "ours" in shown.out
    assert main(["evaluate", "--table", "markdown", "--output", output]) == 0
    assert "| ours " in capsys.readouterr().out
    record = asdict(read_result(tmp_path / "out" / "ours" / "folder.cra.json"))
    assert record["run"]["model"] == sources("llm2clip")


def test_the_command_lists_datasets_and_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate"]) == 0
    shown = capsys.readouterr().out
    assert "coco" in shown and "emoji" in shown and "cross-lingual: " in shown


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes("\ufeffcat\ndog\n".encode())
    config = EvaluationConfig(class_names=tmp_path / "names.txt")
    assert _read_prompt_files(config).class_names == ("cat", "dog")


def choose_models(words: list[str]) -> list[EvaluatedModel]:
    call = parse(LINE, words)
    return _choose_models(call.args, call.keywords["model_type"])


def test_a_flag_goes_to_the_models_that_it_suits(sources: Any) -> None:
    words = ["evaluate", sources("clip"), "owner/hub-model", "--datasets", "emoji"]
    chosen = choose_models([*words, "--model-type", "transformers", "open_clip"])
    assert [model.model_type for model in chosen] == ["transformers", "open_clip"]


def test_the_name_of_a_dataset_is_never_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "emoji").mkdir()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "owner/model", "--datasets", "emoji", "mine"]
    chosen = _choose_datasets(parse(LINE, words).keywords["datasets"], ())
    mine = EvaluatedDataset(name="folder", folder="mine")
    assert chosen == [EvaluatedDataset(name="emoji"), mine]
