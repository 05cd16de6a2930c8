"""What cannot be converted correctly is refused by name before anything is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import (
    FORMAT_OF,
    LLM,
    LLM2VEC,
    copy_llm,
    plan,
    read_checkpoint,
    save_checkpoint,
)
from safetensors.torch import load_file, save_file
from tiny import tiny_llm, tiny_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

from modeling_llm2clip.conversion.layouts import LAYOUTS
from modeling_llm2clip.conversion.layouts.siglip2 import LAYOUT as SIGLIP2
from modeling_llm2clip.conversion.source_checkpoint import LLMSource


def refuse(family: str, folder: Path, match: str, **settings: Any) -> None:
    """Plan a conversion of a family's checkpoint, which must be refused in these words."""
    state = settings.pop("state", None)
    settings.setdefault("source_format", FORMAT_OF[family])
    source = save_checkpoint(family, folder / "source", state)
    with pytest.raises(ValueError, match=match):
        plan(source, **settings)


@pytest.mark.parametrize("more", [0, 6, 13])
def test_the_image_size_of_siglip2_may_be_more_than_its_patches(more: int, tmp_path) -> None:
    """timm drops what is beyond the last patch, as of 384 pixels in patches of 14."""
    source = save_checkpoint("siglip2", tmp_path)
    own = plan(source, source_format=FORMAT_OF["siglip2"])
    size = own.config.vision_config.model_args["img_size"]
    stated = replace(FORMAT_OF["siglip2"], image_size=size + more)
    planned = plan(source, source_format=stated)
    assert planned.config.vision_config.model_args["img_size"] == size + more
    assert planned.image_processor.crop_size == {"height": size + more, "width": size + more}
    pixels = torch.rand(2, 3, size + more, size + more)
    models = []
    for one in (own, planned):
        model = one.model_class(one.config).eval()
        weights = {name: value.read() for name, value in one.weights.items()}
        model.load_state_dict(weights, strict=False)
        models.append(model)
    with torch.no_grad():
        wanted = models[0].get_vision_embeds(pixels[..., :size, :size])
        assert torch.equal(models[1].get_vision_embeds(pixels), wanted)


@pytest.mark.parametrize("more", [-1, 14])
def test_an_image_size_of_other_patches_is_refused(more: int, tmp_path) -> None:
    source = save_checkpoint("siglip2", tmp_path / "own")
    own = plan(source, source_format=FORMAT_OF["siglip2"])
    size = own.config.vision_config.model_args["img_size"] + more
    refuse("siglip2", tmp_path, rf"image_size={size} is \d+ patches of 14 pixels; the weights have",
           source_format=replace(FORMAT_OF["siglip2"], image_size=size))  # fmt: skip


def test_patches_of_two_published_image_sizes_need_the_size() -> None:
    """SO400M in patches of 14 is published for 378 and for 384 pixels; both have 27."""
    shapes = {
        "visual.trunk.patch_embed.proj.weight": (72, 3, 14, 14),
        "visual.trunk.pos_embed": (1, 27 * 27, 72),
        "visual.trunk.blocks.0.mlp.fc1.weight": (144, 72),
        "visual.trunk.blocks.0.norm1.weight": (72,),
    }
    tensors: Any = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"378 and of 384 pixels have\. Give the image_size"):
        SIGLIP2.make_vision_config(tensors, LAYOUTS["siglip2"].source_format, None)
    for size in (378, 384):
        stated = replace(LAYOUTS["siglip2"].source_format, image_size=size)
        config = SIGLIP2.make_vision_config(tensors, stated, None)
        assert config.model_args["img_size"] == size


def test_gelu_tanh_of_siglip2_can_be_named(tmp_path) -> None:
    named = replace(FORMAT_OF["siglip2"], activation="gelu_tanh")
    planned = plan(save_checkpoint("siglip2", tmp_path), source_format=named)
    model: Any = planned.model_class(planned.config)
    activation = model.vision_model.timm_model.blocks[0].mlp.act
    values = torch.linspace(-3, 3, 50)
    wanted = torch.nn.functional.gelu(values, approximate="tanh")
    assert torch.equal(activation(values), wanted)


