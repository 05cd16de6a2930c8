"""Recorded results on a model card are of the very model that the card describes."""

from __future__ import annotations

from pathlib import Path

import pytest
from published_datasets import write_own_folder
from tiny_folders import export_tiny_model

from modeling_llm2clip.configs.evaluation_config import EvaluatedModel, EvaluationConfig
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.model_folders.model_card_data import read_card_facts, read_results
from modeling_llm2clip.publishing.export_model import ExportArguments, export_model


def test_a_card_takes_results_of_its_own_model_in_its_own_dtype_alone(tmp_path: Path) -> None:
    model = export_tiny_model(tmp_path / "model")
    data = write_own_folder(tmp_path / "data")
    evaluate(
        EvaluatedModel(source=str(model), name="ours"),
        data,
        EvaluationConfig(languages=("de",), output=tmp_path / "out"),
        tasks=("retrieval",),
    )
    (result,) = read_results([tmp_path / "out" / "ours" / "folder.retrieval.json"])
    assert result.dataset == "folder [de]"  # a language other than English is named
    written = export_model(model, tmp_path / "new", facts={"results": (result,)})
    assert read_card_facts(written).results == (result,)
    with pytest.raises(ValueError, match=r"\(weights, dtype\): not measured with the model"):
        export_model(
            model, tmp_path / "half", ExportArguments(dtype="float16"), facts={"results": (result,)}
        )
