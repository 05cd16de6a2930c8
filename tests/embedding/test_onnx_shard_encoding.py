"""`embed` with ONNX graphs writes the model's embeddings and records the graphs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from embedding_runs import read_embeddings
from onnx_folders import shared_graphs, shared_source
from shared_models import ROUNDING
from tiny import draw_noise

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.encoding_config import EmbedConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import Modality
from modeling_llm2clip.embedding.embed import embed
from modeling_llm2clip.embedding.embedding_manifest import EmbeddingManifest
from modeling_llm2clip.model_folders.onnx_folder import choose_graph, data_file, load_onnx_encoder

TORCH = EmbedConfig(rows_per_shard=4, show_progress=False, device="cpu")
ONNX = replace(TORCH, backend="onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for number in range(6):
        draw_noise(40 + number, 50, seed=number).save(folder / f"{number}.png")
        captions = [f"noise, number {number}", "a photo " * (1 + 5 * number)]
        lines.append(json.dumps({"image": f"{number}.png", "captions": captions}))
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["text", "image"])
def test_both_backends_write_the_same_embeddings(modality: str, data: Path, tmp_path: Path) -> None:
    records = load_records(data)
    wanted = embed(shared_source(), records, tmp_path / "torch", TORCH, modality=modality)  # type: ignore[arg-type]
    found = embed(shared_graphs(), records, tmp_path / "onnx", ONNX, modality=modality)  # type: ignore[arg-type]
    (ids, embeds), (_, expected) = read_embeddings(found), read_embeddings(wanted)
    assert len(ids) == len(records) * (2 if modality == "text" else 1)
    assert np.allclose(embeds, expected, atol=ROUNDING)
    first, second = (EmbeddingManifest.read(folder).fingerprint for folder in (wanted, found))
    assert {name: second[name] for name in first} == first
    assert set(second) - set(first) == {"graph", "tokenizer and settings"}


def test_embeddings_of_a_graph_are_not_taken_for_those_of_the_tower() -> None:
    """They would be compared with the tower's embeddings of the training images."""
    [batch] = load_onnx_encoder(shared_graphs()).iterate_images([draw_noise(40, 50)], [[0]])
    assert batch.embeds.norm().item() == pytest.approx(1, abs=ROUNDING)
    assert batch.tower_embeds is None


def test_an_output_of_other_weights_is_not_continued(data: Path, tmp_path: Path) -> None:
    records = load_records(data)
    embed(shared_graphs(), records, tmp_path / "out", ONNX, modality="text")
    with pytest.raises(ValueError, match="graph"):
        config = replace(ONNX, text_weights="int8")
        embed(shared_graphs(), records, tmp_path / "out", config, modality="text")


@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_partition_of_graphs_with_other_settings_is_refused(
    modality: Modality, data: Path, tmp_path: Path
) -> None:
    """The graph is recorded, but its tokenizer and settings may have been edited since."""
    graphs = shutil.copytree(shared_graphs(), tmp_path / "graphs")
    records = load_records(data)
    embed(graphs, records, tmp_path / "out", ONNX, modality=modality, partition="1/2")
    for name, fields in {
        "config.json": {"max_text_length": 16},
        "tokenizer.json": {"normalizer": {"type": "Lowercase"}},
        "preprocessor_config.json": {"image_mean": [0.1, 0.1, 0.1]},
        "tokenizer_config.json": {"truncation_side": "left"},
    }.items():
        whole = (graphs / name).read_text("utf-8")
        (graphs / name).write_text(json.dumps({**json.loads(whole), **fields}), "utf-8")
        with pytest.raises(ValueError, match="holds a different output: tokenizer and settings"):
            embed(graphs, records, tmp_path / "out", ONNX, modality=modality, partition="2/2")
        (graphs / name).write_text(whole, "utf-8")


def test_weights_next_to_a_graph_are_part_of_it(data: Path, tmp_path: Path) -> None:
    """Graphs over 2 GB keep their weights in a separate file."""
    graphs = shutil.copytree(shared_graphs(), tmp_path / "graphs")
    graph = choose_graph(graphs, "text", None)
    onnx.save(
        onnx.load(graph), graph,
        save_as_external_data=True, location=data_file(graph).name, size_threshold=1024,
    )  # fmt: skip
    records = load_records(data)
    embed(graphs, records, tmp_path / "out", ONNX, modality="text", partition="1/2")
    content = bytearray(data_file(graph).read_bytes())
    content[-1] ^= 1
    data_file(graph).write_bytes(content)
    with pytest.raises(ValueError, match="holds a different output: graph: "):
        embed(graphs, records, tmp_path / "out", ONNX, modality="text", partition="2/2")


def test_the_command_runs_graphs_and_refuses_what_they_cannot(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["embed", str(shared_graphs()), str(data), str(tmp_path / "out"), "--modality", "image"]
    assert main(words) == 2
    assert "folder of ONNX graphs" in capsys.readouterr().err
    assert main([*words, "--backend", "onnx", "--device", "cuda"]) == 2
    assert "runs on the CPU" in capsys.readouterr().err
    assert main([*words, "--backend", "onnx"]) == 0
    assert "6 embeddings" in capsys.readouterr().out
