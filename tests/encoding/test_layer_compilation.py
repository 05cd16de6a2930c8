"""Compiled layers give the embeddings of plain ones; what cannot compile is refused."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_models import ROUNDING
from tiny import draw_noise, tiny_model
from tiny_folders import export_tiny_model
from torch._dynamo import lookup_backend

from modeling_llm2clip import encode_images, encode_texts
from modeling_llm2clip.configs.encoding_config import EmbedConfig, ExtractConfig
from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.embedding import shard_encoding
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.encoding import devices
from modeling_llm2clip.encoding.devices import require_compiler
from modeling_llm2clip.encoding.layer_compilation import compile_layers
from modeling_llm2clip.serving import service

TEXTS = ["a dog", "two red apples on a wooden table by the window", "x"]
IMAGES = [draw_noise(), draw_noise(seed=1)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def require_plain_embeddings(backend: str) -> None:
    model, processor = tiny_model()
    encode = (partial(encode_texts, model, processor, TEXTS),
              partial(encode_images, model, processor, IMAGES))  # fmt: skip
    expected, names = [run() for run in encode], list(model.state_dict())
    compiled: list[Any] = []

    def note(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return lookup_backend(backend)(graph, inputs)

    compile_layers(model, backend=note)
    for run, embeds in zip(encode, expected, strict=True):
        num_before = len(compiled)
        torch.testing.assert_close(run(), embeds, rtol=ROUNDING, atol=ROUNDING)
        assert len(compiled) > num_before  # of each tower
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_compiled_towers_give_the_embeddings_of_plain_ones_and_keep_their_weights() -> None:
    require_plain_embeddings("aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="kernels for a CPU need a compiler")
def test_kernels_of_both_towers_equal_plain_layers() -> None:
    require_plain_embeddings("inductor")


def test_a_device_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"a C\+\+ compiler, but no-such-compiler is missing"):
        require_compiler(torch.device("cpu"))
    with pytest.raises(ValueError, match="not mps"):
        require_compiler(torch.device("mps"))
    for spec in (object(), None):
        monkeypatch.setattr(devices, "find_spec", lambda _, spec=spec: spec)
        if spec is not None:
            require_compiler(torch.device("cuda"))
    with pytest.raises(ValueError, match="needs Triton"):
        require_compiler(torch.device("cuda"))


def test_without_a_compiler_nothing_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"C\+\+ compiler"):
        config = ExtractConfig(compile=True, device="cpu")
        extract("no-model", [], tmp_path / "store", config, modality="text")
    with pytest.raises(ValueError, match=r"C\+\+ compiler"):
        service.EmbeddingService.open("no-model", ServeConfig(compile=True, device="cpu"))
    for kind in (EmbedConfig, ServeConfig):
        with pytest.raises(ValueError, match="compile=True needs backend='torch'"):
            kind(backend="onnx", compile=True)


def test_a_server_compiles_the_model_that_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(service, "compile_layers", compiled.append)
    monkeypatch.setenv("CXX", "true")
    model = export_tiny_model(tmp_path / "model")
    for compiles in (False, True):
        config = ServeConfig(device="cpu", compile=compiles)
        opened = service.EmbeddingService.open(model, config)
        opened.close()
        assert len(compiled) == compiles
    assert compiled[0] is opened.encoder._find_model("text")


@pytest.mark.slow
def test_a_compiled_store_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = export_tiny_model(tmp_path / "model")
    records = [CaptionedImage(None, str(n), str(n), (text,)) for n, text in enumerate(TEXTS)]
    monkeypatch.setattr(shard_encoding, "compile_layers", partial(compile_layers, backend="eager"))
    monkeypatch.setenv("CXX", "true")  # a program that there is, which is not called

    def run(folder: Path, **options: Any) -> torch.Tensor:
        config = ExtractConfig(store_dtype="float32", device="cpu", show_progress=False, **options)
        store = EmbeddingStore.open(extract(model, records, folder, config, modality="text"))
        return torch.as_tensor(store.read(range(len(TEXTS))))

    compiled = run(tmp_path / "compiled", compile=True)
    # Sums in another order, of embeddings whose numbers are about one.
    torch.testing.assert_close(compiled, run(tmp_path / "plain"), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="compiled: 'layers' in the store, None now"):
        run(tmp_path / "compiled")
