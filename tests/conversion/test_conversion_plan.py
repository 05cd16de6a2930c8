"""What cannot be converted correctly is refused by name before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from breaking import edit_json
from converting import FORMAT_OF, LLM, LLM2VEC, copy_llm, plan, read_checkpoint, save_checkpoint

from modeling_llm2clip.conversion.layouts import LAYOUTS
from modeling_llm2clip.conversion.layouts.siglip2 import LAYOUT as SIGLIP2
from modeling_llm2clip.conversion.source_checkpoint import (
    CheckpointSource,
    LLMSource,
    open_checkpoint,
    open_language_model,
    split_revision,
)

State: TypeAlias = dict[str, torch.Tensor]


def refuse(family: str, folder: Path, match: str, **settings: Any) -> None:
    """Plan a conversion of a family's checkpoint, which must be refused in these words."""
    state = settings.pop("state", None)
    settings.setdefault("source_format", FORMAT_OF[family])
    source = save_checkpoint(family, folder / "source", state)
    with pytest.raises(ValueError, match=match):
        plan(source, **settings)


# Where a checkpoint is, and which family it belongs to


@pytest.mark.parametrize("family", FORMAT_OF)
def test_keys_of_another_family(tmp_path: Path, family: str) -> None:
    source = save_checkpoint(family, tmp_path)
    assert plan(source, source_format=FORMAT_OF[family])
    for other in set(FORMAT_OF) - {family}:
        with pytest.raises(
            ValueError, match=f"of the family '{family}', but the source format is for"
        ):
            plan(source, source_format=FORMAT_OF[other])


def test_a_file_that_is_not_there_and_a_local_source_with_a_revision(tmp_path: Path) -> None:
    file = save_checkpoint("openai", tmp_path / "source")
    for source, error in (
        (CheckpointSource(tmp_path / "c.pt"), "no such folder, and not a Hub id"),
        (CheckpointSource(tmp_path, file="c.pt"), r"c\.pt: no such file"),
        (CheckpointSource(tmp_path), "the weight file itself"),
        (CheckpointSource(file, revision="deadbeef"), "has no revision 'deadbeef'"),
        (CheckpointSource(file.parent, file.name, "deadbeef"), "has no revision 'deadbeef'"),
    ):
        with pytest.raises(ValueError, match=error):
            open_checkpoint(source)
    with pytest.raises(ValueError, match="has no revision 'deadbeef'"):
        open_language_model(LLMSource(LLM, "deadbeef"))


def test_the_revision_of_a_lora_follows_its_hub_id(tmp_path: Path) -> None:
    assert split_revision("me/lora@abc") == ("me/lora", "abc")
    assert split_revision("me/lora") == ("me/lora", None)
    (tmp_path / "a@b").mkdir()
    assert split_revision(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), None)
    with pytest.raises(ValueError, match="no revision after the '@'"):
        split_revision("me/lora@")
    with pytest.raises(ValueError, match="has no revision 'abc'"):
        split_revision(f"{tmp_path}@abc")


# Image sizes of SigLIP2


def test_the_image_size_of_siglip2_may_be_more_than_its_patches(tmp_path: Path) -> None:
    """timm drops what is beyond the last patch, as of 384 pixels in patches of 14."""
    source = save_checkpoint("siglip2", tmp_path)
    size = plan(source, source_format=FORMAT_OF["siglip2"]).image_processor.crop_size["height"]
    pixels = torch.rand(2, 3, size + 13, size + 13)
    outputs = []
    for more in (0, 6, 13):
        side = size + more
        planned = plan(source, source_format=replace(FORMAT_OF["siglip2"], image_size=side))
        assert planned.config.vision_config.model_args["img_size"] == side
        assert planned.image_processor.crop_size == {"height": side, "width": side}
        model = planned.model_class(planned.config).eval()
        weights = {name: value.read() for name, value in planned.weights.items()}
        model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            outputs.append(model.get_vision_embeds(pixels[..., :side, :side]))
    assert torch.equal(outputs[1], outputs[0]) and torch.equal(outputs[2], outputs[0])
    for more in (-1, 14):
        side = size + more
        with pytest.raises(ValueError, match=rf"image_size={side} gives \d+ patches of 14 pixels"):
            plan(source, source_format=replace(FORMAT_OF["siglip2"], image_size=side))


def test_patches_of_two_published_image_sizes_need_the_size() -> None:
    """SO400M in patches of 14 is published for 378 and for 384 pixels; both have 27."""
    shapes = {
        "visual.trunk.patch_embed.proj.weight": (72, 3, 14, 14),
        "visual.trunk.pos_embed": (1, 27 * 27, 72),
        "visual.trunk.blocks.0.mlp.fc1.weight": (144, 72),
        "visual.trunk.blocks.0.norm1.weight": (72,),
    }
    tensors: Any = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"both 378 and 384 pixels\. Use the image_size"):
        SIGLIP2.make_vision_config(tensors, LAYOUTS["siglip2"].source_format, None)
    for size in (378, 384):
        stated = replace(LAYOUTS["siglip2"].source_format, image_size=size)
        config = SIGLIP2.make_vision_config(tensors, stated, None)
        assert config.model_args["img_size"] == size