def test_an_llm_of_another_width_than_the_adapters(tmp_path) -> None:
    llm = tmp_path / "wide"
    tiny_llm(vocabulary_size=320).save_pretrained(llm)
    tiny_tokenizer().save_pretrained(llm)
    state = {k: v for k, v in read_checkpoint("openai").items() if "text_adaptor" not in k}
    wide = {"0.fn.0.weight": (128, 64), "0.fn.0.bias": (128,), "0.fn.3.weight": (64, 128),
            "0.fn.3.bias": (64,), "0.ln.weight": (64,), "0.ln.bias": (64,), "1.weight": (64,),
            "1.bias": (64,), "2.weight": (20, 64), "2.bias": (20,)}  # fmt: skip
    state |= {f"text.text_adaptor.{k}": torch.zeros(shape) for k, shape in wide.items()}
    refuse("openai", tmp_path, "takes embeddings of 64, but .*wide gives 32",
           state=state, llm=LLMSource(llm))  # fmt: skip


def test_the_refusal_of_a_width_names_llms_that_have_it(tmp_path) -> None:
    state = {f"text.text_adaptor.{k}": torch.zeros(shape) for k, shape in {
        "0.fn.0.weight": (4096, 2048), "2.weight": (20, 2048)}.items()}  # fmt: skip
    state |= {k: v for k, v in read_checkpoint("openai").items() if "text_adaptor" not in k}
    refuse(
        "openai", tmp_path, r"takes embeddings of 2048, .*gives 32.*\n?.*Llama-3\.2-1B", state=state
    )


def test_a_clip_text_tower_where_an_llm_belongs(tmp_path) -> None:
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=320,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(tmp_path / "text")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    refuse("openai", tmp_path, "is a 'clip_text_model'; LLM2CLIP needs a decoder",
           llm=LLMSource(tmp_path / "text"))  # fmt: skip


@pytest.mark.parametrize("where", ["checkpoint", "llm"])
def test_truncated_safetensors(tmp_path, where) -> None:
    llm = copy_llm(tmp_path / "llama")
    source = save_checkpoint("hub_clip", tmp_path / "source")
    path = (source if where == "checkpoint" else llm) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: .* is truncated .*SHA-256"):
        plan(source, source_format=FORMAT_OF["hub_clip"], llm=LLMSource(llm))


def test_a_lora_for_another_base_by_name(tmp_path) -> None:
    llm = copy_llm(tmp_path / "Llama-3.1-8B")
    source = LLMSource(llm, loras=(LLM2VEC / "llama_lora",))
    refuse("openai", tmp_path, r"is for the base 'llama', but the LLM is .*Llama-3\.1-8B'",
           llm=source)  # fmt: skip
    accepted = replace(source, accept_lora_base="llama")
    assert plan(tmp_path / "source" / "epoch_3.pt", source_format=FORMAT_OF["openai"], llm=accepted)


def test_a_lora_for_another_base_by_shape(tmp_path) -> None:
    adapter = Path(shutil.copytree(LLM2VEC / "llama_lora", tmp_path / "lora"))
    factors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in factors if name.endswith("q_proj.lora_A.weight"))
    factors[name] = torch.ones(4, 48)
    save_file(factors, adapter / "adapter_model.safetensors")
    refuse("openai", tmp_path, r"is for another LLM.* have another shape .*q_proj.*Give the LLM",
           llm=LLMSource(LLM, loras=(adapter,)))  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lora_bias", True),
        ("bias", "all"),
        ("modules_to_save", ["norm"]),
        ("init_lora_weights", "pissa_niter_4"),
    ],
)
def test_a_lora_that_is_more_than_a_lora(tmp_path, setting, value) -> None:
    adapter = Path(shutil.copytree(LLM2VEC / "llama_lora", tmp_path / "lora"))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    refuse("openai", tmp_path, f"more than the low-rank matrices of linear layers .*{setting}",
           llm=LLMSource(LLM, loras=(adapter,)))  # fmt: skip


