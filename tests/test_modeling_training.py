"""Laws of loss, gradients and temperature, and of libraries that wrap a model for training."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from shared_models import (
    ROUNDING,
    every_device,
    every_pair,
    every_vision,
    move,
    shared_batch,
    shared_model,
)
from tiny import tiny_images, tiny_model
from transformers import Trainer, TrainingArguments

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPVisionModel
from modeling_llm2clip.encoding.layer_compilation import find_layers
from modeling_llm2clip.heads_llm2clip import LogitHead, contrastive_loss
from modeling_llm2clip.training.trainer_mixins import recompute_activations

# Loss and gradients


def test_the_loss_is_log_batch_size_if_all_pairs_score_the_same() -> None:
    model, processor = shared_model()
    batch = processor(text=["a dog"] * 4, images=tiny_images(1) * 4)
    loss = model(**batch, return_loss=True).loss
    assert loss.shape == ()
    # Logits of up to 14 differ by rounding only.
    assert loss.item() == pytest.approx(math.log(4), abs=1e-5)


def test_the_loss_is_the_mean_of_both_directions() -> None:
    logits = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
    # Rows: ln(1 + e^2) and ln(1 + e^-2). Columns: ln(1 + e^-1) and ln(1 + e^1).
    terms = [math.log1p(math.exp(x)) for x in (2, -2, -1, 1)]
    # Sums of four float32 numbers.
    assert contrastive_loss(logits).item() == pytest.approx(sum(terms) / 4, abs=1e-6)


@every_pair
def test_gradients_flow_to_every_trainable_parameter(vision: str, llm: str) -> None:
    model = copy.deepcopy(shared_model(vision, llm)[0]).train()
    model(**shared_batch(vision, llm), return_loss=True).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # DINOv2's mask token is used only in its own pretraining.
    assert [name for name in without if not name.endswith("mask_token")] == []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name


def count_passes(model: LLM2CLIPModel) -> dict[str, int]:
    """Count the passes through the first part of every layer of both towers from here on."""
    counts = dict.fromkeys(("text_model", "vision_model"), 0)

    def count(name: str) -> None:
        counts[name] += 1

    for name in counts:
        layers = find_layers(model.get_submodule(name))[1]
        for layer in layers.children():
            # Hooks of the layer itself are outside of what is recomputed.
            part = next(layer.children())
            part.register_forward_pre_hook(lambda *_, name=name: count(name))
    return counts


@every_vision
def test_activation_checkpointing_recomputes_both_towers_and_gives_equal_gradients(
    vision: str,
) -> None:
    batch = shared_batch(vision)
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(shared_model(vision)[0]).train()
        model.gradient_checkpointing_enable()
        if not checkpointing:
            model.gradient_checkpointing_disable()
        assert model.is_gradient_checkpointing is checkpointing
        counts = count_passes(model)
        torch.manual_seed(0)  # DINOv3 shifts its positions at random
        loss = model(**batch, return_loss=True).loss
        forward = dict(counts)
        loss.backward()
        assert all(forward.values())
        assert counts == {n: c * (2 if checkpointing else 1) for n, c in forward.items()}
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # The same operations in the same order; 1e-6 allows for threading.
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@pytest.mark.parametrize("part", ["", "vision_model"])
def test_a_timm_tower_that_is_trained_alone_recomputes(part: str, tmp_path: Path) -> None:
    shared_model("timm")[0].save_pretrained(tmp_path)
    model = LLM2CLIPVisionModel.from_pretrained(tmp_path)
    recompute_activations(model.get_submodule(part))
    assert all(m.grad_checkpointing for m in model.modules() if hasattr(m, "grad_checkpointing"))
    assert any(hasattr(m, "grad_checkpointing") for m in model.modules())


def test_a_trained_tower_without_checkpointing_is_refused_and_a_frozen_one_skipped() -> None:
    model, processor = tiny_model("timm with batch norm")

    def refuse(enable: bool = True) -> None:
        assert not enable, "gradient checkpointing not supported"  # as timm's networks do

    model.vision_model.timm_model.set_grad_checkpointing = refuse
    with pytest.raises(ValueError, match="'timm_wrapper' tower cannot recompute"):
        model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    model.vision_model.requires_grad_(False)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model.train()(**processor(text=["a dog"], images=tiny_images(1)), return_loss=True)


def test_a_trainer_divides_the_loss_of_each_batch_that_it_accumulates(tmp_path: Path) -> None:
    """It takes a model with **kwargs for one that divides by the items of all batches itself."""
    trainer = Trainer(tiny_model()[0], TrainingArguments(str(tmp_path), use_cpu=True))
    assert trainer.model_accepts_loss_kwargs is False


# Temperature


@pytest.mark.parametrize(
    ("log_scale", "scale"), [(-1.0, 1.0), (0.0, 1.0), (1.0, math.e), (9.0, 100.0)]
)
def test_the_inverse_temperature_stays_between_1_and_100(log_scale: float, scale: float) -> None:
    head = LogitHead(log_scale)
    # float32 has 24 bits. Code for CLIP calls `model.logit_scale.exp()`.
    assert head().item() == head.exp().item() == pytest.approx(scale, rel=1e-6)


def test_the_temperature_has_one_dimension_and_comes_last() -> None:
    model, _ = shared_model()
    names = [name for name, _ in model.named_parameters()]
    assert names[-1] == "logit_scale.log_scale"
    assert model.logit_scale.log_scale.shape == (1,)


# Other libraries


@pytest.mark.slow
@every_device
def test_compiled_equals_plain(device: str) -> None:
    model, batch = copy.deepcopy(shared_model()[0]).to(device), move(shared_batch(), device)
    # Kernels are generated on a GPU only, because a CPU would need a C++ compiler.
    backend = "inductor" if device == "cuda" else "eager"
    compiled = torch.compile(copy.deepcopy(model), backend=backend)
    with torch.no_grad():
        found, wanted = compiled(**batch), model(**batch)
    # The compiled one runs the texts as one padded batch; its own kernels round exponentials too.
    tolerance = 10 * ROUNDING if device == "cuda" else ROUNDING
    assert torch.allclose(found.text_embeds, wanted.text_embeds, atol=tolerance)
    assert torch.allclose(found.image_embeds, wanted.image_embeds, atol=tolerance)


def test_lora_on_the_text_tower_trains_saves_and_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(shared_model()[0])
    lora = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4,
            # CLIP's vision tower has layers of the same names.
            target_modules=r"text_model\..*\.(q_proj|k_proj|v_proj|o_proj)",
        ),
    )
    trainable = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 4 * 2  # layers × projections × (A, B)
    assert all("text_model." in name and "lora_" in name for name in trainable)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:  # which start at zero and would change nothing
            torch.nn.init.normal_(parameter, std=0.1)
    batch = shared_batch()
    lora.eval()
    with torch.no_grad():
        wanted, plain = lora(**batch), shared_model()[0](**batch)
    assert (wanted.text_embeds - plain.text_embeds).abs().max() > 1e-2
    assert torch.equal(wanted.image_embeds, plain.image_embeds)

    lora.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(shared_model()[0]), tmp_path).eval()
    merged = copy.deepcopy(lora).merge_and_unload()
    assert type(merged) is LLM2CLIPModel
    with torch.no_grad():
        # Equal weights at other addresses, see above.
        assert torch.allclose(again(**batch).text_embeds, wanted.text_embeds, atol=1e-6)
        # Merging rounds W + BA once more.
        assert torch.allclose(merged(**batch).text_embeds, wanted.text_embeds, atol=1e-4)
