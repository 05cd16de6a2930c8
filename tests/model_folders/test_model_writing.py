"""One writer: what a model folder has, whether its model is loaded or read lazily."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from shared_models import shared_model
from tiny import tiny_model

from modeling_llm2clip import LLM2CLIPModel, load_heads, save_heads
from modeling_llm2clip.heads_llm2clip import TOWERS
from modeling_llm2clip.model_folders.model_card import CardData, CardResult, read_card_data
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.model_folders.model_writing import (
    cast_weights,
    find_carried_files,
    open_model,
    save_model,
    save_trained_model,
)
from modeling_llm2clip.model_folders.training_images import (
    TrainingImages,
    read_training_images,
    summarize_images,
    write_training_images,
)
from modeling_llm2clip.model_folders.weights import LazyTensor

RESULT = CardResult("retrieval", "COCO", {"t2i_r1": 0.5})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that states all there is to state; not to be changed."""
    card = CardData(
        license="mit", vision_license="mit", text_license="llama3.2",
        training_data=("owner/images",), results=(RESULT,),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("source") / "model"
    save_model(*shared_model(), folder, instructions={"query": "find: "}, card=card)
    model, generator = shared_model()[0], torch.Generator().manual_seed(0)
    embeds = torch.randn(32, model.visual_projection.in_features, generator=generator)
    summary = summarize_images(embeds, name="owner/images", num_images=32)
    write_training_images(folder, TrainingImages((summary,)))
    return folder


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for file in folder.glob("model*.safetensors"):
        weights |= load_file(file)
    return weights


def test_a_lazy_model_is_written_like_a_loaded_one_file_by_file(
    source: Path, tmp_path: Path
) -> None:
    model, processor = load_model(source, device="cpu")
    card = read_card_data(source)
    loaded = save_model(model, processor, tmp_path / "loaded", card=card)
    lazy = save_model(open_model(loaded), processor, tmp_path / "lazy", card=card, name="loaded")
    names = {path.name for path in loaded.iterdir()}
    assert {path.name for path in lazy.iterdir()} == names
    for name in names:
        if name.endswith(".safetensors"):
            first, second = load_file(loaded / name), load_file(lazy / name)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)
        elif (loaded / name).is_file():
            assert (loaded / name).read_bytes() == (lazy / name).read_bytes(), name


def test_memory_holds_one_file_of_a_lazy_model(source: Path, tmp_path: Path) -> None:
    files: list[set[str]] = []
    original = open_model(source)
    folder = tmp_path / "new"

    def watch(tensor: LazyTensor) -> LazyTensor:
        def read() -> torch.Tensor:
            done = {path.name for path in tmp_path.glob(".new-*/new/model-*")}
            files.append(done)
            return tensor.read()

        return LazyTensor(tensor.shape, tensor.dtype, read)

    watched = {name: watch(tensor) for name, tensor in original.weights.items()}
    model = replace(original, weights=watched)
    save_model(model, load_model(source, device="cpu")[1], folder, max_shard_size="60KB")
    shards = len(list(folder.glob("model-*.safetensors")))
    assert shards > 2
    # Tensors of a file are read when all files before it are on the disk.
    assert {len(done) for done in files} == set(range(shards))


def test_another_dtype_rounds_every_weight_but_the_temperature(source: Path) -> None:
    before = open_model(source)
    for name, tensor in cast_weights(before.weights, torch.bfloat16, before.model_class).items():
        dtype = torch.float32 if name.startswith("logit_scale") else torch.bfloat16
        assert tensor.dtype == tensor.read().dtype == dtype
        assert torch.equal(tensor.read(), before.weights[name].read().to(dtype))


def test_a_folder_that_fails_verification_leaves_nothing(
    tmp_path: Path,
) -> None:
    seen: list[list[str]] = []

    def refuse(folder: Path) -> None:
        seen.append(sorted(path.name for path in folder.iterdir()))
        raise ValueError("not like this")

    with pytest.raises(ValueError, match="not like this"):
        save_model(*shared_model(), tmp_path / "model", verify=refuse)
    assert list(tmp_path.iterdir()) == []
    assert {"README.md", "config.json", "golden_embeddings.safetensors"} <= set(seen[0])


def test_only_licenses_and_records_are_carried_over(tmp_path: Path) -> None:
    for name in ("LICENSE", "LICENSE.txt", "Notice.md", "USE_POLICY.md", "conversion.json",
                 "model.onnx", "pytorch_model.bin", "notes.txt", "README.md"):  # fmt: skip
        (tmp_path / name).touch()
    legal = {"LICENSE", "LICENSE.txt", "Notice.md", "USE_POLICY.md"}
    assert set(find_carried_files(tmp_path)) == {*legal, "conversion.json"}
    trained = find_carried_files(tmp_path, trained_since=True)
    assert set(trained) == {*legal, "conversion_before_training.json"}


