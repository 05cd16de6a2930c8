"""Vision towers: images of another size, at build and in a pass, and their mean and std."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from shared_models import ROUNDING, encode, images_of, mostly_slow, shared_batch, shared_model
from tiny import (
    IMAGE_SIZE,
    MORE_VISION_FAMILIES,
    VISION_FAMILIES,
    tiny_images,
    tiny_llm,
    tiny_model,
    tiny_timm,
    tiny_tokenizer,
    tiny_vision,
)
from tiny_folders import save_tiny_llm, save_tiny_vision
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPImageProcessorPil,
    PreTrainedModel,
)

from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.building.vision_towers import set_image_size, set_normalization
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.vision_llm2clip import (
    choose_interpolation,
    find_fixed_size,
    find_patch_size,
)

LARGER = 48
# Interpolate positions with the argument.
WITH_ARGUMENT = ("clip", "siglip", "vit", "metaclip_2", "chinese_clip", "altclip", "ijepa")
# Interpolate without it, or have rotary positions.
ANY_SIZE = ("dinov2", "dinov3_vit", "timm", "tipsv2", "radio", "naflexvit")
# Cannot interpolate in a forward pass, but when a model is built.
FIXED = ("eva02", "timm-siglip", "pe-core", "timm-radio")
OWN_SIZE = ("aimv2",)  # cannot interpolate at all
BY_PATCHES = ("siglip2",)  # the number of patches depends on the processor


# Another image size, chosen when the model is built


def make_larger(family: str) -> Any:
    return tiny_model(family, image_size=LARGER)


def test_every_family_is_in_one_group() -> None:
    groups = WITH_ARGUMENT + ANY_SIZE + FIXED + OWN_SIZE + BY_PATCHES
    assert sorted(groups) == sorted(VISION_FAMILIES + MORE_VISION_FAMILIES)


@pytest.mark.parametrize("family", mostly_slow(WITH_ARGUMENT + ANY_SIZE + FIXED + BY_PATCHES))
def test_a_model_built_for_larger_images_resizes_to_them_and_reloads_bit_for_bit(
    family: str, tmp_path: Path
) -> None:
    model, processor = make_larger(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    image_processor = AutoImageProcessor.from_pretrained(tmp_path)
    batch = image_processor(tiny_images(2), return_tensors="pt")
    patches = (LARGER // 8) ** 2
    shape = (2, patches, 192) if family == "siglip2" else (2, 3, LARGER, LARGER)
    assert batch["pixel_values"].shape == shape
    found, wanted = encode(loaded, batch), encode(model, batch)
    # Equal weights at other memory addresses, whose alignment selects other kernels.
    assert torch.allclose(found, wanted, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("family", mostly_slow(WITH_ARGUMENT + ANY_SIZE))
def test_positions_set_at_build_equal_those_interpolated_in_a_pass(family: str) -> None:
    (built, processor), (running, _) = make_larger(family), shared_model(family)
    batch = processor(images=tiny_images(2))
    assert batch["pixel_values"].shape[-1] == LARGER
    wanted = encode(running, batch, interpolate_pos_encoding=True)
    assert torch.allclose(encode(built, batch), wanted, rtol=ROUNDING, atol=ROUNDING)
    # Otherwise positions had no effect, and the comparison above would show nothing.
    smaller = images_of(shared_batch(family))["pixel_values"][:2]
    assert (encode(running, {"pixel_values": smaller}) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("family", FIXED)
def test_positions_of_timm_networks_equal_those_timm_interpolates_in_a_pass(family: str) -> None:
    tower, processor = tiny_vision(family)
    config = copy.deepcopy(tower.config)
    config.model_args = {**config.model_args, "dynamic_img_size": True}
    running = AutoModel.from_config(config).eval()
    running.load_state_dict(tower.state_dict())
    built, processor = set_image_size(tower, processor, LARGER)
    batch = processor(tiny_images(2), return_tensors="pt")
    with torch.no_grad():
        found, wanted = built(**batch).pooler_output, running(**batch).pooler_output
    assert torch.allclose(found, wanted, rtol=ROUNDING, atol=ROUNDING)


def test_another_size_keeps_the_activation_and_the_dtype_of_the_tower() -> None:
    model, _ = tiny_model(image_size=LARGER, dtype=torch.bfloat16)
    assert model.config.vision_config.hidden_act == "quick_gelu"
    assert model.config.vision_config.image_size == LARGER
    assert {p.dtype for p in model.vision_model.parameters()} == {torch.bfloat16}
    small = tiny_model(dtype=torch.bfloat16)[0].vision_model.state_dict()
    large = model.vision_model.state_dict()
    changed = [
        name for name in small if not torch.equal(small[name], large[name][: len(small[name])])
    ]
    assert changed == ["embeddings.position_embedding.weight"]


def test_another_size_keeps_the_share_that_is_cropped() -> None:
    tower, _ = tiny_vision()
    cropping = CLIPImageProcessorPil(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    )
    settings = set_image_size(tower, cropping, 64)[1].to_dict()
    assert settings["size"] == {"shortest_edge": 72}
    assert settings["crop_size"] == {"height": 64, "width": 64}


@pytest.mark.parametrize("family", ["clip", "eva02", "siglip2", "dinov2"])
def test_a_size_that_is_not_a_multiple_of_the_patch_is_rejected(family: str) -> None:
    with pytest.raises(ValueError, match=r"image_size=50 is not a multiple.* of 8 .*Use 48"):
        tiny_model(family, image_size=50)


def test_the_size_that_a_tower_was_trained_for_need_not_be_a_multiple() -> None:
    sizes = {"image_size": 36, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    tower = AutoModel.from_config(AutoConfig.for_model("siglip_vision_model", **sizes, **layers))
    same, processor = set_image_size(tower, tiny_vision("siglip")[1], 36)
    assert same is tower
    assert processor.to_dict()["size"] == {"height": 36, "width": 36}


@pytest.mark.parametrize("family", OWN_SIZE)
def test_a_tower_whose_positions_nothing_interpolates_keeps_its_size(family: str) -> None:
    with pytest.raises(ValueError, match=r"does not support .*=48: it only has positions for 32"):
        make_larger(family)


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        (
            "timm_wrapper",
            {"architecture": "mixer_s32_224", "model_args": {"img_size": 64}},
            "mixer_s32_224 does not support image_size=96: .*Remove image_size",
        ),
        (
            "timm_wrapper",
            {"architecture": "hiera_tiny_224", "model_args": {"embed_dim": 24}},
            "hiera_tiny_224 does not support image_size=96: it fails with Runtime",
        ),
        # A smaller image would silently get the positions of other distances.
        ("timm_wrapper", {"architecture": "mvitv2_tiny"}, "mvitv2_tiny .* positions for 224"),
        (
            "beit",
            {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 48, "image_size": 32, "patch_size": 8,
             "use_relative_position_bias": True},
            "image size affects weights other than the position embeddings",
        ),
    ],
    ids=["timm", "hiera", "mvitv2", "relative positions"],
)  # fmt: skip
def test_a_tower_that_cannot_change_its_size_is_rejected(
    model_type: str, settings: dict[str, Any], message: str
) -> None:
    tower = AutoModel.from_config(AutoConfig.for_model(model_type, **settings))
    with pytest.raises(ValueError, match=message):
        set_image_size(tower, tiny_vision()[1], 96)


@pytest.mark.parametrize("size", [96, 256])
def test_a_timm_network_of_windows_takes_other_sizes(size: int) -> None:
    """EfficientViT, whose patch size is one number, pads to whole windows."""
    settings: dict[str, Any] = {"architecture": "efficientvit_m0"}
    tower = AutoModel.from_config(AutoConfig.for_model("timm_wrapper", **settings))
    assert find_patch_size(tower) == 16
    _, processor = set_image_size(tower, tiny_vision("siglip")[1], size)
    assert processor.to_dict()["size"] == {"height": size, "width": size}
    with pytest.raises(ValueError, match="image_size=250 is not a multiple of the tower's patch"):
        set_image_size(tower, tiny_vision("siglip")[1], 250)


def test_patches_that_overlap_are_no_unit_of_the_image_size() -> None:
    """PVTv2 takes patches of 7 pixels in steps of 4, and keys from 8 of those: 32 pixels."""
    settings: dict[str, Any] = {"architecture": "pvt_v2_b0"}
    tower = AutoModel.from_config(AutoConfig.for_model("timm_wrapper", **settings))
    _, processor = set_image_size(tower, tiny_vision("siglip")[1], 96)
    assert processor.to_dict()["size"] == {"height": 96, "width": 96}
    assert choose_interpolation(tower, torch.zeros(1, 3, 96, 64), interpolate=False) == {}
    with pytest.raises(ValueError, match=r"105 is not a multiple .* 32 pixels.* Use 96"):
        set_image_size(tower, tiny_vision("siglip")[1], 105)


def test_images_of_another_size_than_mvitv2s_are_refused() -> None:
    """It counts the distances of positions from the largest one of its own size."""
    settings: dict[str, Any] = {"architecture": "mvitv2_tiny"}
    tower = AutoModel.from_config(AutoConfig.for_model("timm_wrapper", **settings))
    assert find_fixed_size(tower) == (224, 224)
    for size in (192, 256):
        with pytest.raises(ValueError, match=r"positions for 224 × 224 and cannot interpolate"):
            choose_interpolation(tower, torch.zeros(1, 3, size, size), interpolate=True)


@pytest.mark.parametrize(
    ("model_args", "trained", "stated"),
    [
        ({"img_size": 48}, [3, 32, 32], 48),
        ({"img_size": [48, 48]}, [3, 32, 32], 48),
        (None, [3, 32, 32], 32),
        ({}, [3, 32, 64], [32, 64]),
    ],
)
def test_the_configuration_of_a_timm_tower_states_its_image_size(
    model_args: dict[str, Any] | None, trained: list[int], stated: Any
) -> None:
    vision_config = AutoConfig.for_model(
        "timm_wrapper",
        architecture="test_vit",
        model_args=model_args,
        pretrained_cfg={"input_size": trained},
    )
    text_config = tiny_llm().config.to_dict() | {"is_causal": False}
    config = LLM2CLIPConfig(vision_config, text_config)
    assert config.vision_config.image_size == stated
    again = LLM2CLIPConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.vision_config.image_size == stated


# Another image size in a forward pass


@pytest.mark.parametrize("family", mostly_slow(WITH_ARGUMENT))
def test_larger_images_need_the_processors_option_and_the_models_argument(family: str) -> None:
    model, processor = shared_model(family)
    batch = processor(images=tiny_images(2), size={"height": LARGER, "width": LARGER})
    assert batch["pixel_values"].shape == (2, 3, LARGER, LARGER)
    needed = r"48 × 48 pixels, .* positions for 32 × 32.*pass interpol"
    with pytest.raises(ValueError, match=needed):
        encode(model, batch)
    assert encode(model, batch, interpolate_pos_encoding=True).shape == (2, 32)


def require_refused(family: str, shape: tuple[int, int], error: str, **arguments: Any) -> None:
    images = {"pixel_values": torch.rand(1, 3, *shape)}
    with pytest.raises(ValueError, match=error):
        encode(shared_model(family)[0], images, **arguments)


@pytest.mark.parametrize("family", mostly_slow(VISION_FAMILIES + MORE_VISION_FAMILIES))
def test_images_that_a_tower_has_no_positions_for_are_rejected(family: str) -> None:
    # 64 × 16 has as many patches as 32 × 32, and so has 36 × 36 without its incomplete patches.
    # SigLIP itself accepts both.
    for shape in [(64, 16), (36, 36)] if family in WITH_ARGUMENT + FIXED + OWN_SIZE else []:
        require_refused(family, shape, f"{shape[0]} × {shape[1]} pixels")
    if family in WITH_ARGUMENT + ANY_SIZE:
        incomplete = r"36 × 48 pixels: .* must be multiples of the patch"
        require_refused(family, (36, 48), incomplete, interpolate_pos_encoding=True)
    for interpolate in [False, True] if family in FIXED else []:
        option = r"cannot interpolate .*--image-size"
        require_refused(family, (48, 48), option, interpolate_pos_encoding=interpolate)
    # The argument changes nothing at the tower's own size.
    model, batch = shared_model(family)[0], shared_batch(family)
    assert torch.equal(encode(model, batch, interpolate_pos_encoding=True), encode(model, batch))


def build_hiera() -> PreTrainedModel:
    """Overlapping patches of 7 pixels in steps of 4, merged to 32; sizes are lists."""
    config = AutoConfig.for_model(
        "hiera", embed_dim=16, image_size=[64, 64], patch_size=[7, 7], patch_stride=[4, 4],
        depths=[1] * 4, num_heads=[1, 2, 4, 8], masked_unit_size=[8, 8],
    )  # fmt: skip
    return AutoModel.from_config(config).eval()


def build_with(tower: PreTrainedModel, size: int, **arguments: Any) -> LLM2CLIPModel:
    sides = {"height": size, "width": size}
    image_processor = CLIPImageProcessorPil(size=sides, do_center_crop=False)
    config = BuildConfig(prompt="llama-3", max_text_length=32, **arguments)
    return join_towers((tower, image_processor), (tiny_llm(), tiny_tokenizer()), config)[0]


def test_a_tower_whose_sizes_are_lists_takes_images_of_its_own_size_alone() -> None:
    tower = build_hiera()
    assert (find_fixed_size(tower), find_patch_size(tower)) == ((64, 64), 32)
    model = build_with(tower, 64, vision_pooling="patch_mean")
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        wanted = tower(images).last_hidden_state.mean(dim=1)
        # Sums of few numbers in another order.
        assert torch.allclose(model.get_vision_embeds(images), wanted, rtol=ROUNDING, atol=ROUNDING)
    for shape in ((1000, 32), (4, 4), (0, 0)):
        with pytest.raises(ValueError, match=r"must be multiples of the patch size 32"):
            model.get_vision_embeds(torch.rand(1, 3, *shape), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match=r"'?hiera'? does not support .*=128: .* separate height"):
        build_with(build_hiera(), 64, image_size=128)


def test_patches_that_are_not_square_are_rejected() -> None:
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": [32, 32], "patch_size": [8, 16]}
    tower = AutoModel.from_config(AutoConfig.for_model("internvl_vision", **settings, **sizes))
    with pytest.raises(
        ValueError, match=r"'internvl_vision' tower are \[8, 16\] pixels, but only sq"
    ):
        find_patch_size(tower)


def test_a_tower_that_has_an_interpolation_and_never_asks_for_it_has_a_fixed_size() -> None:
    pytest.importorskip("transformers.models.granite_docling")
    tower = AutoModel.from_config(AutoConfig.for_model(
        "granite_docling_vision", num_hidden_layers=1, image_size=32, patch_size=8, hidden_size=32,
        intermediate_size=48, num_attention_heads=2,
    )).eval()  # fmt: skip
    model = build_with(tower, 32)
    with pytest.raises(ValueError, match=r"64 × 16 pixels, .* 32 × 32 and cannot interpolate"):
        model.get_vision_embeds(torch.rand(1, 3, 64, 16), interpolate_pos_encoding=True)


def test_a_tower_that_silently_takes_other_shapes_is_rejected_by_a_measurement() -> None:
    tower, _ = tiny_vision("dinov2")
    table = tower.embeddings.position_embeddings
    tower.embeddings.interpolate_pos_encoding = lambda *_: table
    with pytest.raises(ValueError, match=r"'dinov2' tower accepts .* 128 × 8 pixels, but silently"):
        build_with(tower, IMAGE_SIZE)


def test_a_tower_with_a_number_per_pair_of_patches_takes_its_own_size_alone() -> None:
    """Its 16 × 256 pixels have as many patches as 64 × 64, and other pairs of them."""
    sizes = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}
    ratios = {"key_dim": [8, 8, 8], "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2]}
    config = AutoConfig.for_model("levit", image_size=64, **sizes, **ratios)
    for tower in (AutoModel.from_config(config), tiny_timm("levit_128s", {"img_size": 64})[0]):
        model = build_with(tower.eval(), 64)
        assert model.get_vision_embeds(torch.rand(1, 3, 64, 64)).shape[0] == 1
        with pytest.raises(ValueError, match=r"16 × 256 pixels, .* 64 × 64 and cannot interpolate"):
            model.get_vision_embeds(torch.rand(1, 3, 16, 256))


@pytest.mark.parametrize("family", ["siglip2", "dinov2"])
def test_a_towers_error_is_shown_unchanged(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate looks for the words of an error to find a batch size that fits."""
    model, processor = shared_model(family)
    error = RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(type(model.vision_model), "forward", fail)
    with pytest.raises(RuntimeError) as caught:
        model.get_vision_embeds(**processor(images=tiny_images(1)))
    assert caught.value is error


