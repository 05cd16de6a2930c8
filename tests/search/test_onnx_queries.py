"""An index is searched by the ONNX graphs of its model as by the model, without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from indexes import build, save_images, save_model
from launches import run_python
from onnx_folders import shared_graphs, shared_source
from shared_models import ROUNDING

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.search.image_index import ImageIndex

_WITHOUT_TORCH = """
import sys
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.encoding import encode_onnx
assert main(["search", *sys.argv[1:]]) == 0
loaded = {"torch", "transformers"} & set(sys.modules)
assert not loaded, loaded
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def db(images: Path) -> Path:
    build(shared_source(), images, images.parent / "db")
    return images.parent / "db"


@pytest.mark.slow
def test_a_sentence_finds_what_it_finds_with_the_model(db: Path) -> None:
    results = [
        ImageIndex.open(db, model=model).search("a dog") for model in (shared_graphs(), None)
    ]
    by_graphs, by_model = ([path for path, _ in result.hits] for result in results)
    assert by_graphs == by_model
    cosines = [[cosine for _, cosine in result.hits] for result in results]
    assert np.allclose(*cosines, atol=ROUNDING)


@pytest.mark.slow
def test_the_shell_searches_without_torch_and_reports_truncated_sentences(
    db: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(db), "a dog", "--model", str(shared_graphs()), "--format", "json"]
    printed = run_python("-c", _WITHOUT_TORCH, *words)
    assert main(["search", *words[:2], "--format", "json"]) == 0
    apart, here = (json.loads(text)[0] for text in (printed, capsys.readouterr().out))
    assert apart.keys() == here.keys()
    for words in (["dog " * 200], ["dog " * 200, "--model", str(shared_graphs())]):
        assert main(["search", str(db), *words]) == 0
        assert (
            "Truncated 1 of 1 sentence to the model's limit of 128 tokens"
            in capsys.readouterr().err
        )


@pytest.mark.slow
def test_the_graphs_of_another_model_are_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(save_model(tmp_path / "other"), images, tmp_path / "db")
    words = [str(tmp_path / "db"), "a dog", "--model", str(shared_graphs())]
    assert main(["search", *words]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "other") in error and "text weights" in error


def test_what_the_graphs_cannot_read_is_refused(
    db: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graphs = tmp_path / "graphs"
    shutil.copytree(shared_graphs(), graphs)
    search = ["search", str(db), "--model", str(graphs)]
    assert main([*search, " "]) == 2
    assert "has a blank sentence" in capsys.readouterr().err
    assert main([*search, "--image", str(images / "1.png")]) == 2
    assert "takes only sentences, but 1 of the" in capsys.readouterr().err
    shutil.rmtree(graphs / "onnx")
    assert main([*search, "a dog"]) == 2
    assert "no graph for texts" in capsys.readouterr().err
