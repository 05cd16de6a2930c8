"""Recorded results on a model card are of the very model that the card describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from published_datasets import write_own_folder
from tiny_folders import export_tiny_model

from modeling_llm2clip.configs.evaluation_config import EvaluatedModel, EvaluationConfig
from modeling_llm2clip.configs.export_config import ExportConfig
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.model_folders.model_card import CardResult, read_card_data
from modeling_llm2clip.publishing.card_results import read_card_results
from modeling_llm2clip.publishing.export_model import export_model


def test_a_card_takes_results_of_its_own_model_in_its_own_dtype_alone(tmp_path: Path) -> None:
    model = export_tiny_model(tmp_path / "model")
    data = write_own_folder(tmp_path / "data")
    evaluate(
        EvaluatedModel(source=str(model), name="ours"),
        data,
        EvaluationConfig(languages=("de",), output=tmp_path / "out"),
        tasks=("retrieval",),
    )
    file = tmp_path / "out" / "ours" / "folder.retrieval.json"
    (result,) = read_card_results([file])
    assert result.dataset == "folder [de]"  # a language other than English is named
    scores, counts = (json.loads(file.read_text("utf-8"))[name] for name in ("scores", "counts"))
    of_i2t = scores["i2t"]["intervals"]["hit_rate_at_1"]
    assert result.intervals["i2t.hit_rate_at_1"] == (of_i2t["low"], of_i2t["high"])
    assert result.count == f"{counts['images']} images, {counts['texts']} texts"
    written = export_model(model, tmp_path / "new", ExportConfig(results=(file,)))
    assert read_card_data(written).results == (result,)
    with pytest.raises(ValueError, match=r"\(weights, dtype\): not measured with the model"):
        export_model(model, tmp_path / "half", ExportConfig(dtype="float16", results=(file,)))
    assert not (tmp_path / "half").exists()


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_results_are_read_from_files_of_one_or_of_many(tmp_path: Path) -> None:
    one = {"task": "retrieval", "dataset": "A", "scores": {"r1": 0.5}, "versions": {"torch": "2"}}
    two = [{**one, "dataset": "B"}, {**one, "dataset": "C", "scores": {"r1": 1}}]
    paths = [write_json(tmp_path / "1.json", one), write_json(tmp_path / "2.json", two)]
    assert read_card_results(paths) == (
        CardResult("retrieval", "A", {"r1": 0.5}),
        CardResult("retrieval", "B", {"r1": 0.5}),
        CardResult("retrieval", "C", {"r1": 1}),
    )


def test_scores_that_llm2clip_evaluate_nests_are_named_by_their_path(tmp_path: Path) -> None:
    interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    written = {
        "model": "m", "task": "retrieval", "dataset": "coco", "format_version": 1, "seconds": 1.5,
        "count": "1,000 images",
        "scores": {
            "t2i": {"hit_rate_at_1": 0.5, "intervals": {"hit_rate_at_1": interval}},
            "accuracy": {**interval, "chance": 0.125},
            "languages": {"de": {"hit_rate_at_1": 0.5}},
            "buckets": [{"hit_rate_at_1": interval}],
            "share_truncated": None,
        },
    }  # fmt: skip
    (result,) = read_card_results([write_json(tmp_path / "coco.json", written)])
    assert result == CardResult(
        "retrieval",
        "coco",
        {"t2i.hit_rate_at_1": 0.5, "accuracy": 0.5, "accuracy.chance": 0.125},
        intervals={"t2i.hit_rate_at_1": (0.25, 0.75), "accuracy": (0.25, 0.75)},
        count="1,000 images",
    )


def test_every_error_of_the_results_is_named_at_once(tmp_path: Path) -> None:
    good = {"task": "t", "dataset": "d", "scores": {"r1": 0.5}}
    contents = {
        "text": "hello",
        "untold": {"dataset": "d", "scores": {"r1": 0.5}},
        "unscored": {"task": "t", "dataset": "d", "scores": {}},
        "endless": {"task": "t", "dataset": "e", "scores": {"r1": float("nan"), "r5": True}},
        "twice": [good, good],
        "uncounted": {**good, "dataset": "f", "count": 7},
        "unbounded": {
            **good,
            "dataset": "g",
            "scores": {"r1": {"value": 1, "low": None, "high": 1}},
        },
    }
    paths = [write_json(tmp_path / f"{name}.json", value) for name, value in contents.items()]
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    paths += [tmp_path / "broken.json", tmp_path / "absent.json"]
    with pytest.raises(ValueError, match=r"Wanted: JSON with 'task'") as caught:
        read_card_results(paths)
    for error in (
        "text.json: holds str",
        r"untold.json: has no ['task']",
        "unscored.json: has no scores",
        "endless.json: has scores that are not finite numbers: ['r1', 'r5']",
        "twice.json: t on d is given twice",
        "uncounted.json: has count=7, wanted a text",
        "unbounded.json: has scores that are not finite numbers: ['r1']",
        "broken.json: Expecting",
        "absent.json: [Errno 2]",
    ):
        assert error in str(caught.value)
