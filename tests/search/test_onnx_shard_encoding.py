"""`embed` on ONNX graphs writes the model's embeddings, and says by what they were made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from onnx_folders import shared_graphs, shared_source
from shared_models import ROUNDING
from tiny import draw_noise

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.embed_config import EmbedConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.search.bulk_embedding import embed
from modeling_llm2clip.search.embedding_manifest import read_embedding_manifest

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


def read(folder: Path) -> np.ndarray:
    files = sorted(folder.glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file)["embedding"].to_pylist()]
    return np.array(rows, np.float32)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_both_backends_write_the_same_embeddings(modality: str, data: Path, tmp_path: Path) -> None:
    records = load_records(data)
    wanted = embed(shared_source(), records, tmp_path / "torch", TORCH, modality=modality)  # type: ignore[arg-type]
    found = embed(shared_graphs(), records, tmp_path / "onnx", ONNX, modality=modality)  # type: ignore[arg-type]
    assert len(read(found)) == len(records) * (2 if modality == "text" else 1)
    assert np.allclose(read(found), read(wanted), atol=ROUNDING)
    first, second = (read_embedding_manifest(folder).fingerprint for folder in (wanted, found))
    assert {name: second[name] for name in first} == first and set(second) - set(first) == {"graph"}


def test_an_output_of_other_weights_is_not_continued(data: Path, tmp_path: Path) -> None:
    records = load_records(data)
    embed(shared_graphs(), records, tmp_path / "out", ONNX, modality="text")
    with pytest.raises(ValueError, match="graph"):
        config = replace(ONNX, text_weights="int8")
        embed(shared_graphs(), records, tmp_path / "out", config, modality="text")


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
