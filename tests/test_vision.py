"""Vision towers: real shapes of the paper's towers, pooling, widths, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_models import ROUNDING, images_of, mostly_slow, shared_batch
from tiny import IMAGE_SIZE, tiny_images, tiny_llm, tiny_model, tiny_tokenizer, tiny_vision
from transformers import AutoConfig, AutoModel, CLIPImageProcessorPil

from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel
from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.building.tower_checks import measure_vision_width, require_loadable
from modeling_llm2clip.building.vision_towers import load_vision_tower
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.loading_llm2clip import build_tower
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.vision_llm2clip import find_fixed_size, find_width, pool_vision

# Model type, configuration, width of an image embedding, number of parameters without projection.
# CLIP and EVA02 are as in the official checkpoints, SigLIP as in both implementations.
SO400M = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "patch_size": 14, "image_size": 224,
}  # fmt: skip
CLIP_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip


def in_timm(architecture: str) -> tuple[str, dict[str, Any]]:
    return "timm_wrapper", {"architecture": architecture}


REAL_TOWERS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "CLIP B/16": ("clip_vision_model", {"patch_size": 16}, 768, 85_799_424),
    "CLIP L/14": ("clip_vision_model", {**CLIP_LARGE, "image_size": 224}, 1024, 303_179_776),
    "CLIP L/14-336": ("clip_vision_model", {**CLIP_LARGE, "image_size": 336}, 1024, 303_507_456),
    "EVA02 B/16": (*in_timm("eva02_base_patch16_clip_224"), 768, 85_869_312),
    "EVA02 L/14": (*in_timm("eva02_large_patch14_clip_224"), 1024, 303_317_952),
    "EVA02 L/14-336": (*in_timm("eva02_large_patch14_clip_336"), 1024, 303_645_632),
    "SigLIP So400m/14": ("siglip_vision_model", SO400M, 1152, 427_680_704),
    "timm SigLIP": (*in_timm("vit_so400m_patch14_siglip_224"), 1152, 427_680_704),
}


@pytest.mark.parametrize("name", REAL_TOWERS)
def test_a_tower_of_the_paper_has_its_real_shape(name: str) -> None:
    model_type, settings, width, count = REAL_TOWERS[name]
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(model_type, **settings))
    side = 336 if name.endswith("336") else 224
    assert find_fixed_size(model) == (side, side)
    assert find_width(model) == width
    assert sum(parameter.numel() for parameter in model.parameters()) == count


# Pooling


@pytest.mark.parametrize("family", ["siglip", "siglip2", "timm-siglip", "aimv2"])
def test_cls_pooling_is_rejected_without_a_class_token(family: str) -> None:
    with pytest.raises(ValueError, match=r"vision_pooling='cls'.* no class token.*is a patch"):
        tiny_model(family, vision_pooling="cls")


@pytest.mark.parametrize(
    "family", mostly_slow(["clip", "dinov2", "dinov3_vit", "vit", "timm", "eva02"])
)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_class_token_or_the_mean_of_all_tokens_can_be_pooled(family: str, pooling: str) -> None:
    model, _ = tiny_model(family, vision_pooling=pooling)
    images = images_of(shared_batch(family))
    with torch.no_grad():
        tokens = model.vision_model(**images).last_hidden_state
        embeds = model.get_vision_embeds(**images)
    wanted = tokens[:, 0] if pooling == "cls" else tokens.mean(dim=1)
    assert torch.allclose(embeds, wanted, rtol=ROUNDING, atol=ROUNDING)


def test_the_mean_of_patches_excludes_padding() -> None:
    model, processor = tiny_model("siglip2", vision_pooling="mean")
    batch = processor(images=[tiny_images(1)[0].resize((100, 30))])
    mask = batch["pixel_attention_mask"]
    assert 0 < mask.sum() < mask.numel()
    with torch.no_grad():
        output = model.vision_model(**batch)
        found = model.get_vision_embeds(**batch)
    wanted = output.last_hidden_state[0, mask[0].bool()].mean(dim=0)
    # Sums of few numbers in another order; the length is not 1.
    assert torch.allclose(found[0], wanted, rtol=ROUNDING, atol=ROUNDING)
    given = {"vision_model": model.vision_model, "pixel_values": batch["pixel_values"]}
    assert (pool_vision(output, "mean", **given)[0] - wanted).abs().max() > 1e-3
    # All tokens of SigLIP2 are patches.
    of_patches = pool_vision(output, "patch_mean", **given, patch_mask=mask)[0]
    assert torch.allclose(of_patches, wanted, rtol=ROUNDING, atol=ROUNDING)


SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "patch_size": 8, "image_size": IMAGE_SIZE,
}  # fmt: skip


def make_tower(model_type: str, **settings: Any) -> Any:
    return AutoModel.from_config(AutoConfig.for_model(model_type, **SMALL | settings)).eval()


def tower_with_registers(model_type: str) -> Any:
    """A tower with a class token, three registers and sixteen patches."""
    return make_tower(model_type, num_register_tokens=3)


def join(tower: Any, pooling: Any, image_processor: Any = None) -> Any:
    tokenizer = tiny_tokenizer()
    text = (tiny_llm(vocabulary_size=len(tokenizer)), tokenizer)
    config = BuildConfig(prompt="llama-3", vision_pooling=pooling, text_adapter_layers=0)
    return join_towers((tower, image_processor or tiny_vision()[1]), text, config)[0]


@pytest.mark.parametrize(
    ("family", "num_prefix"),
    [
        ("clip", 1), ("siglip", 0), ("siglip2", 0), ("dinov2", 1), ("vit", 1), ("timm", 1),
        ("eva02", 1), ("timm-siglip", 0), ("aimv2", 0), ("dinov3_vit", 4),
        ("dinov2_with_registers", 4),
    ],
)  # fmt: skip
def test_patch_mean_excludes_class_token_and_registers(family: str, num_prefix: int) -> None:
    tower, image_processor = tiny_vision("clip" if "registers" in family else family)
    if num_prefix > 1:
        tower = tower_with_registers(family)
    model = join(tower, "patch_mean", image_processor)
    images = image_processor(tiny_images(2), return_tensors="pt")
    with torch.no_grad():
        tokens = model.vision_model(**images).last_hidden_state
        found = model.get_vision_embeds(**images)
    wanted = tokens[:, num_prefix:].mean(dim=1)
    # Sums of few numbers in another order; the length is not 1.
    assert torch.allclose(found, wanted, rtol=ROUNDING, atol=ROUNDING)
    if num_prefix:
        assert (wanted - tokens.mean(dim=1)).abs().max() > 1e-3


def test_patch_mean_is_rejected_if_the_tokens_do_not_match_the_patches() -> None:
    tower = tower_with_registers("dinov2_with_registers")
    registers = tower.embeddings.register_tokens.detach()
    del tower.embeddings.register_tokens
    tower.embeddings.register_tokens = registers  # not a parameter, as under an unknown name
    with pytest.raises(ValueError, match=r"returns 20 tokens, 1 of them .* for 16 patches"):
        join(tower, "patch_mean")


def test_patch_mean_needs_tokens() -> None:
    with pytest.raises(ValueError, match=r"vision_pooling='patch_mean' needs tokens"):
        join(tiny_vision("timm with batch norm")[0], "patch_mean")


# Families with another name for their width

CONVOLUTIONAL: dict[str, dict[str, Any]] = {
    "convnext": {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]},
    "resnet": {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "embedding_size": 8},
}


@pytest.mark.parametrize("family", CONVOLUTIONAL)
def test_a_convolutional_tower_has_the_width_of_its_last_stage(family: str) -> None:
    tower = AutoModel.from_config(AutoConfig.for_model(family, **CONVOLUTIONAL[family])).eval()
    model = join(tower, "pooler", CLIPImageProcessorPil())
    assert model.visual_projection.in_features == 20
    images = CLIPImageProcessorPil()(tiny_images(2), return_tensors="pt")
    with torch.no_grad():
        assert model.get_vision_embeds(**images).shape == (2, 20)


def test_a_width_other_than_the_tower_states_is_measured_and_saved(tmp_path: Path) -> None:
    tower, _ = tiny_vision("radio")  # whose summary is two class tokens, one after another
    model = join(tower, "pooler")
    assert find_width(tower) == 32
    assert model.config.vision_width == model.visual_projection.in_features == 64
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_a_width_that_the_tower_does_not_state_is_measured() -> None:
    settings = {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320}
    config = AutoConfig.for_model("efficientnet", **settings)
    tower = AutoModel.from_config(config).eval()
    assert measure_vision_width(tower, tiny_vision("clip")[1], "pooler") == 320
    of_one_pixel = CLIPImageProcessorPil(size={"height": 1, "width": 1}, do_center_crop=False)
    with pytest.raises(ValueError, match=r"ProcessorPil has size=.*an image side of one pixel"):
        measure_vision_width(tower, of_one_pixel, "pooler")
    text_config = tiny_llm().config.to_dict() | {"is_causal": False}
    with pytest.raises(ValueError, match="'efficientnet' tower does not state the width"):
        LLM2CLIPModel(LLM2CLIPConfig(config, text_config))
    model = LLM2CLIPModel(LLM2CLIPConfig(config, text_config, vision_width=320))
    assert model.visual_projection.in_features == 320


def test_a_tower_without_a_pooled_output_names_the_option() -> None:
    with pytest.raises(ValueError, match=r"'ijepa' .*no pooler output.*build --vision-pooling"):
        join(tiny_vision("ijepa")[0], "pooler")


@pytest.mark.parametrize(
    ("pooling", "tokens"), [("cls", slice(1)), ("patch_mean", slice(10, None))]
)
def test_tokens_of_radio_are_pooled_by_name(pooling: str, tokens: slice) -> None:
    """Three class tokens and seven registers are one parameter there."""
    model = join(tiny_vision("radio")[0], pooling)
    images = tiny_vision("clip")[1](tiny_images(2), return_tensors="pt")
    with torch.no_grad():
        wanted = model.vision_model(**images).last_hidden_state[:, tokens].mean(dim=1)
        found = model.get_vision_embeds(**images)
    assert model.config.vision_width is None
    # Sums of few numbers in another order.
    assert torch.allclose(found, wanted, rtol=ROUNDING, atol=ROUNDING)


# Towers inside MLLMs, which need inputs that their MLLM computes.
INSIDE_MLLMS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_vl_vision": (
        "grid_thw", {"depth": 1, "num_heads": 4, "patch_size": 8, "deepstack_visual_indexes": [0]},
    ),
    "qwen3_5_vision": ("grid_thw", {"depth": 1, "num_heads": 4, "patch_size": 8}),
    "gemma4_vision": (
        "pixel_position_ids",
        {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", INSIDE_MLLMS)
def test_a_tower_that_needs_more_than_pixels_is_rejected_before_the_llm_is_loaded(
    family: str, tmp_path: Path
) -> None:
    pytest.importorskip(f"transformers.models.{family.removesuffix('_vision')}")
    needed, extras = INSIDE_MLLMS[family]
    config = AutoConfig.for_model(family, hidden_size=32, intermediate_size=64, **extras)
    tower = build_tower(config).eval()
    refusal = rf"'{family}' tower needs .*{needed}, which its MLLM computes.*Use CLIP"
    tower.save_pretrained(tmp_path)
    tiny_vision()[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=refusal):
        load_vision_tower(tmp_path)
    whole = AutoConfig.for_model(family.removesuffix("_vision"), vision_config=config.to_dict())
    whole.save_pretrained(tmp_path / "whole")  # without weights, which are not read
    with pytest.raises(ValueError, match=refusal):
        load_vision_tower(tmp_path / "whole")
    with pytest.raises(ValueError, match=refusal):
        join(tower, "pooler")


@pytest.mark.parametrize("pooling", ["pooler", "mean", "patch_mean"])
def test_a_tower_that_joins_the_images_of_a_batch_is_rejected(pooling: str) -> None:
    """Pixtral makes one sequence of all patches, so that a mean would be that of the batch."""
    tower = make_tower("pixtral", head_dim=8)
    refusal = r"'pixtral' tower joins the images of a batch: .* Use another vision tower\."
    with pytest.raises(ValueError, match=refusal):
        join(tower, pooling)
    with pytest.raises(ValueError, match=refusal):
        pixels = torch.rand(3, 3, IMAGE_SIZE, IMAGE_SIZE)
        pool_vision(tower(pixels), pooling, vision_model=tower, pixel_values=pixels)


@pytest.mark.slow
def test_a_compiled_tower_of_patches_takes_them() -> None:
    model, processor = tiny_model("siglip2")
    inputs = processor(images=tiny_images(2))
    with torch.no_grad():
        expected = model.get_image_features(**inputs).pooler_output
        model.vision_model = torch.compile(model.vision_model, backend="eager")
        found = model.get_image_features(**inputs).pooler_output
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


def test_a_backbone_is_refused_as_a_vision_tower() -> None:
    """It returns feature maps, and no `last_hidden_state`."""
    config = AutoConfig.for_model(
        "hgnet_v2", embedding_size=8, depths=[1], hidden_sizes=[16], stem_channels=[3, 8, 8],
        stage_in_channels=[8], stage_mid_channels=[8], stage_out_channels=[16],
        stage_num_blocks=[1], stage_downsample=[False], stage_light_block=[False],
        stage_kernel_size=[3], stage_numb_of_layers=[1],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"tower 'hgnet_v2' .* Use another vision tower, or"):
        join(AutoModel.from_config(config), "pooler")


def test_a_pooler_that_returns_a_map_is_rejected() -> None:
    tower, _ = tiny_vision("vit")
    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    output = tower(images)
    output.pooler_output = output.last_hidden_state
    with pytest.raises(ValueError, match=r"needs a row per image.*2 images into \(2, 17, 32\)"):
        pool_vision(output, "pooler", vision_model=tower, pixel_values=images)


class _Dropout(torch.nn.Module):
    """Takes the place of a tower's dropout, and does something else with its tokens."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.change(tokens)