@pytest.mark.parametrize(
    ("family", "pixels"),
    [
        ("siglip2", torch.rand(1, 3, 32, 32)),
        ("clip", torch.rand(1, 16, 192)),
        ("clip", torch.rand(1, 4, 32, 32)),
        ("clip", torch.rand(1, 1, 3, 32, 32)),
        ("clip", torch.rand(32, 32)),
        ("clip", torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
    ],
)
def test_pixels_of_another_layout_or_dtype_are_rejected(family: str, pixels: torch.Tensor) -> None:
    shown = rf"{pixels.dtype} {re.escape(str(tuple(pixels.shape)))}\. Use the processor"
    with pytest.raises(ValueError, match=rf"for this vision tower, not {shown}"):
        shared_model(family)[0].get_vision_embeds(pixels)


# Mean and std


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("openai", [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        ("half", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
)
@pytest.mark.parametrize("family", ["siglip", "siglip2", "timm-siglip"])
def test_the_chosen_mean_and_std_are_applied_and_saved(
    name: Any, mean: list[float], std: list[float], family: str, tmp_path: Path
) -> None:
    processor = set_normalization(tiny_vision(family)[1], name)
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (settings["image_mean"], settings["image_std"]) == (mean, std)
    white = Image.new("RGB", (40, 48), "white")
    pixels = processor(white, return_tensors="pt")["pixel_values"]
    channels = pixels.reshape(-1, 3) if family == "siglip2" else pixels.flatten(2)[0].T
    expected = (1 - torch.tensor(mean)) / torch.tensor(std)
    # Resizing a white image may round to multiples of 1/255; float32 sums.
    assert torch.allclose(channels.float()[:9], expected.expand(9, 3), atol=1e-5)


def test_a_towers_own_mean_and_std_are_kept() -> None:
    processor = tiny_vision("timm-siglip")[1]
    assert set_normalization(processor, "own") is processor
    assert list(processor.image_mean) == list(processor.image_std) == [0.5, 0.5, 0.5]


def test_build_writes_size_and_mean_to_the_model_folder(tmp_path: Path) -> None:
    vision, llm = save_tiny_vision(tmp_path / "vision"), save_tiny_llm(tmp_path / "llm")
    flags = ["--prompt", "llama-3", "--image-size", str(LARGER), "--normalization", "half"]
    assert main(["build", str(vision), str(llm), str(tmp_path / "model"), *flags]) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["vision_config"]["image_size"] == LARGER
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "48 × 48 pixels, mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5]" in card
