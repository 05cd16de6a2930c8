"""Recorded results on a model card are of the very model that the card describes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from published_datasets import write_own_folder
from tiny_folders import export_tiny_model

from modeling_llm2clip.configs.evaluation_config import EvaluatedModel, EvaluationConfig
from modeling_llm2clip.configs.export_config import ExportConfig
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.evaluation.results import Result, write_result
from modeling_llm2clip.model_folders.model_card import CardResult, read_card_data
from modeling_llm2clip.publishing.export_model import export_model, read_card_results


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


def test_scores_are_named_by_their_path_and_details_stay_in_the_file(tmp_path: Path) -> None:
    interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    scores = {
        "t2i": {"hit_rate_at_1": 0.5, "intervals": {"hit_rate_at_1": interval}},
        "accuracy": {**interval, "chance": 0.125},
        "languages": {"de": {"hit_rate_at_1": 0.5}},
        "buckets": [{"hit_rate_at_1": interval}],
        "share_truncated": None,
    }
    data = {"lang": "en", "images": 8}
    result = Result(
        model="m", task="retrieval", dataset="coco", scores=scores, fingerprint={"weights": "0"},
        protocol={"data": data, "model": {"dtype": "float32"}}, counts={"images": 8, "texts": 40},
    )  # fmt: skip
    write_result(tmp_path / "coco.json", result)
    assert read_card_results([tmp_path / "coco.json"]) == (
        CardResult(
            "retrieval",
            "coco",
            {"t2i.hit_rate_at_1": 0.5, "accuracy": 0.5, "accuracy.chance": 0.125},
            intervals={"t2i.hit_rate_at_1": (0.25, 0.75), "accuracy": (0.25, 0.75)},
            count="8 images, 40 texts",
        ),
    )
    files = [tmp_path / "coco.json"] * 2 + [tmp_path / "notes.json", tmp_path / "absent.json"]
    files[2].write_text(json.dumps({"task": "t", "dataset": "d", "scores": {"r1": 0.5}}), "utf-8")
    with pytest.raises(ValueError) as refused:
        read_card_results(files)
    for error in ("is given twice", "notes.json is not a result of an", "absent.json"):
        assert error in str(refused.value)
