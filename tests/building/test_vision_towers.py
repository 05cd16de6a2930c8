"""What a vision tower is read from, and the images that timm itself would give a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from breaking import drop_weights, edit_json
from PIL import Image
from safetensors.torch import load_file, save_file
from shared_models import mostly_slow
from tiny import (
    DUAL_ENCODERS,
    tiny_dual_encoder,
    tiny_images,
    tiny_llm,
    tiny_timm,
    tiny_tokenizer,
    tiny_vision,
)
from tiny_folders import save_tiny_llm, save_tiny_vision
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, VisionTextDualEncoderModel

from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.building.vision_towers import (
    image_processor_from_timm,
    load_vision_tower,
    set_image_size,
)
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor

SETTINGS: dict[str, Any] = {
    "input_size": (3, 44, 44), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
}  # fmt: skip
FOLLOWED: dict[str, dict[str, Any]] = {
    "center, 48.9 rounded down": {"crop_pct": 0.9, "crop_mode": "center"},
    "center, all": {"crop_pct": 1.0, "input_size": (3, 48, 48)},
    "squash": {"crop_pct": 0.9, "crop_mode": "squash"},
    "squash, all": {"crop_pct": 1.0, "crop_mode": "squash"},
    "squash, not square": {"crop_pct": 1.0, "crop_mode": "squash", "input_size": (3, 24, 40)},
    "bilinear": {"crop_pct": 0.9, "interpolation": "bilinear"},
}

LARGER = 96
_WINDOWS = {"img_size": 64, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4]}
_TOKENS = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
# Architecture, settings. In the first three, attention is within windows.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", {**_WINDOWS, "window_size": 4}),
    "swinv2": ("swinv2_tiny_window8_256", {**_WINDOWS, "window_size": 4}),
    "swinv2_cr": ("swinv2_cr_tiny_224", {**_WINDOWS, "window_size": 4}),
    "swin, window of the architecture": ("swin_tiny_patch4_window7_224", _WINDOWS),
    "beit": ("beit_base_patch16_224", _TOKENS),
    "relative positions": ("vit_relpos_small_patch16_224", _TOKENS),
    "rotary": ("vit_small_patch16_rope_224", _TOKENS),
}


def make_llm() -> tuple[Any, Any]:
    return tiny_llm(vocabulary_size=len(tiny_tokenizer())), tiny_tokenizer()


def render(height: int, width: int) -> Image.Image:
    """A smooth image without symmetry, in which a shift of one pixel moves the numbers."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 8, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def require_timms_images(pretrained_cfg: dict[str, Any]) -> None:
    from timm.data import create_transform, resolve_data_config

    settings = resolve_data_config(pretrained_cfg=pretrained_cfg)
    transform = create_transform(**settings, is_training=False)
    processor = image_processor_from_timm(pretrained_cfg)
    # Among them those whose margin is 0, 1, 2 and 3 modulo 4.
    for image in (render(96, 120), render(120, 96), *(render(96, 97 + more) for more in range(4))):
        wanted = transform(image)
        found = processor(image, return_tensors="pt")["pixel_values"][0]
        assert found.shape == wanted.shape
        # torchvision rounds between the two passes of a resize, Pillow to finer steps: two of 255.
        two_steps = 2 / 255 / min(pretrained_cfg["std"]) + 1e-6
        torch.testing.assert_close(found, wanted, atol=two_steps, rtol=0)


@pytest.mark.parametrize("name", FOLLOWED)
def test_images_are_those_of_timms_own_transform(name: str) -> None:
    pytest.importorskip("timm")
    require_timms_images({**SETTINGS, **FOLLOWED[name]})


def test_a_published_network_that_squashes_gets_the_whole_image() -> None:
    timm = pytest.importorskip("timm")
    published = timm.get_pretrained_cfg("eva02_large_patch14_448.mim_m38m_ft_in22k_in1k")
    assert published.crop_mode == "squash"
    require_timms_images(published.to_dict())
    assert image_processor_from_timm(published.to_dict()).size == {"height": 448, "width": 448}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_mode": "border"}, r"crop_mode='border' must be one of \('center', 'squash'\)"),
        ({"input_size": (3, 24, 40)}, "needs a square input, not 24 × 40"),
        ({"interpolation": "nearest"}, "interpolation='nearest' must be one of .*'bicubic'"),
    ],
)
def test_settings_that_no_image_processor_follows_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        image_processor_from_timm({**SETTINGS, **settings})


