"""A server on ONNX graphs answers as one on the model."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from breaking import set_config
from indexes import build, save_images
from onnx_folders import shared_graphs, shared_source
from served_apps import MIXED_TEXTS, to_png
from shared_models import ROUNDING
from tiny import draw_noise

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.serving.service import EmbeddingService

ONNX = ServeConfig(backend="onnx")


@pytest.mark.slow
def test_onnx_and_torch_give_the_same_embeddings_labels_and_token_counts() -> None:
    inputs = [*MIXED_TEXTS, *(to_png(draw_noise(seed=seed)) for seed in range(3))]
    results = []
    for source, config in ((shared_source(), ServeConfig()), (shared_graphs(), ONNX)):
        service = EmbeddingService.open(source, config)
        embedded = asyncio.run(service.embed(inputs))
        queries = asyncio.run(service.embed(inputs, prompt_name="query"))
        classified = asyncio.run(service.classify(inputs[-1:], ["a dog", "noise"]))  # type: ignore[arg-type]
        results.append((embedded, queries, classified))
        service.close()
    (expected, expected_queries, expected_labels), (texts, queries, labels) = results
    assert np.allclose(texts.embeds, expected.embeds, atol=ROUNDING)
    assert np.allclose(queries.embeds, expected_queries.embeds, atol=ROUNDING)
    assert not np.allclose(queries.embeds, texts.embeds, atol=100 * ROUNDING)
    assert (texts.num_tokens, texts.truncated) == (expected.num_tokens, expected.truncated)
    assert [t.label for t in labels.tags[0]] == [t.label for t in expected_labels.tags[0]]
    # The temperature is recorded with six digits behind the point.
    assert labels.tags[0][0].probability == pytest.approx(
        expected_labels.tags[0][0].probability, abs=1e-4
    )


def test_a_model_and_its_graphs_are_not_taken_for_each_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", str(shared_graphs()), "--port", "0"]) == 2
    assert "folder of ONNX graphs" in capsys.readouterr().err
    assert main(["serve", str(shared_source()), "--port", "0", "--backend", "onnx"]) == 2
    assert "is not a folder of ONNX graphs" in capsys.readouterr().err
    assert main(["serve", str(shared_source()), "--text-weights", "int8"]) == 2
    assert "text_weights=int8 needs backend=" in capsys.readouterr().err


def test_an_untrained_model_is_refused_as_in_torch(tmp_path: Path) -> None:
    graphs = Path(shutil.copytree(shared_graphs(), tmp_path / "graphs"))
    set_config(random_heads=["text_projection"])(graphs)
    with pytest.raises(ValueError, match="refused for serving"):
        EmbeddingService.open(graphs, ONNX)


def test_an_index_is_searched_by_the_graphs_of_its_model(tmp_path: Path) -> None:
    images = save_images(tmp_path / "images")
    index, _ = build(shared_source(), images, tmp_path / "db")
    for config in (ONNX, replace(ONNX, text_weights="int8")):
        service = EmbeddingService.open(shared_graphs(), config, index=str(tmp_path / "db"))
        queries = ["a dog", (images / "1.png").read_bytes()]
        of_text, of_image = asyncio.run(service.search(queries, top_k=6)).results
        service.close()
        assert of_image.hits[0][0] == images / "1.png"
        wanted = dict(index.search("a dog").hits)
        for path, cosine in of_text.hits:
            # int8 weights are kept where each embedding's cosine with the model's is 0.999 or more,
            # so it is at most 0.045 away.
            assert cosine == pytest.approx(wanted[path], abs=0.045)
