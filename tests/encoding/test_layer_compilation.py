"""Compiled layers give the embeddings of plain ones; what cannot compile is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import Prepared, prepare, read_losses
from safetensors.torch import load_file
from shared_models import ROUNDING
from tiny import draw_noise, tiny_model
from tiny_folders import export_tiny_model
from torch._dynamo import config as dynamo_config
from torch._dynamo import lookup_backend
from tuning import RECORDS, SHORT, tune

from modeling_llm2clip import encode_images, encode_texts
from modeling_llm2clip.configs.align_config import AlignConfig
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
from modeling_llm2clip.training.alignment import alignment_fit
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.alignment.alignment_model import (
    AlignmentModel,
    choose_trained_parts,
)
from modeling_llm2clip.training.finetuning import finetune_llm as stage_1
from modeling_llm2clip.training.trainer_mixins import require_compilable

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
    with pytest.raises(ValueError, match=r"C\+\+ compiler"):
        align("no-model", RECORDS, tmp_path / "aligned",
              AlignConfig(compile=True, device="cpu", text_training="frozen-online"))  # fmt: skip
    with pytest.raises(ValueError, match=r"C\+\+ compiler"):
        stage_1.finetune_llm("no-model", RECORDS, tmp_path / "t", replace(SHORT, compile=True))
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


def test_a_training_refuses_compilation_that_has_no_effect_or_breaks_a_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="deterministic=True cannot be combined with compile=True"):
        replace(SHORT, compile=True, deterministic=True)
    with pytest.raises(ValueError, match="compile=True has no effect if both sides are stored"):
        AlignConfig(compile=True).require_stores("captions", "images")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("CXX", "true")
    with pytest.raises(ValueError, match="compile=True is not supported under FSDP"):
        require_compilable(AlignConfig(compile=True), torch.device("cpu"))


def require_plain_gradients(llm: str, backend: str, options: dict[str, Any]) -> None:
    model, processor = tiny_model("clip", llm)
    aligned = AlignmentModel(model.config, with_llm=True)
    aligned.load_state_dict(model.state_dict())
    choose_trained_parts(aligned, AlignConfig(vision_training="full", text_training="lora"))
    aligned.mini_batch_size = options.get("mini_batch_size")
    if options.get("recomputes"):
        aligned.text_model.gradient_checkpointing_enable({"use_reentrant": False})
        aligned.vision_model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, weight in aligned.named_parameters():
        if "lora_B" in name:  # starts at zero, which would leave lora_A without a gradient
            torch.nn.init.normal_(weight, std=0.1)
    batch = {**processor(text=TEXTS), **processor(images=[*IMAGES, draw_noise(seed=2)])}

    def step() -> dict[str, torch.Tensor]:
        aligned.train().zero_grad(set_to_none=True)
        _, inputs = aligned(batch)
        loss = (inputs.image_embeds * inputs.text_embeds).sum().square()
        loss.backward()
        of = {n: p.grad for n, p in aligned.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **of}

    expected, names = step(), list(aligned.state_dict())
    compile_layers(aligned, backend=backend)
    found = step()
    assert list(aligned.state_dict()) == names and found.keys() == expected.keys()
    # Some gradients, as of a key's bias, are zero but for rounding: compare with the largest.
    largest = max(float(value.abs().max()) for name, value in expected.items() if name != "loss")
    torch.testing.assert_close(found.pop("loss"), expected.pop("loss"), rtol=1e-4, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("llm", ["llama", "qwen3"])
@pytest.mark.parametrize("options", [{}, {"recomputes": True}, {"mini_batch_size": 2}])
def test_a_compiled_step_has_the_loss_and_gradients_of_a_plain_one(
    llm: str, options: dict[str, Any]
) -> None:
    require_plain_gradients(llm, "aot_eager", options)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="kernels for a CPU need a compiler")
def test_kernels_of_a_training_step_have_the_gradients_of_plain_layers() -> None:
    require_plain_gradients("llama", "inductor", {"recomputes": True})


@dynamo_config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True)
def test_towers_of_one_library_do_not_use_up_the_graphs_that_torch_allows() -> None:
    """Else a layer would silently run plain: transformers' layers share one forward method."""
    model, _ = tiny_model()
    pixels = torch.rand(2, 3, 32, 32)
    compile_layers(model, backend="eager")
    for trains in (False, True):
        for in_bfloat16 in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
                model.train(trains).get_vision_embeds(pixels)


@pytest.mark.slow
def test_a_compiled_alignment_trains_and_saves_the_weights_of_a_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: Prepared = prepare(tmp_path / "prepared")
    compiled: list[Any] = []

    def compile_noted(model: Any) -> None:
        compiled.append(model)
        compile_layers(model, backend="aot_eager")

    monkeypatch.setattr(alignment_fit, "compile_layers", compile_noted)
    monkeypatch.setenv("CXX", "true")
    options: dict[str, Any] = {"vision_training": "lora", "distillation_weight": 1.0}
    runs = [
        prepared.align(tmp_path / str(compiles), compile=compiles, **options)
        for compiles in (False, True)
    ]
    assert len(compiled) == 2  # the trained tower and its frozen copy
    losses = [list(read_losses(run.output).values()) for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    plain, found = (
        load_file(run.output / "checkpoints" / "checkpoint-6" / "trained.safetensors")
        for run in runs
    )
    assert plain.keys() == found.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3)
    left = runs[1].copy_without_model(tmp_path / "left")
    with pytest.raises(ValueError, match="compile: True then, False now"):
        prepared.align(left, resume=True, **options)


@pytest.mark.slow
def test_a_compiled_fine_tuning_writes_the_lora_of_a_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_1, "compile_layers", partial(compile_layers, backend="aot_eager"))
    monkeypatch.setenv("CXX", "true")
    plain, found = (
        load_file(tune(tmp_path / str(compiles), replace(SHORT, compile=compiles)).weights)
        for compiles in (False, True)
    )
    assert plain.keys() == found.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3)
