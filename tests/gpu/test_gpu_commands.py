"""Every command on a GPU: it ends well, its record names the GPU, and its numbers are a CPU's.

`pytest -m gpu` takes two minutes where there is a GPU. The same tests run on a CPU, in the slow
suite, so that they are known to work.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from aligning import Prepared
from PIL import Image
from served_apps import from_base64, run_app, send

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.evaluation.results import read_result
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.serving.app import create_app
from modeling_llm2clip.serving.service import EmbeddingService
from modeling_llm2clip.training.run_folder import read_run_record

# A GPU runs the towers in bfloat16, for which this is the guard's bound.
LEAST_COSINE = 0.999

every_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param(
            "auto",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)


def run(device: str, *words: object) -> None:
    """Run a command; `auto` is its default."""
    assert main([*map(str, words), "--device", device]) == 0


def least_cosine(found: Any, wanted: Any) -> float:
    one, other = (np.asarray(side, np.float64) for side in (found, wanted))
    assert one.shape == other.shape
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / lengths).min())


def require_recorded(text: str, device: str) -> None:
    """A record names a GPU, and says nothing of a CPU, whose outputs stay as they were."""
    assert ("cuda" in text) == (device == "auto")


@pytest.fixture(scope="module")
def on_cpu(prepared: Prepared) -> dict[str, Any]:
    """Final embeddings of the dataset by a CPU: of its images, and of its first captions."""
    model, processor = load_model(prepared.model, device="cpu")
    records = prepared.records
    images = encode_images(model, processor, [record.image for record in records])
    texts = encode_texts(model, processor, [record.captions[0] for record in records])
    return {"image": images, "text": texts}


@every_device
@pytest.mark.parametrize("modality", ["text", "image"])
def test_extract(device: str, modality: str, prepared: Prepared, tmp_path: Path) -> None:
    output = tmp_path / "store"
    run(device, "extract", prepared.model, prepared.data, output, "--modality", modality)
    wanted = prepared.caption_store if modality == "text" else prepared.image_store
    rows = np.arange(wanted.manifest.num_rows)
    store = EmbeddingStore.open(output, check="full")
    assert least_cosine(store.read(rows), wanted.read(rows)) >= LEAST_COSINE
    require_recorded(json.dumps(store.manifest.plan), device)


@every_device
@pytest.mark.parametrize("modality", ["text", "image"])
def test_embed(
    device: str, modality: str, prepared: Prepared, on_cpu: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "embedded"
    run(device, "embed", prepared.model, prepared.data, output, "--modality", modality)
    table = pq.read_table(output)
    embeds = np.stack(table["embedding"].to_numpy())
    if modality == "image":
        assert least_cosine(embeds, on_cpu["image"]) >= LEAST_COSINE
    assert np.linalg.norm(embeds, axis=1) == pytest.approx(1, abs=1e-3)  # of any precision
    require_recorded((output / "_manifest.json").read_text(encoding="utf-8"), device)


@every_device
def test_index_search_and_tag(
    device: str,
    prepared: Prepared,
    on_cpu: dict[str, Any],
    tmp_path: Path,
    own_cache: Path,  # noqa: ARG001
    capsys: pytest.CaptureFixture[str],
) -> None:
    index = tmp_path / "index"
    run(device, "index", prepared.model, prepared.data, index)
    capsys.readouterr()
    caption = prepared.records[0].captions[0]
    run(device, "search", index, caption, "--format", "json", "--top-k", 24)
    hits = json.loads(capsys.readouterr().out)
    scores = {Path(hit["image"]).name: hit["cosine"] for hit in hits}
    cosines = on_cpu["image"] @ on_cpu["text"][0]
    wanted = {record.name: float(c) for record, c in zip(prepared.records, cosines, strict=True)}
    assert scores == pytest.approx(wanted, abs=0.09)  # two angles of cosine 0.999
    labels, output = tmp_path / "labels.txt", tmp_path / "tags.csv"
    labels.write_text("a dog\na red car\n", encoding="utf-8")
    run(device, "tag", prepared.model, prepared.data, "--labels", labels, "--output", output)
    with output.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["image"]).name for row in rows} == set(wanted)


@every_device
def test_evaluate(device: str, prepared: Prepared, tmp_path: Path) -> None:
    scores = {}
    for name, chosen in (("there", device), ("here", "cpu")):
        output = tmp_path / name
        words = ["evaluate", f"ours={prepared.model}", "--datasets", f"mine={prepared.data}"]
        run(chosen, *words, "--tasks", "retrieval", "--output", output)
        result = read_result(output / "ours" / "mine.retrieval.json")
        scores[name] = result.scores["t2i"]["recall_at_10"]
        require_recorded(json.dumps([result.protocol, result.run]), chosen)
    # Two of 48 texts may trade places where their scores are nearly equal.
    assert scores["there"] == pytest.approx(scores["here"], abs=2 / 48)


@every_device
def test_serve(device: str, prepared: Prepared, on_cpu: dict[str, Any]) -> None:
    service = EmbeddingService.open(str(prepared.model), ServeConfig(device=device))
    texts = [record.captions[0] for record in prepared.records]
    body = {"input": texts, "model": service.model_name, "encoding_format": "base64"}
    try:
        with run_app(create_app(service)) as url:
            status, answer, _ = send(f"{url}/v1/embeddings", body)
    finally:
        service.close()
    assert status == 200
    embeds = np.stack([from_base64(row["embedding"]) for row in answer["data"]])
    assert least_cosine(embeds, on_cpu["text"]) >= LEAST_COSINE


@every_device
def test_finetune_llm(device: str, prepared: Prepared, tmp_path: Path) -> None:
    output = tmp_path / "tuned"
    words = ["--max-steps", 2, "--per-device-train-batch-size", 4, "--num-held-out", 4]
    run(device, "finetune-llm", prepared.model, prepared.data, output, *words)
    record = read_run_record(output)
    assert record["inputs"]["in_bfloat16"] == (device == "auto")
    assert record["results"]["steps"] == 2
    assert main(["doctor", str(output / "model"), "--device", device]) == 0


@every_device
@pytest.mark.parametrize("vision", ["frozen", "lora", "full"])
def test_align(device: str, vision: str, prepared: Prepared, tmp_path: Path) -> None:
    """Beside a CPU's in float32, the losses of four steps differ by rounding alone."""
    stores = ["--caption-store", prepared.captions]
    stores += ["--image-store", prepared.images] if vision == "frozen" else []
    words = [*stores, "--vision-training", vision, "--max-steps", 4, "--global-batch-size", 8,
             "--held-out-ratio", 0, "--projection-init", "model", "--logging-steps", 1,
             "--precision", "float32"]  # fmt: skip
    losses = []
    for name, chosen in (("there", device), ("here", "cpu")):
        output = tmp_path / name
        run(chosen, "align", prepared.model, prepared.data, output, *words)
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert main(["doctor", str(tmp_path / "there" / "model"), "--device", device]) == 0


@every_device
def test_export_and_doctor(device: str, prepared: Prepared, tmp_path: Path) -> None:
    output = tmp_path / "exported"
    run(device, "export", prepared.model, output, "--license", "mit", "--dtype", "bfloat16")
    run(device, "doctor", output)
    model, processor = load_model(output, device=device)
    image = Image.new("RGB", (40, 40), (200, 90, 30))
    embeds = encode_images(model, processor, [image])
    expected = encode_images(*load_model(prepared.model, device="cpu"), [image])
    assert least_cosine(embeds, expected) >= LEAST_COSINE
