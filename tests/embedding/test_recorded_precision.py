"""Outputs say how their embeddings were computed, unless on a CPU in the stored dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from embedding_runs import make_few_texts
from extracting import EXACT, extract_captions
from indexes import build, save_images
from tiny import tiny_images
from tiny_folders import export_tiny_model

from modeling_llm2clip.configs.encoding_config import EmbedConfig
from modeling_llm2clip.configs.evaluation_config import EvaluatedModel, EvaluationConfig
from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.data.store.store_manifest import StoreManifest
from modeling_llm2clip.encoding.precision import DeviceTraits
from modeling_llm2clip.evaluation.encoders.auto import load_encoder
from modeling_llm2clip.search.image_index import ImageIndex

RECORD = {"precision": "bfloat16", "device": "cpu", "attention": "sdpa", "float32 products": "ieee"}
BOTH = "precision: {} in the store, {} now"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny_model(tmp_path_factory.mktemp("model") / "model", text_adapter_layers=1)


def test_a_store_is_continued_only_in_its_precision(model: Path, tmp_path: Path) -> None:
    records = make_few_texts(6)
    rounded = extract_captions(model, records, tmp_path / "a", replace(EXACT, precision="bfloat16"))
    exact = extract_captions(model, records, tmp_path / "b")
    stated = extract_captions(model, records, tmp_path / "c", replace(EXACT, precision="float32"))
    plans = [StoreManifest.read(store).plan for store in (rounded, exact, stated)]
    assert plans[0] == {**plans[1], **RECORD} and plans[1] == plans[2]
    assert (exact / "manifest.json").read_bytes() == (stated / "manifest.json").read_bytes()
    rows = [
        torch.as_tensor(EmbeddingStore.open(s).read(range(9))).float() for s in (rounded, exact)
    ]
    assert not torch.equal(*rows) and F.cosine_similarity(*rows).min() > 0.999
    with pytest.raises(ValueError, match=BOTH.format("'bfloat16'", None)):
        extract_captions(model, records, rounded)
    with pytest.raises(ValueError, match=BOTH.format(None, "'bfloat16'")):
        extract_captions(model, records, exact, replace(EXACT, precision="bfloat16"))


def test_an_index_is_updated_only_in_its_precision(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lancedb")
    images, path = save_images(tmp_path / "images"), tmp_path / "index"
    index, _ = build(model, images, path, precision="bfloat16")
    assert index.about.precision == RECORD
    again, _ = build(model, images, path)  # which encodes nothing
    assert again.about.precision == RECORD
    tiny_images(3)[1].save(images / "new.png")
    with pytest.raises(ValueError, match=BOTH.format("'bfloat16'", None)):
        build(model, images, path)
    assert build(model, images, path, precision="bfloat16")[0].count() == 7
    exact, _ = build(model, images, tmp_path / "exact")
    assert not exact.about.precision
    queries = [ImageIndex.open(path, device="cpu", precision=p) for p in ("auto", "bfloat16")]
    cosines = [found.search("a dog", top_k=1).hits[0][1] for found in queries]
    assert cosines[0] != cosines[1] and abs(cosines[0] - cosines[1]) < 0.05


def test_results_name_the_dtype_that_a_comparison_chose(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(**options: str) -> tuple[str, object]:
        config = EvaluationConfig(device="cpu", **options)  # type: ignore[arg-type]
        found = load_encoder(EvaluatedModel(source=str(model)), config).description
        return found.dtype, found.run.get("towers")

    assert describe() == describe(dtype="saved") == ("float32", None)
    gpu = DeviceTraits("cuda", has_bfloat16=True, free_bytes=2**40)
    monkeypatch.setattr(DeviceTraits, "read", lambda _: gpu)
    assert describe() == ("bfloat16 towers", RECORD)
    assert describe(dtype="saved") == ("float32", None)


def test_a_cpu_that_multiplies_bfloat16_uses_and_records_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, images = make_few_texts(6), save_images(tmp_path / "images")
    exact = extract_captions(model, records, tmp_path / "exact")
    fast_cpu = DeviceTraits("cpu", has_bfloat16=True)
    monkeypatch.setattr(DeviceTraits, "read", lambda _: fast_cpu)
    store = extract_captions(model, records, tmp_path / "store")
    assert StoreManifest.read(store).plan == {**StoreManifest.read(exact).plan, **RECORD}
    with pytest.raises(ValueError, match="--precision float32 if it has no precision"):
        extract_captions(model, records, exact)
    extract_captions(model, records, exact, replace(EXACT, precision="float32"))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=BOTH.format("'bfloat16'", None)):  # a slow CPU
        extract_captions(model, records, store)
    extract_captions(model, records, store, replace(EXACT, precision="bfloat16"))
    pytest.importorskip("lancedb")
    monkeypatch.setattr(DeviceTraits, "read", lambda _: fast_cpu)
    assert build(model, images, tmp_path / "index")[0].about.precision == RECORD


@pytest.mark.parametrize("config_type", [EmbedConfig, ServeConfig])
def test_graphs_have_a_precision_of_their_own(config_type: type[EmbedConfig | ServeConfig]) -> None:
    with pytest.raises(ValueError, match="precision=float32: backend='onnx' runs graphs"):
        config_type(backend="onnx", precision="float32")