def test_gelu_tanh_of_siglip2_can_be_named(tmp_path: Path) -> None:
    named = replace(FORMAT_OF["siglip2"], activation="gelu_tanh")
    planned = plan(save_checkpoint("siglip2", tmp_path), source_format=named)
    model: Any = planned.model_class(planned.config)
    activation = model.vision_model.timm_model.blocks[0].mlp.act
    values = torch.linspace(-3, 3, 50)
    wanted = torch.nn.functional.gelu(values, approximate="tanh")
    assert torch.equal(activation(values), wanted)


# Weights


def put(name: str, tensor: torch.Tensor) -> Callable[[State], object]:
    return lambda state: state.update({name: tensor})


def mix_bias_layouts(state: State) -> None:
    state["visual.blocks.0.attn.q_bias"] = state["visual.blocks.0.attn.q_proj.bias"]


def drop(*parts: str) -> Callable[[State], object]:
    """Remove the keys with one of these parts."""
    return lambda state: [state.pop(k) for k in list(state) if any(part in k for part in parts)]


BROKEN: dict[str, tuple[str, Callable[[State], object], str]] = {
    "missing": (
        "openai", drop("visual.ln_post.bias"),
        r"(?s)1 missing:\s+vision_model\.post_layernorm\.bias",
    ),
    "unknown, by its own name": (
        "siglip2", put("visual.trunk.extra", torch.ones(1)),
        r"(?s)1 not in the model:\s+visual\.trunk\.extra",
    ),
    "both layouts of one bias": ("eva02", mix_bias_layouts, "would both become .*q_proj.bias"),
    "no adapter": ("eva02", drop("text."), "has no text adapter .*a bare vision tower"),
    "a part of an adapter": (
        "eva02", drop(".0.fn.0.weight"), "has only a part of a text adapter: text"
    ),
    "integers": (
        "openai", lambda s: s.update({"visual.conv1.weight": s["visual.conv1.weight"].char()}),
        r"(?s)1 not floating-point.*torch\.int8",
    ),
    "a temperature that no training leaves": (
        "openai", put("logit_scale", torch.tensor(9.0)),
        "logit_scale 9, but training keeps it between 0 and ln 100",
    ),
    "no rotary tables": ("eva02", drop(".rope."), "has no tables of rotary positions"),
    "a half of them": ("eva02", drop("rope.freqs_sin"), "has no tables of rotary positions"),
    "other tables in a block": (
        "eva02", put("visual.blocks.1.attn.rope.freqs_sin", torch.rand(36, 12)),
        r"The checkpoint.s rotary positions .* do not match 6 × 6",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_weights_that_do_not_make_a_model_are_named(name: str, tmp_path: Path) -> None:
    family, change, error = BROKEN[name]
    state = read_checkpoint(family)
    change(state)
    refuse(family, tmp_path, error, state=state)


def test_keys_without_an_account_or_of_no_family_are_printed(tmp_path: Path) -> None:
    state = {"encoder.weight": torch.ones(2)}
    refuse("openai", tmp_path, r"0 known families.*encoder\.weight.*llm2clip build", state=state)
    extra = {f"visual.extra_{i}": torch.ones(i) for i in range(1, 30)}
    source = save_checkpoint("eva02", tmp_path, {**read_checkpoint("eva02"), **extra})
    with pytest.raises(ValueError, match="29 of 114 keys that are neither used") as refused:
        plan(source, source_format=FORMAT_OF["eva02"])
    assert all(f"{name} ({i},)" in str(refused.value) for i, name in enumerate(extra, 1))


def test_a_tower_whose_images_are_not_square_is_named(tmp_path: Path) -> None:
    source = save_checkpoint("hub_clip", tmp_path / "source")
    sides = {"image_size": [40, 40]}
    edit_json("config.json", lambda content: content["vision_config"].update(sides))(source)
    with pytest.raises(
        ValueError, match=r"image_size=\[40, 40\].*Set image_size to a single number"
    ):
        plan(source, source_format=FORMAT_OF["hub_clip"])


# Source formats

FORMATS: dict[str, tuple[str, dict[str, Any], str]] = {
    "preprocessing that nobody chose": (
        "siglip2", {"preprocessing": None}, "preprocessing is missing. .*'openai'.*'half'"
    ),
    "heads that do not divide the tower": (
        "openai", {"head_width": 7}, "head_width=7 does not divide the vision tower's width of 24"
    ),
    "an activation that the repository contradicts": (
        "hub_clip", {"activation": "gelu"},
        "activation='gelu' contradicts .* hidden_act='quick_gelu'",
    ),
    "a prompt of another family": (
        "openai", {"prompt": None, "prompt_prefix": "<|no such token|>"},
        "which are not special tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_source_format_that_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    family, changes, error = FORMATS[name]
    refuse(family, tmp_path, error, source_format=replace(FORMAT_OF[family], **changes))
    assert LAYOUTS["siglip2"].source_format.preprocessing is None


# The LLM and its LoRA


def test_the_refusal_of_a_width_names_llms_that_have_it(tmp_path: Path) -> None:
    state = {f"text.text_adaptor.{k}": torch.zeros(shape) for k, shape in {
        "0.fn.0.weight": (4096, 2048), "2.weight": (20, 2048)}.items()}  # fmt: skip
    state |= {k: v for k, v in read_checkpoint("openai").items() if "text_adaptor" not in k}
    refuse(
        "openai",
        tmp_path,
        r"takes embeddings of width 2048, .*width 32.*\n?.*Llama-3\.2-1B",
        state=state,
    )


def test_a_lora_for_another_base_by_name(tmp_path: Path) -> None:
    source = LLMSource(copy_llm(tmp_path / "Llama-3.1-8B"), loras=(LLM2VEC / "llama_lora",))
    refuse("openai", tmp_path, r"is for the base 'llama', but the LLM is .*Llama-3\.1-8B'",
           llm=source)  # fmt: skip


def test_an_llm_of_another_size_than_its_configuration(tmp_path: Path) -> None:
    llm = copy_llm(tmp_path / "llama")
    path = llm / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 40}))
    refuse("openai", tmp_path, r"(?s)6 of another shape:.*mlp\.down_proj", llm=LLMSource(llm))


def test_a_lora_in_the_place_of_its_base_or_beside_a_merged_llm(tmp_path: Path) -> None:
    lora = LLM2VEC / "llama_lora"
    refuse("openai", tmp_path, "a LoRA, not a whole LLM. Pass the LoRA's base", llm=LLMSource(lora))
    source = LLMSource(LLM, loras=(lora,))
    refuse("siglip2", tmp_path, "contains the LLM's weights with the LoRA", llm=source)


# EVA02's tables of rotary positions


def make_rotary_tables(side: int, head_width: int, reference: int) -> dict[str, torch.Tensor]:
    """Make the official code's tables: one rule for rows and columns, each angle twice."""
    frequencies = 10000.0 ** -(torch.arange(0, head_width // 2, 2).float() / (head_width // 2))
    angles = (torch.arange(side) / side * reference)[:, None] * frequencies
    angles = angles.repeat_interleave(2, dim=1)  # (side, head_width // 2)
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    both = torch.cat([rows, columns], dim=-1).reshape(side * side, head_width)
    return {"freqs_cos": both.cos(), "freqs_sin": both.sin()}


def replace_rotary_tables(state: dict[str, torch.Tensor], **sizes: int) -> dict[str, torch.Tensor]:
    tables = make_rotary_tables(**{"side": 6, "head_width": 12, "reference": 4, **sizes})
    return {
        key: tables[key.rsplit(".", 1)[-1]] if ".rope." in key else value
        for key, value in state.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotary_tables_that_the_tower_computes_are_accepted_in_any_dtype(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    made = replace_rotary_tables(read_checkpoint("eva02"))
    for key, value in read_checkpoint("eva02").items():
        # The rule above is the official code's, up to the rounding of a cosine.
        torch.testing.assert_close(made[key], value, atol=1e-6, rtol=0)
    state = {key: value.to(dtype) for key, value in made.items()}
    plan(save_checkpoint("eva02", tmp_path, state), source_format=FORMAT_OF["eva02"])


@pytest.mark.parametrize("sizes", [{"reference": 3}, {"reference": 16}, {"head_width": 8}])
def test_heads_and_reference_size_are_read_from_the_rotary_tables(
    sizes: dict[str, int], tmp_path: Path
) -> None:
    state = replace_rotary_tables(read_checkpoint("eva02"), **sizes)
    planned = plan(save_checkpoint("eva02", tmp_path, state), source_format=FORMAT_OF["eva02"])
    model_args = planned.config.vision_config.model_args
    expected = {"reference": 4, "head_width": 12, **sizes}
    assert model_args["ref_feat_shape"] == [expected["reference"]] * 2
    assert model_args["num_heads"] == 24 // expected["head_width"]


@pytest.mark.parametrize("part", ["freqs_cos", "freqs_sin"])
def test_rotary_tables_of_no_reference_size_are_refused(part: str, tmp_path: Path) -> None:
    state = read_checkpoint("eva02")
    other = replace_rotary_tables(state, reference=16)
    key = f"visual.rope.{part}"
    refuse("eva02", tmp_path, "do not match 6 × 6 patches", state={**state, key: other[key]})