def test_a_network_that_timm_saved_with_arguments_of_its_own_is_loaded(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_vit", img_size=32, num_classes=7).eval()
    settings = {"img_size": 32, "num_classes": 7}  # some versions of timm add the latter
    timm.models.save_for_hf(network, tmp_path, model_args=settings, safe_serialization=True)
    tower, image_processor, _ = load_vision_tower(tmp_path)
    pixels = image_processor(render(32, 32), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = network.forward_features(pixels[..., :32, :32])
        found = tower(pixels[..., :32, :32]).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # rounding
    built = join_towers((tower, image_processor), make_llm(), BuildConfig(prompt="none"))
    folder = save_model(*built, tmp_path / "model")
    again = AutoModel.from_pretrained(folder).vision_model
    assert torch.equal(again.timm_model.norm.weight, network.norm.weight)


def test_a_timm_network_of_a_dual_encoder_gets_the_images_that_it_was_trained_with(
    tmp_path: Path,
) -> None:
    tower, image_processor = tiny_vision("timm with batch norm")
    tower.config.hidden_size = tower.timm_model.num_features
    text = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    VisionTextDualEncoderModel(vision_model=tower, text_model=text).save_pretrained(tmp_path)
    image_processor.size, image_processor.image_mean = {"height": 48, "width": 40}, [0.4, 0.5, 0.6]
    image_processor.save_pretrained(tmp_path)
    _, found, _ = load_vision_tower(tmp_path)
    wanted = image_processor(render(96, 120), return_tensors="pt")["pixel_values"]
    assert torch.equal(found(render(96, 120), return_tensors="pt")["pixel_values"], wanted)


@pytest.mark.parametrize("family", mostly_slow(DUAL_ENCODERS))
def test_of_a_dual_encoder_given_whole_the_vision_tower_is_taken_bit_for_bit(
    family: str, tmp_path: Path
) -> None:
    whole, image_processor = tiny_dual_encoder(family)
    whole.save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    loaded, *_ = load_vision_tower(tmp_path)
    weights = whole.vision_model.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    loaded.save_pretrained(tmp_path / "alone")
    image_processor.save_pretrained(tmp_path / "alone")
    alone = load_vision_tower(tmp_path / "alone")[0].state_dict()
    assert all(torch.equal(value, alone[name]) for name, value in weights.items())
    batch = image_processor(tiny_images(2), return_tensors="pt")
    if hasattr(whole, "visual_projection"):
        whole.visual_projection = torch.nn.Identity()
    whole.vision_model = loaded  # the same memory, so that nothing but the computation may differ
    with torch.no_grad():
        wanted = whole.get_image_features(**batch).pooler_output
        assert torch.equal(loaded(**batch).pooler_output, wanted)
    config = BuildConfig(prompt="llama-3", text_adapter_layers=0)
    model, processor = join_towers(tmp_path, make_llm(), config)
    save_model(model, processor, tmp_path / "model")
    again = AutoModel.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_what_is_not_a_vision_tower_or_not_a_whole_one_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("idefics2").save_pretrained(tmp_path / "part")
    with pytest.raises(ValueError, match="no class for a standalone 'idefics2_vision' tower"):
        load_vision_tower(tmp_path / "part")
    with pytest.raises(ValueError, match="is a 'llama', not a vision tower"):
        load_vision_tower(save_tiny_llm(tmp_path / "llm"))
    folder = save_tiny_vision(tmp_path / "damaged")
    drop_weights(folder, "layers.0.mlp.fc1")
    with pytest.raises(ValueError, match=r"lacks 2 weights .*encoder.layers.0.mlp.fc1.bias"):
        load_vision_tower(folder, allow_missing_pooler=True)


@pytest.mark.parametrize(
    ("part", "name", "field", "value", "files"),
    [
        ("vision", "config.json", "hidden_size", "x", "config"),
        ("vision", "preprocessor_config.json", "image_processor_type", [], "preprocessor_config"),
        ("llm", "tokenizer_config.json", "pad_token", -1, "tokenizer_config"),
    ],
)
def test_a_field_of_a_tower_is_refused_with_its_folder_and_file(
    part: str, name: str, field: str, value: Any, files: str, tmp_path: Path
) -> None:
    towers = save_tiny_vision(tmp_path / "vision"), save_tiny_llm(tmp_path / "llm")
    edit_json(name, lambda content: content.update({field: value}))(tmp_path / part)
    message = rf"{part} cannot be loaded: .*{files}\.json.* has a field that is refused"
    with pytest.raises(ValueError, match=message):
        join_towers(*towers, BuildConfig(prompt="llama-3"))


def test_weights_within_a_vision_tower_that_nobody_reads_are_named(tmp_path: Path) -> None:
    save_tiny_vision(tmp_path)
    file = tmp_path / "model.safetensors"
    buffers = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    head = {"classifier.weight": torch.ones(3, 32)}
    save_file({**load_file(file), **buffers, **head}, file, metadata={"format": "pt"})
    load_vision_tower(tmp_path)
    norm = {"vision_model.encoder.layers.0.self_attn.q_norm.weight": torch.ones(8)}
    save_file({**load_file(file), **norm}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weight that CLIPVisionModel does not read.*q_norm"):
        load_vision_tower(tmp_path)


def test_a_missing_pooler_is_accepted_only_where_it_is_not_used(tmp_path: Path) -> None:
    tower, image_processor = tiny_vision("vit")
    tower.save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    drop_weights(tmp_path, "pooler")
    with pytest.raises(ValueError, match=r"lacks 2 .*vision_pooling to 'cls', 'mean' or 'patch_m"):
        load_vision_tower(tmp_path)
    loaded, *_ = load_vision_tower(tmp_path, allow_missing_pooler=True)
    kept = {n: v for n, v in loaded.state_dict().items() if "pooler" not in n}
    assert kept and all(torch.equal(value, tower.state_dict()[n]) for n, value in kept.items())


@pytest.mark.parametrize("name", ["Lfm2VlImageProcessor", "Gemma3ImageProcessor"])
def test_an_image_processor_that_makes_more_than_a_row_of_pixels_is_refused(name: str) -> None:
    image_processor = getattr(transformers, name)()
    family = "siglip2" if name == "Lfm2VlImageProcessor" else "siglip"
    llm = (tiny_llm(), tiny_tokenizer())
    with pytest.raises(ValueError, match=f"{name} turns two images of"):
        join_towers((tiny_vision(family)[0], image_processor), llm, BuildConfig(prompt="llama-3"))


def test_images_that_become_several_rows_are_refused_by_a_processor_too() -> None:
    processor = LLM2CLIPProcessor(transformers.Lfm2VlImageProcessor(), tiny_tokenizer(), 32)
    with pytest.raises(ValueError, match="one row per image, but returned 9 for 1"):
        processor(images=[Image.new("RGB", (2048, 1024))])


# Another image size


def make_network(name: str) -> tuple[Any, Any]:
    pytest.importorskip("timm")
    architecture, settings = NETWORKS[name]
    tower, image_processor = tiny_timm(architecture, settings)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in tower.parameters():  # tables of positions begin near 0
            parameter += torch.randn_like(parameter) * 0.1
    return tower, image_processor


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_built_for_larger_images_loads_as_the_same_network(
    name: str, tmp_path: Path
) -> None:
    tower, _ = set_image_size(*make_network(name), LARGER)
    tower.save_pretrained(tmp_path)
    pixels = torch.rand(2, 3, LARGER, LARGER, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embeds = AutoModel.from_pretrained(tmp_path)(pixels).pooler_output
        expected = tower(pixels).pooler_output
    # Equal weights at other addresses, whose alignment selects other kernels.
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=1e-5)
