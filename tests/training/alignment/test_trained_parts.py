"""Stage 3, what is trained of the model and how fast, and what stays as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from aligning import SHORT_RUN, TOWERS, Prepared, Run, skip_where_transformers_renames, weights_of
from shared_models import every_vision
from tiny import JOINED, VISION_FAMILIES, draw_noise, tiny_images, tiny_model, tiny_vision

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.encoding.layer_compilation import find_layers
from modeling_llm2clip.heads_llm2clip import MAX_LOG_SCALE
from modeling_llm2clip.model_folders.guarded_loading import load_in_precision
from modeling_llm2clip.publishing.export_model import save_model
from modeling_llm2clip.training.alignment.align import _identify
from modeling_llm2clip.training.alignment.alignment_fit import AlignmentFit
from modeling_llm2clip.training.alignment.alignment_model import (
    AlignmentModel,
    choose_trained_parts,
    find_attention_linears,
    freeze_unused,
    merge_loras,
    scale_by_layer,
)
from modeling_llm2clip.training.alignment.alignment_trainer import (
    AlignmentTrainer,
    ClampTemperatureCallback,
    RunLength,
    make_training_arguments,
    warm_up_then_cosine,
)
from modeling_llm2clip.training.alignment.run_data import RecordData
from modeling_llm2clip.training.losses.pairs import ContrastiveLoss
from modeling_llm2clip.training.run_folder import count_parameters


def test_the_llm_is_never_loaded_in_stored_mode(prepared: Prepared, finished: Run) -> None:
    model = AlignmentModel.from_pretrained(prepared.model)
    assert not [n for n, _ in model.named_parameters() if n.startswith("text_model")]
    without = AlignmentModel.from_pretrained(prepared.model, with_vision_tower=False)
    assert not [n for n, _ in without.named_parameters() if n.startswith(TOWERS)]
    parts = json.loads((finished.output / "run.json").read_text())["parameters"]
    assert "text_model" not in parts
    assert parts["vision_model"]["trainable"] == 0 and parts["text_adapter"]["trainable"] > 0


@pytest.mark.parametrize("training", ["vision", "text"])
def test_a_merged_lora_gives_the_same_embeddings(prepared: Prepared, training: str) -> None:
    pytest.importorskip("peft")
    model = AlignmentModel.from_pretrained(prepared.model, with_llm=True)
    adapted = choose_trained_parts(model, AlignConfig(**{f"{training}_training": "lora"}))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith(TOWERS)}
    assert trained and all(f"{training}_model." in name and "lora_" in name for name in trained)
    processor = prepared.processor
    batch = dict(processor(text=["a dog", "x"], images=tiny_images(2)))
    model.eval()
    with torch.no_grad():
        _, plain = model(batch)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # starts at zero and would change nothing
                torch.nn.init.normal_(parameter, std=0.1)
        _, unmerged = model(batch)
        merge_loras(model, adapted)
        _, merged = model(batch)
    side = "image_embeds" if training == "vision" else "text_embeds"
    assert (getattr(plain, side) - getattr(unmerged, side)).abs().max() > 1e-2
    # Merging rounds W + BA once more, on unit-length embeddings over two layers.
    found, wanted = getattr(merged, side), getattr(unmerged, side)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]


@pytest.fixture(scope="module")
def save_parts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by the family of its tower."""
    root = tmp_path_factory.mktemp("parts")

    @cache
    def save(vision: str) -> Path:
        return save_model(*tiny_model(vision), root / vision)

    return save


def load_parts(folder: Path) -> tuple[AlignmentModel, LLM2CLIPProcessor]:
    model = AlignmentModel.from_pretrained(folder, with_llm=True)
    return model, LLM2CLIPProcessor.from_pretrained(folder)


