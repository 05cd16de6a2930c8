"""What a text tower is read from, and what is refused as one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from breaking import drop_weights
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from shared_models import mostly_slow
from tiny import tiny_llm, tiny_tokenizer, tiny_vision
from tiny_folders import save_tiny_llm
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from modeling_llm2clip.building.build_model import build_model, join_towers
from modeling_llm2clip.building.part_loading import cut_layers
from modeling_llm2clip.building.text_towers import load_text_tower, require_own_tokenizer
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.model_folders.model_writing import save_model

# Names of a llama's weights in a GGUF file; its specification is ggml/docs/gguf.md.
GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMAL_TOKEN, _CONTROL_TOKEN = 1, 3


@pytest.fixture
def llm() -> PreTrainedModel:
    return tiny_llm(vocabulary_size=len(tiny_tokenizer()))


def write_gguf(
    file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, kind: str = "F32"
) -> Path:
    """Write a llama as llama.cpp's converter does.

    Args:
        kind: GGUF's name of how the matrices are stored; embeddings are always float32.
    """
    import gguf

    writer, config = gguf.GGUFWriter(file, "llama"), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, tokenizer)
    stored = gguf.GGMLQuantizationType[kind]
    for name, value in model.state_dict().items():
        array = turn_for_gguf(name, value, config)
        chosen = stored if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(array, chosen)
        writer.add_tensor(name_in_gguf(name), packed, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["content"] for token in content["added_tokens"]}
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL_TOKEN if t in special else _NORMAL_TOKEN for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)


def name_in_gguf(name: str) -> str:
    parts = name.removesuffix(".weight").split(".", 2)
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{GGUF_NAMES[parts[2]]}.weight"
    return f"{GGUF_NAMES[parts[0]]}.weight"


def turn_for_gguf(name: str, value: torch.Tensor, config: Any) -> np.ndarray:
    """Rows of query and key in llama.cpp's order: the two parts of a head interleaved."""
    if "q_proj" in name or "k_proj" in name:
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        value = value.view(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
    return value.contiguous().numpy()


def require_equal_weights(loaded: PreTrainedModel, expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(dict(loaded.state_dict()), dict(expected), rtol=0, atol=0)


# GGUF


def test_a_gguf_file_gives_the_weights_it_was_written_from(
    llm: PreTrainedModel, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    loaded, tokenizer = load_text_tower(write_gguf(tmp_path / "tiny.gguf", llm, tiny_tokenizer()))
    require_equal_weights(loaded, llm.state_dict())
    text = "two red apples on a wooden table, ñ 雪"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        found, hidden = (m(torch.tensor([ids])).last_hidden_state for m in (loaded, llm))
    # Equal weights at other addresses.
    torch.testing.assert_close(found, hidden, atol=1e-6, rtol=1e-5)


def test_a_quantized_gguf_file_is_saved_as_an_ordinary_model(
    llm: PreTrainedModel, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "tiny.gguf", llm, tiny_tokenizer(), kind="Q8_0")
    loaded, tokenizer = load_text_tower(file)
    for name, value in llm.state_dict().items():
        # Eight bits for numbers up to four standard deviations of 0.2.
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=0.8 / 127, rtol=0)
    assert not hasattr(loaded.config, "quantization_config")
    assert not getattr(loaded, "is_quantized", False)
    loaded.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "quantization" not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
    again, _ = load_text_tower(tmp_path / "saved")
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in loaded.state_dict().items())
    assert again.config._name_or_path == "saved"  # a name, and no path of this machine


def test_of_a_gguf_file_the_first_layers_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    tall = tiny_llm(vocabulary_size=len(tiny_tokenizer()), num_layers=3)
    file = write_gguf(tmp_path / "tiny.gguf", tall, tiny_tokenizer())
    loaded, _ = load_text_tower(file, num_layers=2)
    assert loaded.config.num_hidden_layers == 2
    weights = tall.state_dict().items()
    require_equal_weights(loaded, {n: v for n, v in weights if "layers.2." not in n})


# Models without a language model


@pytest.mark.parametrize(
    ("model_type", "named"), [("clip", "clip_text_model"), ("bert", "bert"), ("vit", "vit")]
)
def test_what_is_not_a_decoder_is_refused_by_its_model_type(
    model_type: str, named: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    # There are no weights: whatever is refused only after loading them would show another message.
    with pytest.raises(ValueError, match=f"is a '{named}'. Pass a decoder"):
        load_text_tower(tmp_path)


def save_gemma3(folder: Path) -> PreTrainedModel:
    """Save a tiny Gemma 3 that sees, as those from 4B on are published."""
    text = tiny_llm("gemma3_text", vocabulary_size=len(tiny_tokenizer())).config.to_dict()
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config=tiny_vision("siglip")[0].config.to_dict(),
        mm_tokens_per_image=4,
        boi_token_index=5,
        eoi_token_index=6,
        image_token_index=7,
    )
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def test_of_a_model_that_also_takes_images_the_language_model_is_taken(tmp_path: Path) -> None:
    whole = save_gemma3(tmp_path).model.language_model
    file = tmp_path / "model.safetensors"  # published ones differ in where the tied head is, if any
    head = {"language_model.lm_head.weight": whole.embed_tokens.weight.detach()}
    save_file({**load_file(file), **head}, file, metadata={"format": "pt"})
    loaded, tokenizer = load_text_tower(tmp_path)
    assert loaded.config.model_type == "gemma3_text"
    first, _ = load_text_tower(tmp_path, num_layers=1)
    assert (first.config.num_hidden_layers, len(first.config.layer_types)) == (1, 1)
    assert not any("layers.1." in name for name in first.state_dict())
    require_equal_weights(loaded, whole.state_dict())
    arguments = BuildConfig(prompt="llama-3", text_adapter_layers=0)
    built, processor = join_towers(tiny_vision(), (loaded, tokenizer), arguments)
    save_model(built, processor, tmp_path / "model")
    again = AutoModel.from_pretrained(tmp_path / "model")
    assert type(again.text_model) is type(whole)
    assert torch.equal(again.text_model.embed_tokens.weight, whole.embed_tokens.weight)


@pytest.mark.parametrize(
    ("option", "scale"), [(math.log(100), 100), (4.0, math.exp(4)), (None, 1 / 0.07)]
)
def test_a_model_starts_at_the_chosen_temperature(
    option: float | None, scale: float, tmp_path: Path
) -> None:
    config = BuildConfig(prompt="llama-3", text_adapter_layers=0, logit_scale_init_value=option)
    built, processor = join_towers(tiny_vision(), (tiny_llm(), tiny_tokenizer()), config)
    save_model(built, processor, tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    assert loaded.logit_scale.exp().item() == pytest.approx(scale)
    assert check_model(tmp_path / "model").healthy
    with pytest.raises(ValueError, match="logit_scale_init_value=100"):
        replace(config, logit_scale_init_value=100.0)  # the scale instead of its logarithm


@pytest.mark.parametrize(
    ("save", "prefix"), [(save_tiny_llm, ""), (save_gemma3, "language_model.")]
)
def test_weights_that_an_llm_lacks_are_named(save: Any, prefix: str, tmp_path: Path) -> None:
    save(tmp_path)
    drop_weights(tmp_path, "layers.1.mlp.up_proj")
    with pytest.raises(ValueError, match=rf"lacks weights of its LLM: {prefix}layers.1.mlp.up_pr"):
        load_text_tower(tmp_path)


def test_weights_within_an_llm_that_nobody_reads_are_named_and_a_head_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_llm(vocabulary_size=len(tiny_tokenizer())).config
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    load_text_tower(tmp_path)  # its head is left out, and nobody is alarmed
    assert "lm_head" not in caplog.text
    file = tmp_path / "model.safetensors"
    AutoModel.from_pretrained(tmp_path)
    assert "lm_head" in caplog.text  # which transformers would have reported
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    save_file({**load_file(file), **bias}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has 1 weight that LlamaModel does not read"):
        load_text_tower(tmp_path)


@pytest.mark.parametrize(
    ("marks", "named"),
    [
        ({"eos_token_id": 4999}, r"'eos_token_id': \[4999\]"),
        ({"bos_token_id": 4998}, r"'bos_token_id': \[4998\]"),
        ({"eos_token_id": [2, 320]}, r"'eos_token_id': \[2, 320\]"),
        ({"bos_token_id": None, "eos_token_id": None}, None),
        ({"bos_token_id": 1, "eos_token_id": 7}, None),  # of a chat; the tokenizer's own end is 2
        ({"bos_token_id": 0, "eos_token_id": [2, 4, 7]}, None),
        ({"bos_token_id": -1, "eos_token_id": 2}, None),
    ],
)
def test_ids_that_begin_or_end_the_llms_texts_are_the_tokenizers_or_refused(
    marks: dict[str, Any], named: str | None
) -> None:
    config = tiny_llm(vocabulary_size=5000).config
    for name, value in marks.items():
        setattr(config, name, value)
    if named is None:
        require_own_tokenizer(config, tiny_tokenizer(), "The LLM")
        return
    error = rf"{named}.*, which the tokenizer \(ids up to 319\) lacks.*different models"
    with pytest.raises(ValueError, match=error):
        require_own_tokenizer(config, tiny_tokenizer(), "The LLM")


# The first layers alone

VOCABULARY_SIZE = len(tiny_tokenizer())
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY_SIZE}
IDS = torch.arange(3, 17).unsqueeze(0)
# A family whose layers are in another module, lists of layers in the configuration, plain ones.
FAMILIES = ("llama", "gemma3_text", "smollm3", "opt")


def tall_llm(family: str = "llama", **others: int | list[str]) -> PreTrainedModel:
    return tiny_llm(family, vocabulary_size=VOCABULARY_SIZE, num_layers=3, **others)


@torch.no_grad()
def run(llm: PreTrainedModel) -> torch.Tensor:
    return llm(IDS).last_hidden_state  # type: ignore[no-any-return]


@torch.no_grad()
def run_first_two(llm: PreTrainedModel) -> torch.Tensor:
    """Apply the final norm to what transformers returns of the second layer."""
    norm = llm.decoder.final_layer_norm if hasattr(llm, "decoder") else llm.norm
    return norm(llm(IDS, output_hidden_states=True).hidden_states[2])  # type: ignore[no-any-return]


def save_llm(folder: Path, llm: PreTrainedModel) -> Path:
    llm.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", mostly_slow(FAMILIES))
def test_a_tower_of_two_layers_gives_those_of_the_whole_and_its_norm(
    family: str, tmp_path: Path
) -> None:
    llm = tall_llm(family)
    folder, wanted = save_llm(tmp_path, llm), run_first_two(llm)
    drop_weights(folder, "layers.2.")  # so that reading them would show
    loaded, _ = load_text_tower(folder, num_layers=2)
    cut_layers(llm, 2)
    assert torch.equal(run(llm), wanted)
    assert loaded.config.to_dict() == {**llm.config.to_dict(), "_name_or_path": folder.name}
    require_equal_weights(loaded, llm.state_dict())
    # Equal weights at other addresses.
    torch.testing.assert_close(run(loaded), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_built_folder_has_the_first_layers_alone_and_is_healthy(tmp_path: Path) -> None:
    folder = save_llm(tmp_path / "llm", tall_llm())
    config = BuildConfig(prompt="llama-3", text_layers=2, max_text_length=32)
    built = build_model(tiny_vision(), str(folder), tmp_path / "built", config)
    assert check_model(built).healthy
    model = AutoModel.from_pretrained(built)
    assert model.config.text_config.num_hidden_layers == len(model.text_model.layers) == 2
    in_memory, _ = join_towers(tiny_vision(), (tall_llm(), tiny_tokenizer()), config)
    require_equal_weights(model, in_memory.state_dict())


@pytest.mark.parametrize(
    ("family", "others"),
    [
        # The last layer takes the keys and values of one below.
        ("gemma4_text", {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3}),
        # Its configuration makes the last layer, which is the second, one of full attention.
        ("gemma4_text", {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
        # One table has a part for each layer.
        ("gemma4_text", {**PER_LAYER, "layer_types": ["full_attention"] * 3}),
    ],
    ids=["shared keys", "last layer", "table of layers"],
)
def test_layers_that_depend_on_their_number_are_refused(
    family: str, others: dict[str, int | list[str]], tmp_path: Path
) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"This version of transformers has no {family}.")
    sizes = {"hidden_size_per_layer_input": 0, "global_head_dim": 8}
    llm = tall_llm(family, **{**sizes, **others})
    with pytest.raises(ValueError, match=r"cannot be cut to 2 layers: .* or use another LLM"):
        load_text_tower(save_llm(tmp_path, llm), num_layers=2)
    with pytest.raises(ValueError, match="cannot be cut to 2 layers: "):
        cut_layers(llm, 2)


def test_more_layers_than_there_are_and_a_lora_of_more_layers_are_refused(tmp_path: Path) -> None:
    folder = save_llm(tmp_path / "llm", tall_llm())
    with pytest.raises(ValueError, match=r"llm has 3 layers, so it cannot keep 4\. Set text_"):
        load_text_tower(folder, num_layers=4)
    adapted = get_peft_model(tall_llm(), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    adapted.save_pretrained(tmp_path / "lora")
    config = BuildConfig(prompt="llama-3", text_layers=2, lora=tmp_path / "lora")
    with pytest.raises(ValueError, match="Of 3 weights: 1 are not in the LLM"):
        join_towers(tiny_vision(), (tall_llm(), tiny_tokenizer()), config)
