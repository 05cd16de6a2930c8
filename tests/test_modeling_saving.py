"""A saved model loads unchanged, with both towers or one, or an error names the wrong weights."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from shared_models import (
    CAPTIONS,
    ROUNDING,
    every_device,
    every_pair,
    first_position_moves_by,
    images_of,
    move,
    one_process_writes,
    shared_batch,
    shared_model,
    skip_where_names_are_garbled,
    texts_of,
)
from tiny import tiny_images, tiny_model
from transformers import (
    AutoModel,
    AutoModelForTextEncoding,
    AutoProcessor,
    Trainer,
    TrainingArguments,
    ViTConfig,
)
from transformers.models.llama import modeling_llama

from modeling_llm2clip import (
    LLM2CLIPConfig,
    LLM2CLIPModel,
    LLM2CLIPProcessor,
    LLM2CLIPTextModel,
    LLM2CLIPVisionModel,
)
from modeling_llm2clip.model_folders.fingerprint import fingerprint_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved two-tower model and its processor, which no test may change."""
    path = tmp_path_factory.mktemp("model")
    model, processor = shared_model()
    copy.deepcopy(model).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def copy_folder(source: Path, target: Path, change: Any) -> Path:
    """Copy a saved model, with `change` applied to its weights."""
    target.mkdir()
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


# Saving and loading


@every_pair
def test_saved_and_loaded_equals_before(vision: str, llm: str, tmp_path: Path) -> None:
    skip_where_names_are_garbled(vision)
    model, processor = shared_model(vision, llm)
    copy.deepcopy(model).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    loaded_processor = AutoProcessor.from_pretrained(tmp_path)
    assert not loaded.training and not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded) is LLM2CLIPModel and type(loaded_processor) is LLM2CLIPProcessor
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    batch, expected = (
        loaded_processor(text=CAPTIONS, images=tiny_images(3)),
        shared_batch(vision, llm),
    )
    assert batch.keys() == expected.keys()
    for name in expected:
        # The loaded image processor may be torchvision's in place of Pillow's; flat images.
        assert torch.allclose(batch[name], expected[name], atol=1e-6), name
    parts = {"text_embeds": texts_of(expected), "image_embeds": images_of(expected)}
    alone = {"text_embeds": LLM2CLIPTextModel, "image_embeds": LLM2CLIPVisionModel}
    for name, inputs in parts.items():
        single = alone[name].from_pretrained(tmp_path)
        with torch.no_grad():
            outputs = [part(**inputs) for part in (model, loaded, single)]
        # Equal weights may lie at other addresses, whose alignment picks other kernels.
        assert torch.allclose(outputs[1][name], outputs[0][name], atol=1e-6)
        assert torch.allclose(outputs[2][name], outputs[0][name], atol=1e-6)
        assert torch.equal(outputs[2].pooler_output, outputs[2][name])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda w: w.pop("text_adapter.blocks.0.up.weight"), r"Missing \(1\): \['text_adapter"),
        (lambda w: w.pop("logit_scale.log_scale"), r"Missing \(1\): \['logit_scale.log_scale'\]"),
        (lambda w: w.pop("text_model.norm.weight"), r"Missing \(1\): \['text_model.norm.weight'\]"),
        (lambda w: w.update({"surprise": torch.ones(2)}), r"Unexpected \(1\): \['surprise'\]"),
        (lambda w: w.update({"text_model.layers.7.mlp.up_proj.weight": torch.ones(2)}),
         r"Unexpected \(1\): \['text_model.layers.7.mlp.up_proj.weight'\]"),
        (lambda w: w.update({"text_projection.weight": torch.ones(5, 32)}),
         r"Wrong shape.*text_projection.weight.*5, 32.*32, 32"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(
    change: Any, error: str, folder: Path, tmp_path: Path
) -> None:
    broken = copy_folder(folder, tmp_path / "broken", change)
    for load in (LLM2CLIPModel, AutoModel):
        with pytest.raises(ValueError, match=error):
            load.from_pretrained(broken)


@pytest.mark.parametrize(
    ("auto_class", "model_class", "parts"),
    [
        (AutoModelForTextEncoding, LLM2CLIPTextModel,
         {"text_projection", "text_model", "text_adapter"}),
        (LLM2CLIPVisionModel, LLM2CLIPVisionModel, {"visual_projection", "vision_model"}),
    ],
)  # fmt: skip
def test_a_single_tower_model_is_strict_about_its_own_weights(
    auto_class: Any, model_class: Any, parts: set[str], folder: Path, tmp_path: Path
) -> None:
    before = auto_class.from_pretrained(folder)
    assert type(before) is model_class
    assert {name.split(".")[0] for name in before.state_dict()} == parts
    before.save_pretrained(tmp_path / "saved")
    after = model_class.from_pretrained(tmp_path / "saved").state_dict()
    assert before.state_dict().keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.state_dict().items())
    with pytest.raises(ValueError, match=r"Missing .*Use the class that saved the folder"):
        LLM2CLIPModel.from_pretrained(tmp_path / "saved")
    name = next(part for part in parts if part.endswith("projection"))
    broken = copy_folder(folder, tmp_path / "broken", lambda w: w.pop(f"{name}.weight"))
    with pytest.raises(ValueError, match=rf"Missing \(1\): \['{name}.weight'\]"):
        model_class.from_pretrained(broken)


