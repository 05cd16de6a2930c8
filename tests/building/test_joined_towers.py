"""Several vision towers as one: it embeds like each of them, and everything else sees one tower."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import SHORT_RUN, EndAfter, names_that_differ, prepare
from PIL import Image
from tiny import (
    JOINED,
    draw_noise,
    tiny_dual_encoder,
    tiny_llm,
    tiny_model,
    tiny_tokenizer,
    tiny_vision,
)
from tiny_folders import save_tiny_llm
from transformers import (
    AutoModel,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    MobileViTImageProcessorPil,
)

from modeling_llm2clip import check_model
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.building.vision_towers import join_vision_towers
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.configuration_llm2clip import JoinedVisionConfig, LLM2CLIPConfig
from modeling_llm2clip.model_folders.fingerprint import fingerprint_vision

CONFIG = BuildConfig(prompt="llama-3", max_text_length=32)
KEPT_RATIO: dict[str, Any] = {"size": {"shortest_edge": 32}, "do_center_crop": False}
SQUARE: dict[str, Any] = {**KEPT_RATIO, "do_center_crop": True, "crop_size": 32}


def save_towers(folder: Path, *families: str) -> str:
    """Save towers like Hub repositories, and join their folders by "+"."""
    for family in families:
        for part in tiny_vision(family):
            part.save_pretrained(folder / family)
    return "+".join(str(folder / family) for family in families)


def render_smooth(side: int) -> Image.Image:
    return draw_noise(4, 4).resize((side, side), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("other", "most"), [("timm", 2e-6), ("timm-small", 0.04)])
@pytest.mark.parametrize("pooling", ["pooler", "cls", "patch_mean"])
def test_an_image_embedding_is_the_towers_embeddings_side_by_side(
    other: str, most: float, pooling: Any
) -> None:
    """Up to the rounding of a resized image: the other tower has another normalization."""
    towers = [tiny_vision("clip"), tiny_vision(other)]
    config = BuildConfig(prompt="llama-3", max_text_length=32, vision_pooling=pooling)
    text = (tiny_llm(vocabulary_size=len(tiny_tokenizer())), tiny_tokenizer())
    model, processor = join_towers([*towers], text, config)
    pixels = processor(images=[render_smooth(32)])["pixel_values"]
    seen: list[torch.Tensor] = []
    for tower in model.vision_model.towers:
        tower.register_forward_pre_hook(
            lambda _, __, inputs: seen.append(inputs["pixel_values"]), with_kwargs=True
        )
    embeds, apart = model.get_vision_embeds(pixels), []
    for (tower, image_processor), own_pixels in zip(towers, [*seen], strict=True):
        single, own_processor = join_towers((tower, image_processor), text, config)
        wanted = own_processor(images=[render_smooth(32)])["pixel_values"]
        torch.testing.assert_close(own_pixels, wanted, atol=most, rtol=0)
        apart.append(single.get_vision_embeds(own_pixels))
    assert torch.equal(embeds, torch.cat(apart, dim=-1))
    assert model.config.vision_width == sum(part.shape[1] for part in apart)


def test_towers_are_joined_by_one_command_into_a_healthy_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision, llm = save_towers(tmp_path, "timm-small", "dinov2"), save_tiny_llm(tmp_path / "llm")
    folder = tmp_path / "base"
    command = ["build", vision, str(llm), str(folder), "--prompt", "llama-3"]
    assert main([*command, "--max-text-length", "32", "--device", "cpu"]) == 0
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert [tower["model_type"] for tower in config["vision_config"]["towers"]] == [
        "timm_wrapper", "dinov2",
    ]  # fmt: skip
    assert (config["vision_config"]["image_sizes"], config["format_version"]) == ([16, 32], 2)
    assert check_model(folder, device="cpu").healthy
    before = fingerprint_vision(folder)
    config["vision_config"]["towers"][0]["dtype"] = "bfloat16"  # of no consequence
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert fingerprint_vision(folder) == before
    monkeypatch.setattr(sys.modules[LLM2CLIPConfig.__module__], "FORMAT_VERSION", 1)
    with pytest.raises(ValueError, match=r"format_version=2.*Upgrade modeling_llm2clip"):
        LLM2CLIPConfig.from_pretrained(folder)


def test_every_tower_is_loaded_in_the_dtype_and_with_the_attention_that_were_asked(
    tmp_path: Path,
) -> None:
    folder = prepare(tmp_path, vision="clip+dinov2", has_stores=False).model
    model = AutoModel.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", device_map={"": "cpu"}
    )
    for tower in model.vision_model.towers:
        assert (tower.dtype, tower.config._attn_implementation) == (torch.bfloat16, "eager")
    assert {"CLIPEncoderLayer", "Dinov2Layer"} <= model._no_split_modules
    embeds = model.get_vision_embeds(torch.rand(2, 3, 32, 32))
    assert embeds.dtype == torch.float32 and embeds.shape == (2, 64)


def test_a_dictionary_sets_the_attention_of_joined_towers_and_only_theirs() -> None:
    model, _ = tiny_model(JOINED)
    towers = model.vision_model.towers
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = model.get_vision_embeds(pixels)
    for choice, vision, text in (
        ({"vision_config": "eager"}, "eager", "sdpa"),
        ({"text_config": "eager"}, "eager", "eager"),
        ("sdpa", "sdpa", "sdpa"),
    ):
        model.set_attn_implementation(choice)
        assert {tower.config._attn_implementation for tower in towers} == {vision}
        assert model.text_model.config._attn_implementation == text
        # The kernels add in another order, in float32.
        torch.testing.assert_close(model.get_vision_embeds(pixels), before, atol=1e-5, rtol=0)


def test_padding_to_a_square_does_not_count_as_normalization() -> None:
    padding = LlavaImageProcessorPil(**SQUARE, do_pad=True)
    tower, _ = join_vision_towers([tiny_vision("clip"), (tiny_vision("dinov2")[0], padding)])
    config: Any = tower.config
    torch.testing.assert_close(torch.tensor(config.pixel_scales), torch.ones(2, 3))
    torch.testing.assert_close(torch.tensor(config.pixel_shifts), torch.zeros(2, 3))


@pytest.mark.parametrize("family", ["siglip2", "clip of any shape", "clip in BGR", "cls"])
def test_what_cannot_be_joined_is_refused_by_name(family: str) -> None:
    text = (tiny_llm(vocabulary_size=len(tiny_tokenizer())), tiny_tokenizer())
    if family == "cls":  # SigLIP has no class token
        towers = [tiny_vision("clip"), tiny_vision("siglip")]
        with pytest.raises(ValueError, match=r"vision_pooling='cls'.* has no class token"):
            join_towers([*towers], text, BuildConfig(prompt="llama-3", vision_pooling="cls"))
        return
    tower, image_processor = tiny_vision(family.split()[0])
    if family == "clip of any shape":
        image_processor = CLIPImageProcessorPil(**KEPT_RATIO)
    elif family == "clip in BGR":
        image_processor = MobileViTImageProcessorPil(**SQUARE)
    tower.config._name_or_path = "owner/name"
    both = "owner/name and dinov2|dinov2 and owner/name"
    reason = (
        rf"({both}) cannot be joined: their image processors change colors differently"
        if "BGR" in family
        else "owner/name cannot be joined.*fixed image size"
    )
    towers = [tiny_vision("dinov2"), (tower, image_processor)]
    for order in (towers, towers[::-1]):
        with pytest.raises(ValueError, match=reason):
            join_vision_towers(order)


def test_only_one_dual_encoder_can_keep_its_projection(tmp_path: Path) -> None:
    for part in tiny_dual_encoder("clip"):
        part.save_pretrained(tmp_path / "clip")
    vision = f"{tmp_path / 'clip'}+{save_towers(tmp_path, 'dinov2')}"
    config = BuildConfig(prompt="llama-3", keep_projection=True)
    with pytest.raises(ValueError, match=r"keep_projection .* of one dual encoder, not of 2"):
        join_towers(vision, save_tiny_llm(tmp_path / "llm"), config)


@pytest.mark.parametrize("case", ["none", "one twice", "joined before", "of two dtypes"])
def test_only_several_single_towers_of_one_dtype_are_joined(case: str) -> None:
    clip, dinov2 = tiny_vision("clip"), tiny_vision("dinov2")
    towers, reason = {
        "none": ([], "vision is an empty list"),
        "one twice": ([clip, clip], "a loaded tower is listed twice"),
        "joined before": ([clip, tiny_vision(JOINED)], "or is several towers already joined"),
        "of two dtypes": (
            [clip, (dinov2[0].bfloat16(), dinov2[1])],
            r"have the dtypes torch.bfloat16, torch.float32.* Cast them first",
        ),
    }[case]
    text = (tiny_llm(vocabulary_size=len(tiny_tokenizer())), tiny_tokenizer())
    with pytest.raises(ValueError, match=reason):
        join_towers([*towers], text, CONFIG)


@pytest.mark.parametrize("parts", ["{joined}", "{single}+{joined}"])
def test_the_folder_of_a_joined_model_is_no_source_of_a_tower(parts: str, tmp_path: Path) -> None:
    joined, single = prepare(tmp_path, vision=JOINED, has_stores=False).model, "clip"
    vision = parts.format(joined=joined, single=save_towers(tmp_path, single))
    with pytest.raises(ValueError, match=rf"^{joined} has several vision towers.* joined by \+\.$"):
        join_towers(vision, save_tiny_llm(tmp_path / "llm"), CONFIG)


def test_joined_towers_have_no_details_to_ask_for_but_can_be_asked_for_none() -> None:
    model, _ = tiny_model(JOINED)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = model.get_image_features(pixels).pooler_output
    for name in ("output_hidden_states", "output_attentions"):
        asked = model.get_image_features(pixels, **{name: False})
        assert torch.equal(asked.pooler_output, wanted)
        with pytest.raises(TypeError, match=rf"has no arguments \['{name}'\]. Remove"):
            model.get_image_features(pixels, **{name: True})
    for name in ("pooling", "output_hidden_state"):  # one is the configuration's, one misspelled
        with pytest.raises(TypeError, match=rf"has no arguments \['{name}'\]. Remove"):
            model.get_image_features(pixels, **{name: False})
    with pytest.raises(TypeError, match=r"has no arguments \['num_items_in_batch'\]. Remove"):
        model.get_image_features(pixels, num_items_in_batch=torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("towers", [], "a configuration"),
        ("towers", None, "a configuration"),
        ("image_sizes", [32], "a positive integer"),
        ("image_sizes", 32, "a positive integer"),
        ("image_sizes", [32, "16"], "a positive integer"),
        ("image_sizes", [32, 0], "a positive integer"),
        ("pixel_scales", [[1.0] * 3], "three numbers"),
        ("pixel_scales", [[1.0] * 3, [1.0] * 2], "three numbers"),
        ("pixel_shifts", [[0.0] * 3, 0.0], "three numbers"),
        ("pixel_shifts", [[0.0] * 3, [0.0, None, 0.0]], "three numbers"),
    ],
)
def test_joined_fields_of_another_length_or_type_are_refused(
    field: str, value: Any, expected: str
) -> None:
    content = tiny_vision(JOINED)[0].config.to_dict()
    with pytest.raises(ValueError, match=rf"{field} must be a list with {expected} for each"):
        JoinedVisionConfig.from_dict({**content, field: value})


def test_an_unknown_field_of_joined_towers_causes_a_warning() -> None:
    content = tiny_vision(JOINED)[0].config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        JoinedVisionConfig.from_dict(content)
    with pytest.warns(UserWarning, match=r"JoinedVisionConfig has no fields \['tower_names'\]"):
        JoinedVisionConfig.from_dict({**content, "tower_names": []})


@pytest.mark.parametrize("training", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_training_joined_towers_resumes_identically(training: Any, tmp_path: Path) -> None:
    prepared = prepare(tmp_path, vision=JOINED)
    options: dict[str, Any] = {**SHORT_RUN, "vision_training": training}
    options["gradient_checkpointing"] = True
    whole = prepared.align(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        prepared.align(tmp_path / "run", callbacks=[EndAfter(3)], **options)
    resumed = prepared.align(tmp_path / "run", resume=True, **options)
    assert not names_that_differ(resumed.model, whole.model)
    changed = names_that_differ(prepared.model, whole.model)
    for number in (0, 1):
        assert any(name.startswith(f"vision_model.towers.{number}.") for name in changed)