def test_keys_of_no_family_are_shown(tmp_path) -> None:
    state = {"encoder.weight": torch.ones(2)}
    refuse("openai", tmp_path, r"0 known families.*encoder\.weight.*llm2clip build", state=state)


def test_keys_without_an_account_are_all_printed(tmp_path) -> None:
    extra = {f"visual.extra_{i}": torch.ones(i) for i in range(1, 30)}
    source = save_checkpoint("eva02", tmp_path, {**read_checkpoint("eva02"), **extra})
    with pytest.raises(ValueError, match="29 of 114 keys that are neither used") as refused:
        plan(source, source_format=FORMAT_OF["eva02"])
    assert all(f"{name} ({i},)" in str(refused.value) for i, name in enumerate(extra, 1))


def test_a_missing_weight_is_named(tmp_path) -> None:
    state = read_checkpoint("openai")
    del state["visual.ln_post.bias"]
    refuse("openai", tmp_path, r"(?s)1 missing:\s+vision_model\.post_layernorm\.bias", state=state)


def test_an_unknown_weight_of_a_timm_tower_is_named_as_it_was(tmp_path) -> None:
    state = {**read_checkpoint("siglip2"), "visual.trunk.extra": torch.ones(1)}
    refuse("siglip2", tmp_path, r"(?s)1 without a place:\s+visual\.trunk\.extra", state=state)


def test_both_layouts_of_one_bias_are_a_mixture(tmp_path) -> None:
    state = read_checkpoint("eva02")
    state["visual.blocks.0.attn.q_bias"] = state["visual.blocks.0.attn.q_proj.bias"]
    refuse("eva02", tmp_path, "would both become .*q_proj.bias", state=state)


def test_an_llm_of_another_size_than_its_configuration(tmp_path) -> None:
    llm = copy_llm(tmp_path / "llama")
    path = llm / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 40}))
    refuse("openai", tmp_path, r"(?s)6 of another shape:.*mlp\.down_proj", llm=LLMSource(llm))


def test_a_checkpoint_without_its_adapter(tmp_path) -> None:
    state = {k: v for k, v in read_checkpoint("eva02").items() if not k.startswith("text.")}
    refuse("eva02", tmp_path, "has no text adapter .*a bare vision tower", state=state)


def test_a_part_of_an_adapter_is_named(tmp_path) -> None:
    state = read_checkpoint("eva02")
    (first,) = (key for key in state if key.startswith("text.") and key.endswith(".0.fn.0.weight"))
    del state[first]
    refuse("eva02", tmp_path, "has a part of a text adapter alone: text", state=state)


def test_integers_in_the_place_of_weights(tmp_path) -> None:
    state = read_checkpoint("openai")
    state["visual.conv1.weight"] = state["visual.conv1.weight"].to(torch.int8)
    refuse("openai", tmp_path, r"(?s)1 not of real numbers.*torch\.int8", state=state)


def test_a_lora_where_its_base_belongs(tmp_path) -> None:
    refuse("openai", tmp_path, "is a LoRA, not a whole LLM. Give its base",
           llm=LLMSource(LLM2VEC / "llama_lora"))  # fmt: skip


def test_a_lora_beside_an_llm_that_the_checkpoint_holds(tmp_path) -> None:
    refuse("siglip2", tmp_path, "holds the LLM's weights, merged",
           llm=LLMSource(LLM, loras=(LLM2VEC / "llama_lora",)))  # fmt: skip


def test_a_temperature_that_no_training_leaves(tmp_path) -> None:
    state = {**read_checkpoint("openai"), "logit_scale": torch.tensor(9.0)}
    refuse("openai", tmp_path, "logit_scale 9, but training keeps it between 0 and ln 100",
           state=state)  # fmt: skip