def test_frozen_towers_in_bfloat16_move_no_head(save_parts: Callable[[str], Path]) -> None:
    """The folder of an 8B fits a GPU twice as often; eight bits move a gradient by a percent."""
    folder, gradients = save_parts("clip"), []
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    batch = dict(processor(text=["a cat sleeps", "x"], images=[draw_noise(seed=n) for n in (0, 1)]))
    for precision in ("float32", "bfloat16"):
        model = load_in_precision(
            AlignmentModel, folder, torch.device("cpu"), precision, with_llm=True
        )
        choose_trained_parts(model, AlignConfig(text_training="frozen-online"))
        assert {p.dtype for p in model.text_model.parameters()} == {getattr(torch, precision)}
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        _, outputs = model.train()(batch)
        outputs.logits(outputs.image_embeds, outputs.text_embeds).trace().backward()
        trained = (p.grad for p in model.parameters() if p.requires_grad and p.grad is not None)
        gradients.append(torch.cat([gradient.flatten() for gradient in trained]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize(
    ("options", "kind", "is_rounded"),
    [
        ({"text_training": "frozen-online"}, "cuda", True),
        ({"text_training": "frozen-online"}, "cpu", True),
        ({"text_training": "frozen-online", "precision": "float32"}, "cuda", False),
        ({"text_training": "lora"}, "cuda", False),
        ({"vision_training": "full"}, "cuda", False),
    ],
)
def test_a_run_in_bfloat16_rounds_towers_but_no_trained_one(
    options: dict[str, Any], kind: str, is_rounded: bool, save_parts: Callable[[str], Path]
) -> None:
    config = AlignConfig(**{"precision": "bfloat16", **options})
    dataset = SimpleNamespace(image_transform=None)
    data: Any = SimpleNamespace(identify=dict, dataset=dataset)
    fit = AlignmentFit(save_parts("clip"), data, Path(), config, ContrastiveLoss(), resume=False)
    device = torch.device(kind)
    assert fit.rounds_towers(device) == is_rounded
    recorded = _identify(fit, device)
    assert recorded.get("frozen_towers") == ("bfloat16" if is_rounded else None)
    assert recorded.get("float32_products") == ("ieee" if kind == "cuda" else None)


# Each family in one way, and some in both.
TRAINED = [
    *zip(VISION_FAMILIES, cycle(("lora", "full")), strict=False),
    ("clip", "full"), ("siglip", "lora"), ("timm-siglip", "full"), (JOINED, "full"),
    (JOINED, "lora"),
]  # fmt: skip


@pytest.mark.parametrize(("vision", "training"), TRAINED)
def test_trained_weights_have_gradients(
    vision: str, training: str, save_parts: Callable[[str], Path]
) -> None:
    pytest.importorskip("peft")
    skip_where_transformers_renames(vision)
    model, processor = load_parts(save_parts(vision))
    config = AlignConfig(vision_training=training, text_training="lora", layer_decay=1.0)
    choose_trained_parts(model, config)
    asked = {name for name, p in model.named_parameters() if p.requires_grad}
    state = torch.random.get_rng_state()
    freeze_unused(model, processor, config)
    assert torch.equal(state, torch.random.get_rng_state()) and not model.training
    assert all(p.grad is None for p in model.parameters())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if training == "lora":
        assert trained == asked
    batch = dict(processor(text=["a cat sleeps", "x"], images=[draw_noise(seed=n) for n in (0, 1)]))
    _, outputs = model.train()(batch)
    parts = (outputs.image_embeds, outputs.text_embeds, outputs.logits.scale)
    sum(part.sum() for part in parts).backward()
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}


def test_weights_that_the_pooling_never_uses_do_not_count_as_trained(tmp_path: Path) -> None:
    save_model(*tiny_model("siglip", vision_pooling="mean"), tmp_path / "exported")
    model = AlignmentModel.from_pretrained(tmp_path / "exported")
    config = AlignConfig(vision_training="full")
    choose_trained_parts(model, config)
    freeze_unused(model, LLM2CLIPProcessor.from_pretrained(tmp_path / "exported"), config)
    head = sum(p.numel() for p in model.vision_model.head.parameters())
    counts = count_parameters(model)["vision_model"]
    assert head and counts["trainable"] == counts["total"] - head


@pytest.mark.parametrize("vision", ["eva", "beit", "beitv2", "swinv2"])
def test_a_lora_that_a_tower_skips_is_refused(
    vision: str, prepared: Prepared, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    save_model(*tiny_model(vision), tmp_path / "exported")
    model, processor = load_parts(tmp_path / "exported")
    if vision == "eva":  # the run asks as the call below does
        here = Prepared(prepared.data, tmp_path / "exported", prepared.captions, prepared.images)
        with pytest.raises(
            ValueError, match=r"vision_training=lora: 2 layers would never be trained"
        ):
            here.align(tmp_path / "run", vision_training="lora", text_training="frozen-online")
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
    config = AlignConfig(vision_training="full", layer_decay=1.0)
    choose_trained_parts(model, config)
    freeze_unused(model, processor, config)
    assert all(
        p.requires_grad for name, p in model.vision_model.named_parameters() if ".qkv." in name
    )
    lora = AlignConfig(vision_training="lora")
    choose_trained_parts(model, lora)
    message = (
        r"vision_training=lora: 2 layers would never be trained.*vision_model\..*attn\.qkv, .*"
        r"attn\.qkv\. Choose vision_training=frozen or vision_training=full\."
    )
    with pytest.raises(ValueError, match=message):
        freeze_unused(model, processor, lora)


@pytest.mark.slow
def test_the_temperature_is_clamped_after_each_step(prepared: Prepared, tmp_path: Path) -> None:
    model = LLM2CLIPModel.from_pretrained(prepared.model)
    log_scale = model.logit_scale.log_scale.data
    log_scale.fill_(-3.0)
    ClampTemperatureCallback().on_optimizer_step(None, None, None, model=model)
    assert log_scale.item() == 0.0
    log_scale.fill_(9.0)
    folder = save_model(model, prepared.processor, tmp_path / "hot")
    here = Prepared(prepared.data, folder, prepared.captions, prepared.images)
    run = here.align(tmp_path / "run", max_steps=1, learning_rate=1e-6)
    assert weights_of(run.model)["logit_scale.log_scale"].item() == pytest.approx(MAX_LOG_SCALE)


@every_vision
def test_lower_layers_learn_slower_and_only_matrices_decay(vision: str) -> None:
    tower = tiny_model(vision)[0].vision_model
    every = scale_by_layer(tower, 0.5)
    assert set(every) == {name for name, _ in tower.named_parameters()}
    for prefix in ("towers.0.", "towers.1.") if "+" in vision else ("",):
        scales = {name: scale for name, scale in every.items() if name.startswith(prefix)}
        first = {scale for name, scale in scales.items() if "patch_embed" in name}
        assert first == {min(scales.values())}
        by_layer: dict[int, set[float]] = {}
        for name, scale in scales.items():
            if found := re.search(r"(?:blocks|layers?)\.(\d+)\.", name):
                by_layer.setdefault(int(found[1]), set()).add(scale)
        num_layers = len(by_layer)
        assert by_layer == {i: {0.5 ** (num_layers - i)} for i in range(num_layers)}
        assert min(scales.values()) == 0.5 ** (num_layers + 1)
    assert set(scale_by_layer(tower, 1.0).values()) == {1.0}


def test_parameter_groups_are_by_layer_and_by_decay(prepared: Prepared, tmp_path: Path) -> None:
    config = AlignConfig(
        **{**SHORT_RUN, "vision_training": "full", "layer_decay": 0.5, "vision_learning_rate": 1e-4}
    )
    model = AlignmentModel.from_pretrained(prepared.model)
    model.loss = ContrastiveLoss()
    choose_trained_parts(model, config)
    dataset = prepared.dataset(None, "caption")
    arguments = make_training_arguments(tmp_path, config)
    trainer = AlignmentTrainer(
        model, RecordData(dataset, np.arange(len(dataset)), config),
        length=RunLength(num_steps=40, batch_size=8, learning_rate=1e-3, adapter_begin=10),
        training_arguments=arguments,
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    groups = optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, group in found.items():
        is_matrix = dict(model.named_parameters())[name].ndim > 1
        assert group["weight_decay"] == (config.weight_decay if is_matrix else 0.0)
    rates = {name: group["lr"] for name, group in found.items()}
    assert rates["text_adapter.blocks.0.up.weight"] == rates["logit_scale.log_scale"] == 1e-3
    assert rates["vision_model.encoder.layers.1.mlp.fc1.weight"] == pytest.approx(1e-4 / 2)
    assert rates["vision_model.encoder.layers.0.mlp.fc1.weight"] == pytest.approx(1e-4 / 4)
    assert rates["vision_model.embeddings.patch_embedding.weight"] == pytest.approx(1e-4 / 8)
    # A new text adapter joins later than the rest, and warms up of its own.
    trainer.create_scheduler(40, optimizer)
    now = {name: group["lr"] for name, group in found.items()}
    assert {name for name, rate in now.items() if rate == 0} == {
        name for name in rates if name.startswith("text_adapter.")
    }
    factor = warm_up_then_cosine(40, warmup_steps=0.1, begin=10)
    assert [factor(step) for step in range(10)] == [0.0] * 10
    # A tenth of what is left would be three steps; a good start wants at least 20.
    assert 0 < factor(10) < factor(28) < factor(29) == 1.0 > factor(39) > 0
    assert warm_up_then_cosine(1, warmup_steps=0.1)(0) == 1 / 20
    assert warm_up_then_cosine(1, warmup_steps=0)(0) == 1


def test_batch_norm_keeps_its_statistics(tmp_path: Path) -> None:
    model, processor = tiny_model("timm with batch norm")
    save_model(model, processor, tmp_path / "exported")
    trained = AlignmentModel.from_pretrained(tmp_path / "exported")
    choose_trained_parts(trained, AlignConfig(vision_training="full", layer_decay=1.0))
    before = {n: b.clone() for n, b in trained.vision_model.named_buffers()}
    assert any("running_var" in name for name in before)
    pixels = processor(images=[draw_noise(40, 40, seed=seed) for seed in range(4)])["pixel_values"]
    trained.train()
    captions = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    whole = trained({"pixel_values": pixels, "caption_embeds": captions})[1].image_embeds
    alone = [
        trained({"pixel_values": p[None], "caption_embeds": captions[:1]})[1].image_embeds
        for p in pixels
    ]
    # Unit embeddings in float32, from convolutions that add up in another order.
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-5, rtol=0)
    whole.sum().backward()
    after = dict(trained.vision_model.named_buffers())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(
        trained.get_parameter(f"vision_model.{name.replace('running_var', 'weight')}").grad
        is not None
        for name in before
        if name.endswith("running_var")
    )


@every_vision
def test_only_present_layers_are_sharded(vision: str, save_parts: Callable[[str], Path]) -> None:
    skip_where_transformers_renames(vision)
    folder = save_parts(vision)
    models = [AlignmentModel.from_pretrained(folder)]
    if vision == "clip":
        models += [
            LLM2CLIPModel.from_pretrained(folder),
            AlignmentModel.from_pretrained(folder, with_vision_tower=False),
        ]
    for model in models:
        classes = {type(module).__name__ for module in model.modules()}
        assert "AdapterBlock" in model._no_split_modules
        assert model._no_split_modules <= classes


def test_a_tower_without_attention_gets_no_lora() -> None:
    tower = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"no linear layers in its attention.*=frozen or vision"):
        find_attention_linears(tower)
    joined, _ = tiny_vision("clip+timm with batch norm")
    with pytest.raises(ValueError, match=r"TimmWrapperModel has no linear layers in its attention"):
        find_attention_linears(joined)
    with pytest.raises(ValueError, match=r"no list of layers .*layer_decay to 1"):
        find_layers(tower)


def test_gradients_do_not_depend_on_the_size_of_mini_batches(prepared: Prepared) -> None:
    """Towers see each mini-batch twice, with the same dropout."""
    texts = [record.captions[0] for record in prepared.records[:8]]
    images = [record.image for record in prepared.records[:8]]
    batch = dict(prepared.processor(images=images, text=texts)) | {"group_ids": torch.arange(8)}
    config = AlignConfig(vision_training="full", text_training="lora", mini_batch_size=3)
    found: list[dict[str, torch.Tensor]] = []
    for size in (None, 3):
        model = AlignmentModel.from_pretrained(prepared.model, with_llm=True)
        model.loss, model.mini_batch_size = ContrastiveLoss(), size
        with torch.random.fork_rng():
            torch.manual_seed(0)
            choose_trained_parts(model, config)
        seen: list[int] = []
        model.vision_model.embeddings.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(len(kwargs.get("pixel_values", *args))),
            with_kwargs=True,
        )
        loss, _ = model.train()(batch)
        assert seen == ([8] if size is None else [3, 3, 2])
        loss.backward()
        assert seen == ([8] if size is None else [3, 3, 2, 2, 3, 3])
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any(".lora_B." in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=2e-6, rtol=1e-4)
    inner: list[torch.Tensor] = []
    first, last = (model.vision_model.encoder.layers[n] for n in (0, -1))
    first.self_attn.dropout = 0.5
    last.register_forward_pre_hook(lambda _, args: inner.append(args[0].detach()))
    loss, _ = model(batch)
    loss.backward()
    for one, again in zip(inner[:3], inner[:2:-1], strict=True):
        assert torch.equal(one, again)
    model(batch)
    assert not torch.equal(inner[0], inner[6])  # dropout is on