def fail(tokens: torch.Tensor) -> torch.Tensor:
    raise ValueError(f"no {tokens.ndim} tokens")


@pytest.mark.parametrize(
    ("change", "pooling", "error"),
    [
        (fail, "pooler", r"tower 'vit' cannot .* fails \(ValueError: no 3 tok"),
        # The images of a batch are mixed.
        (lambda t: t + t.mean(dim=0, keepdim=True), "cls",
         "'vit' tower returns a different .*next to another i"),
        # The class token is the last.
        (lambda t: t.roll(-1, dims=1), "cls", "does not describe the network"),
        (lambda t: t.roll(-1, dims=1), "patch_mean", "does not describe the network"),
    ],
)  # fmt: skip
def test_a_tower_whose_pass_does_something_else_is_rejected(
    change: Any, pooling: str, error: str
) -> None:
    tower, _ = tiny_vision("vit")
    tower.embeddings.dropout = _Dropout(change)
    with pytest.raises(ValueError, match=error):
        join(tower, pooling)


def test_a_tower_with_random_masks_is_rejected() -> None:
    with pytest.raises(
        ValueError, match=r"'vit_mae' tower returns a different embedding of an image"
    ):
        join(make_tower("vit_mae"), "mean")


# timm's tables that are not saved


@pytest.mark.parametrize("family", ["beit", "swinv2"])
def test_tables_that_timm_does_not_save_are_loaded_or_its_version_is_named(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading would leave arbitrary numbers there: an IndexError, or silently other embeddings."""
    model, processor = tiny_model(family)
    save_model(model, processor, tmp_path / "model")
    loaded = dict(LLM2CLIPModel.from_pretrained(tmp_path / "model").named_buffers())
    assert all(torch.equal(table, loaded[name]) for name, table in model.named_buffers())
    for module in model.vision_model.timm_model.modules():
        if "init_non_persistent_buffers" in vars(type(module)):
            monkeypatch.delattr(type(module), "init_non_persistent_buffers")  # as timm 1.0.22
    message = r"of timm cannot be loaded.*(k_bias|relative_).* Install timm 1\.0\.23 or later"
    with pytest.raises(ValueError, match=message):
        LLM2CLIPModel.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        require_loadable(model, processor)