def test_weights_that_transformers_saves_under_wrong_names_are_refused(tmp_path: Path) -> None:
    """Versions 5.6 to 5.8 rename layers of other parts by the rules of a DINOv3 tower."""
    model, _ = tiny_model("dinov3_vit", "llama")
    try:
        model.save_pretrained(tmp_path)
    except ValueError as error:
        assert "Upgrade transformers" in str(error)
        return
    loaded = LLM2CLIPModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("merges", [False, True])
def test_a_lora_that_is_not_unloaded_is_refused(merges: bool, tmp_path: Path) -> None:
    """peft renames the layers, so no loader would find them."""
    peft = pytest.importorskip("peft")
    model, _ = tiny_model()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    for layer in adapted.modules() if merges else ():
        if hasattr(layer, "base_layer"):
            layer.merge()
    with pytest.raises(ValueError, match=r"wraps 4 of its layers \(first: .*q_proj.*merge_and"):
        adapted.base_model.model.save_pretrained(tmp_path / "wrapped")
    assert not (tmp_path / "wrapped").exists()
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    LLM2CLIPModel.from_pretrained(tmp_path / "merged")


def test_a_refused_model_leaves_the_folder_unchanged(tmp_path: Path) -> None:
    """Neither weights nor code, which another package version may have written, are touched."""
    model = copy.deepcopy(shared_model()[0])
    model.config.projection_dims = 1
    with pytest.raises(ValueError, match="projection_dims"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_saved_folder_contains_no_local_path(folder: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    for path in tmp_path.glob("*.json"):
        assert str(folder) not in path.read_text(encoding="utf-8"), path.name


def test_an_untrained_model_can_be_built_from_just_its_configuration() -> None:
    config = LLM2CLIPConfig.from_dict(shared_model()[0].config.to_dict())
    model = LLM2CLIPModel(config)
    assert model.state_dict().keys() == shared_model()[0].state_dict().keys()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.logit_scale().item() == pytest.approx(1 / 0.07, rel=1e-6)  # float32


# Options of loading


def test_a_causal_model_stays_causal_after_saving_and_loading(tmp_path: Path) -> None:
    model, processor = tiny_model(bidirectional=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.bidirectional is False
    batch = texts_of(processor(text=CAPTIONS))
    assert first_position_moves_by(loaded, batch, row=0) == 0


@pytest.mark.parametrize("auto_class", [LLM2CLIPModel, AutoModel])
def test_no_kernels_are_downloaded_by_default(auto_class: Any, folder: Path) -> None:
    """Embeddings must not depend on whether the Hub was reachable."""
    assert not auto_class.from_pretrained(folder).use_kernels


@pytest.mark.parametrize("load", [LLM2CLIPModel, AutoModel], ids=["own", "auto"])
def test_each_tower_can_have_its_own_attention_implementation(
    load: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = load.from_pretrained(folder, attn_implementation="eager")
    assert eager.text_model.config._attn_implementation == "eager"
    assert eager.vision_model.config._attn_implementation == "eager"
    each = {"text_config": "eager", "vision_config": "sdpa"}
    loaded = load.from_pretrained(folder, attn_implementation=each)
    assert loaded.text_model.config._attn_implementation == "eager"
    assert loaded.vision_model.config._attn_implementation == "sdpa"
    calls, attend = [], modeling_llama.eager_attention_forward

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return attend(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", count)
    with torch.no_grad():
        expected, output = shared_model()[0](**shared_batch()), loaded(**shared_batch())
    assert calls  # not packed instead
    assert torch.allclose(output.text_embeds, expected.text_embeds, atol=ROUNDING)
    assert torch.allclose(output.image_embeds, expected.image_embeds, atol=ROUNDING)


@pytest.mark.parametrize("text_device", ["cpu", "disk"])
def test_a_device_map_does_not_change_the_output(
    text_device: str, folder: Path, tmp_path: Path
) -> None:
    device_map: Any = "cpu"
    if text_device == "disk":
        tops = {name.split(".")[0] for name in shared_model()[0].state_dict()}
        # The temperature is the last part, and so the first without room on a GPU.
        offloaded = ("text_model", "logit_scale")
        device_map = {name: "disk" if name in offloaded else "cpu" for name in tops}
    model = AutoModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    parts = (model.text_model, model.logit_scale)
    is_offloaded = {p.device.type for part in parts for p in part.parameters()} == {"meta"}
    assert is_offloaded is (text_device == "disk")
    with torch.no_grad():
        found, wanted = model(**shared_batch()), shared_model()[0](**shared_batch())
    # Equal weights at other memory addresses, see above.
    assert torch.allclose(found.text_embeds, wanted.text_embeds, atol=1e-6)
    assert torch.allclose(found.image_embeds, wanted.image_embeds, atol=1e-6)
    # The same times a temperature of 14.
    assert torch.allclose(found.logits_per_image, wanted.logits_per_image, atol=1e-5)


# Precision


@every_device
def test_bfloat16_gives_float32_embeddings_close_to_those_of_float32(
    folder: Path, device: str
) -> None:
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    batch = move(shared_batch(), device)
    assert model.text_model.dtype == model.vision_model.dtype == torch.bfloat16
    with torch.no_grad():
        found, wanted = model(**batch), shared_model()[0](**shared_batch())
        stored = model.get_caption_embeds(**texts_of(batch))
        features = model.get_text_features(**texts_of(batch)).pooler_output
    assert stored.dtype == features.dtype == found.logits_per_image.dtype == torch.float32
    for name in ("text_embeds", "image_embeds"):
        assert found[name].dtype == torch.float32
        # bfloat16 has 8 bits, steps of 0.4 %, which add up to a few percent.
        cosines = (found[name].cpu() * wanted[name]).sum(dim=1)
        assert cosines.min() > 0.998


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_a_model_does_not_change_its_temperature(cast: str, tmp_path: Path) -> None:
    model, _ = tiny_model()
    before = model.logit_scale.log_scale.detach().clone()
    getattr(model, cast)().save_pretrained(tmp_path)
    assert model.text_projection.weight.dtype != torch.float32
    assert model.logit_scale.log_scale.dtype == torch.float32
    assert torch.equal(AutoModel.from_pretrained(tmp_path).logit_scale.log_scale, before)
    assert model.to("meta").logit_scale.log_scale.device.type == "meta"


def test_saving_towers_of_different_dtypes_warns(tmp_path: Path) -> None:
    model, _ = tiny_model()
    model.text_model.to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"'text_model': torch.bfloat16.*loaded as torch.float32"):
        model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.text_model.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*different dtypes")
        loaded.save_pretrained(tmp_path)


def test_a_bfloat16_model_saves_its_dtype_and_keeps_its_temperature_in_float32(
    tmp_path: Path,
) -> None:
    model, _ = tiny_model(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.logit_scale.log_scale.dtype == torch.float32
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModel.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.text_model.parameters()} == {torch.bfloat16}
    assert loaded.logit_scale.log_scale.dtype == torch.float32
    assert torch.equal(loaded.logit_scale.log_scale, shared_model()[0].logit_scale.log_scale)


# Checkpoints of others' trainers


def train_with_transformers(folder: Path, output: Path) -> Any:
    model = LLM2CLIPModel.from_pretrained(folder)
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    batch = shared_batch()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(output), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=[{n: v[row] for n, v in batch.items()} for row in range(3)],
        processing_class=processor,
        data_collator=lambda rows: {
            "return_loss": True,
            **{name: torch.stack([row[name] for row in rows]) for name in batch},
        },
    )  # fmt: skip
    trainer.train()
    return model


def train_with_sentence_transformers(folder: Path, output: Path) -> Any:
    encoder = SentenceTransformer(str(folder), device="cpu")
    trainer = SentenceTransformerTrainer(
        model=encoder,
        args=SentenceTransformerTrainingArguments(
            str(output), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"anchor": CAPTIONS, "positive": CAPTIONS[::-1]}),
        loss=MultipleNegativesRankingLoss(encoder),
    )  # fmt: skip
    trainer.train()
    return encoder[0].model


@pytest.mark.parametrize(
    "train",
    [
        train_with_transformers,
        pytest.param(train_with_sentence_transformers, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_a_trainer_loads_everywhere(
    train: Any, folder: Path, tmp_path: Path
) -> None:
    before = LLM2CLIPModel.from_pretrained(folder)
    complete = Path(shutil.copytree(folder, tmp_path / "complete"))
    trained = train(complete, tmp_path / "output").eval()
    checkpoint = tmp_path / "output" / "checkpoint-1"
    batch = LLM2CLIPProcessor.from_pretrained(checkpoint)(text=CAPTIONS)
    assert torch.equal(batch["input_ids"], shared_batch()["input_ids"])
    with torch.no_grad():
        wanted = trained.get_text_features(**batch).pooler_output
        loaded = AutoModel.from_pretrained(checkpoint)
        assert torch.equal(loaded.get_text_features(**batch).pooler_output, wanted)
        assert not torch.equal(before.get_text_features(**batch).pooler_output, wanted)
    encoder = SentenceTransformer(str(checkpoint), device="cpu")
    found = torch.tensor(encoder.encode(CAPTIONS))
    # It normalizes by itself, and sorts texts by length.
    torch.testing.assert_close(found, wanted / wanted.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)


# Saving over a folder


def changed_model() -> LLM2CLIPModel:
    """Copy the shared model and change its text projection."""
    model = copy.deepcopy(shared_model()[0])
    with torch.no_grad():
        model.text_projection.weight += 1
    return model


@pytest.mark.parametrize(
    ("first", "second"),
    [("5GB", "5GB"), ("5GB", "50KB"), ("50KB", "5GB"), ("50KB", "90KB")],
)
def test_saving_over_a_folder_leaves_only_the_new_weights(
    first: str, second: str, tmp_path: Path
) -> None:
    shared_model()[0].save_pretrained(tmp_path, max_shard_size=first)
    model = changed_model()
    model.save_pretrained(tmp_path, max_shard_size=second)
    (fresh := tmp_path / "fresh").mkdir()
    model.save_pretrained(fresh, max_shard_size=second)
    weights = {path.name for path in tmp_path.glob("*.safetensors*")}
    assert weights == {path.name for path in fresh.glob("*.safetensors*")}
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.text_projection.weight, model.text_projection.weight)
    assert fingerprint_model(tmp_path) == fingerprint_model(fresh)


@pytest.mark.parametrize("size", ["5GB", "50KB"])
def test_a_variant_is_saved_next_to_the_weights(size: str, tmp_path: Path) -> None:
    shared_model()[0].save_pretrained(tmp_path, max_shard_size=size)
    model = changed_model()
    model.save_pretrained(tmp_path, max_shard_size=size, variant="fp16")
    for variant, wanted in ((None, shared_model()[0]), ("fp16", model)):
        loaded = AutoModel.from_pretrained(tmp_path, variant=variant)
        assert torch.equal(loaded.text_projection.weight, wanted.text_projection.weight)


@one_process_writes
def test_a_save_by_another_process_removes_and_writes_nothing(tmp_path: Path) -> None:
    shared_model()[0].save_pretrained(tmp_path, max_shard_size="50KB")
    before = sorted(path.name for path in tmp_path.glob("model*"))
    for folder in (tmp_path, tmp_path / "new"):
        changed_model().save_pretrained(folder, is_main_process=False)
    assert not any((tmp_path / "new").glob("*"))
    assert sorted(path.name for path in tmp_path.glob("model*")) == before


def test_positional_arguments_of_transformers_work_when_saving(tmp_path: Path) -> None:
    changed = changed_model()
    shared_model()[0].save_pretrained(tmp_path, True, changed.state_dict())
    loaded, wanted = LLM2CLIPModel.from_pretrained(tmp_path).state_dict(), changed.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.items())
    assert (tmp_path / "modules.json").is_file()


def test_sentence_transformers_can_save_over_a_folder(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    LLM2CLIPModel.from_pretrained(copied).save_pretrained(copied, max_shard_size="50KB")
    encoder = SentenceTransformer(str(copied), device="cpu")
    with torch.no_grad():
        encoder[0].model.text_projection.weight += 1
    encoder.save_pretrained(str(copied))
    loaded = AutoModel.from_pretrained(copied)
    assert torch.equal(loaded.text_projection.weight, encoder[0].model.text_projection.weight)


LOAD_FOLDERS = """
import sys
sys.modules["modeling_llm2clip"] = None  # importing the package raises from here on
from transformers import AutoModel
for folder in sys.argv[1:]:
    print(type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__)
"""


@pytest.mark.slow
def test_folders_with_the_same_name_load_with_their_own_classes(tmp_path: Path) -> None:
    """Without the package: transformers names a folder's modules by the last part of its path."""
    both, text = tmp_path / "both" / "model", tmp_path / "text" / "model"
    named_alike = tmp_path / "base_llm2clip"  # as one of the modules is
    shared_model()[0].save_pretrained(both)
    LLM2CLIPTextModel.from_pretrained(both).save_pretrained(text)
    shutil.copytree(both, named_alike)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_FOLDERS, text, both, text, named_alike],
        capture_output=True, text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}, cwd=tmp_path,
        check=False, timeout=300,
    )  # fmt: skip
    names = ["LLM2CLIPTextModel", "LLM2CLIPModel", "LLM2CLIPTextModel", "LLM2CLIPModel"]
    assert done.stdout.split() == names, done.stderr[-2000:]


def test_a_configuration_of_another_model_keeps_its_class(tmp_path: Path) -> None:
    shared_model()[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"an argument \(config\).* 'vision_config'"):
        LLM2CLIPModel.from_pretrained(tmp_path, config=ViTConfig())
    assert not isinstance(AutoModel.from_config(ViTConfig(num_hidden_layers=1)), LLM2CLIPModel)