def test_a_trained_folder_keeps_licenses_adds_its_data_and_drops_old_results(
    source: Path, tmp_path: Path
) -> None:
    (source / "LICENSE").write_text("mine", encoding="utf-8")
    moved = read_weights(source)["text_projection.bias"] + 1
    folder = save_trained_model(
        source, {"text_projection.bias": moved}, tmp_path / "trained",
        training_data=["new", "owner/images"],
    )  # fmt: skip
    assert torch.equal(read_weights(folder)["text_projection.bias"], moved)
    assert (folder / "LICENSE").read_text(encoding="utf-8") == "mine"
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert settings["prompts"]["query"] == "find: "
    stated = read_card_data(source)
    expected = replace(stated, results=(), training_data=("owner/images", "new"))
    assert stated.results and read_card_data(folder) == expected


@pytest.mark.parametrize("part", ["text_projection", "visual_projection"])
def test_a_model_that_gives_nan_is_not_written(part: str, tmp_path: Path) -> None:
    model, processor = tiny_model()
    getattr(model, part).weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"not saved.*returns NaN or infinity for "):
        save_model(model, processor, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


class Scaled(LLM2CLIPModel):
    """Gives other embeddings than the code that an export writes."""


@pytest.mark.parametrize(("kind", "way_out"), [("Scaled", "with its own code"), ("Peft", "Merge")])
def test_a_model_of_a_foreign_class_is_not_written(kind: str, way_out: str, tmp_path: Path) -> None:
    model, processor = tiny_model()
    if kind == "Scaled":
        other: Any = Scaled(model.config, model.vision_model, model.text_model)
    else:
        other = get_peft_model(model, LoraConfig(target_modules=r"text_model\..*q_proj"))
    with pytest.raises(ValueError, match=rf"not a {kind}.*{way_out}"):
        save_model(other, processor, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_heads_that_a_loop_of_its_own_trained_are_written_with_the_towers(
    source: Path, tmp_path: Path
) -> None:
    model = load_heads(source)
    assert not any(name.startswith(TOWERS) for name in model.state_dict())
    generator = torch.Generator().manual_seed(0)
    captions = torch.randn(16, model.config.text_width, generator=generator)
    images = torch.randn(16, model.visual_projection.in_features, generator=generator)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        logits = model.to_text_embeds(captions) @ model.to_image_embeds(images).T
        loss = torch.nn.functional.cross_entropy(logits * 10, torch.arange(16))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    with pytest.raises(ValueError, match=r"without its towers.* with save_heads"):
        model.save_pretrained(tmp_path / "trained")
    folder = save_heads(model.eval(), tmp_path / "trained", training_data=["owner/more"])
    known, summary = read_training_images(source), read_training_images(folder)
    assert known is not None and summary is not None
    assert torch.equal(summary.datasets[0].clusters, known.datasets[0].clusters)
    assert summary.list_names() == ("owner/more", "owner/images")
    assert summary.not_summarized == ("owner/more",)  # whose images are unknown
    trained, _ = load_model(folder, device="cpu")
    assert torch.equal(trained.to_text_embeds(captions), model.to_text_embeds(captions))
    assert torch.equal(trained.to_image_embeds(images), model.to_image_embeds(images))
    before, after = read_weights(source), read_weights(folder)
    towers = [name for name in before if name.startswith(TOWERS)]
    assert towers and all(torch.equal(before[name], after[name]) for name in towers)
    assert trained.config.random_heads == []
    assert read_card_data(folder).training_data == ("owner/images", "owner/more")


def test_heads_of_a_model_with_towers_are_not_written(source: Path, tmp_path: Path) -> None:
    model, _ = load_model(source, device="cpu")
    with pytest.raises(TypeError, match="needs a model from load_heads, not a LLM2CLIPModel"):
        save_heads(model, tmp_path / "trained")


def test_heads_in_half_precision_are_trained_in_float32(source: Path, tmp_path: Path) -> None:
    model, processor = load_model(source, device="cpu", dtype=torch.bfloat16)
    half = save_model(model, processor, tmp_path / "half")
    heads = load_heads(half)
    assert {weight.dtype for weight in heads.state_dict().values()} == {torch.float32}
    written = read_weights(save_heads(heads, tmp_path / "trained"))
    before = read_weights(half)
    assert all(torch.equal(before[name], weight) for name, weight in written.items())
    assert {name: weight.dtype for name, weight in written.items()} == {
        name: weight.dtype for name, weight in before.items()
    }


def test_heads_are_not_written_with_other_towers_or_names(source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "model")
    heads = load_heads(folder)
    heads.text_adapter = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"differ in their weights: text_adapter\."):
        save_heads(heads, tmp_path / "trained")
    heads = load_heads(folder)
    (folder / "model.safetensors").touch()
    with pytest.raises(ValueError, match="has changed since load_heads"):
        save_heads(heads, tmp_path / "trained")
    assert not (tmp_path / "trained").exists()