def test_preprocessing_that_nobody_chose(tmp_path) -> None:
    source_format = replace(FORMAT_OF["siglip2"], preprocessing=None)
    refuse(
        "siglip2",
        tmp_path,
        "Choose the preprocessing .*'openai'.*'half'",
        source_format=source_format,
    )
    assert LAYOUTS["siglip2"].source_format.preprocessing is None


def test_a_head_width_that_does_not_divide_the_tower(tmp_path) -> None:
    source_format = replace(FORMAT_OF["openai"], head_width=7)
    refuse(
        "openai", tmp_path, "24 wide, which heads of 7 do not divide", source_format=source_format
    )


def test_an_activation_that_contradicts_the_repository(tmp_path) -> None:
    source_format = replace(FORMAT_OF["hub_clip"], activation="gelu")
    refuse("hub_clip", tmp_path, "hidden_act='quick_gelu', the source format has activation='gelu'",
           source_format=source_format)  # fmt: skip


def test_a_prompt_of_another_familys_tokens(tmp_path) -> None:
    source_format = replace(FORMAT_OF["openai"], prompt=None, prompt_prefix="<|no such token|>")
    refuse("openai", tmp_path, "does not know as special tokens", source_format=source_format)


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
def test_rotary_tables_that_the_tower_computes_are_accepted_in_any_dtype(dtype, tmp_path) -> None:
    made = replace_rotary_tables(read_checkpoint("eva02"))
    for key, value in read_checkpoint("eva02").items():
        # The rule above is the official code's, up to the rounding of a cosine.
        torch.testing.assert_close(made[key], value, atol=1e-6, rtol=0)
    state = {key: value.to(dtype) for key, value in made.items()}
    plan(save_checkpoint("eva02", tmp_path, state), source_format=FORMAT_OF["eva02"])


@pytest.mark.parametrize("reference", [3, 5, 16])
def test_rotary_tables_of_another_reference_size_are_refused(reference: int, tmp_path) -> None:
    state = replace_rotary_tables(read_checkpoint("eva02"), reference=reference)
    refuse("eva02", tmp_path, r"reference size 4.*\(--rope-reference-size\)", state=state)
    right = replace(FORMAT_OF["eva02"], rope_reference_size=reference)
    planned = plan(tmp_path / "source" / "epoch_3.pt", source_format=right)
    assert planned.config.vision_config.model_args["ref_feat_shape"] == [reference] * 2


def test_another_head_width_than_that_of_the_rotary_tables_is_refused(tmp_path) -> None:
    wrong = replace(FORMAT_OF["eva02"], head_width=8)
    refuse("eva02", tmp_path, r"shape \(36, 12\).*\(36, 8\).*--head-width 12", source_format=wrong)


@pytest.mark.parametrize("kept", [(), ("freqs_cos",)])
def test_a_checkpoint_without_rotary_tables_is_refused(kept: tuple[str, ...], tmp_path) -> None:
    state = read_checkpoint("eva02")
    state = {
        key: value for key, value in state.items() if ".rope." not in key or key.endswith(kept)
    }
    assert any(".rope." in key for key in state) == bool(kept)
    refuse("eva02", tmp_path, "has no tables of rotary positions", state=state)


def test_one_block_with_rotary_tables_of_its_own_is_refused(tmp_path) -> None:
    state = read_checkpoint("eva02")
    state["visual.blocks.1.attn.rope.freqs_sin"] = torch.rand(36, 12)
    refuse(
        "eva02",
        tmp_path,
        r"blocks\.1\.attn\.rope\.freqs_sin has other rotary positions",
        state=state,
    )


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_an_llm_whose_rotary_frequencies_are_not_its_configurations_is_refused(
    theta: float, tmp_path
) -> None:
    llm = copy_llm(tmp_path / "llama")
    frequencies = theta ** -(torch.arange(0, 8, 2) / 8)
    weights = {**load_file(llm / "model.safetensors"), "rotary_emb.inv_freq": frequencies}
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    refuse("openai", tmp_path, "other rotary frequencies than its configuration gives",
           llm=LLMSource(llm))  # fmt: skip
