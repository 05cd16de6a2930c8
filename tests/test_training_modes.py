"""Training changes no frozen part, and gives the same numbers on every path through the LLM."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shared_models import CAPTIONS, every_vision, images_of, shared_batch, shared_model, texts_of
from tiny import draw_noise, tiny_model
from torch import Tensor, nn

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPVisionModel

peft = pytest.importorskip("peft")
BATCH_NORM = "timm with batch norm"


def train_three_steps(model: Any, batch: dict[str, Tensor]) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    for _ in range(3):
        model.train()  # as Trainer does before every step
        model(**batch, return_loss=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def noise_batch(processor: Any) -> dict[str, Tensor]:
    images = [draw_noise(40, 40, seed=seed) for seed in range(len(CAPTIONS))]
    return dict(processor(text=CAPTIONS, images=images))


def embed_images(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).image_embeds  # type: ignore[no-any-return]


@pytest.mark.parametrize("frozen_after_train", [False, True])
def test_a_frozen_tower_stays_in_eval_mode_and_keeps_its_statistics(
    frozen_after_train: bool,
) -> None:
    model, processor = tiny_model(BATCH_NORM)
    before = {name: buffer.clone() for name, buffer in model.vision_model.named_buffers()}
    assert any(name.endswith("running_var") for name in before)
    if frozen_after_train:
        model.train()
    model.vision_model.requires_grad_(False)
    if frozen_after_train:
        model(**noise_batch(processor))
    else:
        train_three_steps(model, noise_batch(processor))
        model.train()
    assert not any(module.training for module in model.vision_model.modules())
    assert model.text_model.training and model.text_adapter.training
    after = dict(model.vision_model.named_buffers())
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_statistics_of_a_trained_tower_change_and_are_saved(tmp_path: Path) -> None:
    model, processor = tiny_model(BATCH_NORM)
    before = {name: buffer.clone() for name, buffer in model.vision_model.named_buffers()}
    batch = noise_batch(processor)
    train_three_steps(model, batch)
    after = dict(model.vision_model.named_buffers())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    model.save_pretrained(tmp_path)
    again = LLM2CLIPModel.from_pretrained(tmp_path)
    # Equal weights at other memory addresses, whose alignment selects other kernels.
    assert torch.allclose(embed_images(again, batch), embed_images(model, batch), atol=1e-6)


@pytest.mark.parametrize("tower", ["text_model", "vision_model"])
def test_a_saved_lora_gives_the_same_image_embeddings(tower: str, tmp_path: Path) -> None:
    model, processor = tiny_model(BATCH_NORM)
    targets = [
        name
        for name, module in model.named_modules()
        if name.startswith(tower)
        and isinstance(module, nn.Linear | nn.Conv2d)
        and getattr(module, "groups", 1) == 1
    ]
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    batch = noise_batch(processor)
    train_three_steps(lora, batch)
    lora.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(BATCH_NORM)[0], tmp_path).eval()
    cosine = F.cosine_similarity(embed_images(again, batch), embed_images(lora, batch))
    # The same weights in float32; with changed statistics it was 0.94.
    assert cosine.min() > 1 - 1e-5


def test_statistics_that_peft_saves_with_their_layer_are_restored(tmp_path: Path) -> None:
    model, processor = tiny_model(BATCH_NORM)
    norm = next(n for n, m in model.vision_model.named_modules() if hasattr(m, "running_mean"))
    config = peft.LoraConfig(
        r=2, target_modules=r"text_model\..*q_proj", modules_to_save=[f"vision_model.{norm}"]
    )
    lora = peft.get_peft_model(model, config)
    trained = f"base_model.model.vision_model.{norm}.modules_to_save.default"
    before = lora.get_submodule(trained).running_var.clone()
    train_three_steps(lora, noise_batch(processor))
    after = lora.get_submodule(trained).running_var
    assert not torch.equal(before, after)
    lora.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(BATCH_NORM)[0], tmp_path)
    assert torch.equal(again.get_submodule(trained).running_var, after)


def dropping_model(*, packs: bool) -> Any:
    model, _ = tiny_model()
    for module in model.text_model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    model.packs_in_training = packs
    return model


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_samples_the_same_masks_with_and_without_gradients(
    packs: bool, checkpointing: bool
) -> None:
    model, texts = dropping_model(packs=packs), texts_of(shared_batch())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    found = []
    for with_gradients in (False, True):
        torch.manual_seed(0)
        with torch.set_grad_enabled(with_gradients):
            found.append(model.get_caption_embeds(**texts).detach())
    # The same path and operations; other masks changed the embeddings by more than a tenth.
    assert torch.allclose(*found, atol=1e-6)
    assert not torch.allclose(found[0], model.eval().get_caption_embeds(**texts), atol=1e-2)


@every_vision
def test_gradient_checkpointing_with_a_lora_gives_equal_gradients_in_a_vision_only_model(
    vision: str, tmp_path: Path
) -> None:
    shared_model(vision)[0].save_pretrained(tmp_path)
    images = images_of(shared_batch(vision))
    vision_only = LLM2CLIPVisionModel.from_pretrained(tmp_path)
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(vision_only)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        torch.manual_seed(0)
        layers = [n for n, m in model.vision_model.named_modules() if isinstance(m, nn.Linear)]
        config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
        lora = peft.get_peft_model(model, config).train()
        lora(**images).image_embeds[:, :3].sum().backward()
        gradients.append({n: p.grad for n, p in lora.named_parameters() if p.grad is not None})
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # The same operations; 1e-6 allows for threading.
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name
