"""An LLM that keeps its first layers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from breaking import drop_weights
from peft import LoraConfig, get_peft_model
from tiny import tiny_llm, tiny_tokenizer, tiny_vision
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel

from modeling_llm2clip.building.build_model import build_model, join_towers
from modeling_llm2clip.building.part_loading import cut_layers
from modeling_llm2clip.building.text_towers import load_text_tower
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.doctor.check_model import check_model

VOCABULARY_SIZE = len(tiny_tokenizer())
IDS = torch.arange(3, 17).unsqueeze(0)
# A family whose layers are in another module, lists of layers in the configuration, plain ones.
FAMILIES = ("llama", "gemma3_text", "smollm3", "opt")


def tall_llm(family: str = "llama", **others: int | list[str]) -> PreTrainedModel:
    return tiny_llm(family, vocabulary_size=VOCABULARY_SIZE, num_layers=3, **others)


@torch.no_grad()
def run(llm: PreTrainedModel) -> Tensor:
    return llm(IDS).last_hidden_state  # type: ignore[no-any-return]


@torch.no_grad()
def run_first_two(llm: PreTrainedModel) -> Tensor:
    """Apply the final norm to what transformers returns of the second layer."""
    norm = llm.decoder.final_layer_norm if hasattr(llm, "decoder") else llm.norm
    return norm(llm(IDS, output_hidden_states=True).hidden_states[2])  # type: ignore[no-any-return]


def save_llm(folder: Path, llm: PreTrainedModel) -> Path:
    llm.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
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
    weights = llm.state_dict()
    assert {n: v.shape for n, v in loaded.state_dict().items()} == {
        name: value.shape for name, value in weights.items()
    }
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    # Equal weights at other addresses.
    torch.testing.assert_close(run(loaded), wanted, atol=1e-6, rtol=1e-5)


def test_a_built_folder_has_the_first_layers_alone_and_is_healthy(tmp_path: Path) -> None:
    folder = save_llm(tmp_path / "llm", tall_llm())
    config = BuildConfig(prompt="llama-3", text_layers=2, max_text_length=32)
    built = build_model(tiny_vision(), str(folder), tmp_path / "built", config)
    assert check_model(built).healthy
    model = AutoModel.from_pretrained(built)
    assert model.config.text_config.num_hidden_layers == len(model.text_model.layers) == 2
    in_memory, _ = join_towers(tiny_vision(), (tall_llm(), tiny_tokenizer()), config)
    weights = in_memory.state_dict()
    assert set(weights) == set(model.state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "others"),
    [
        # The last layer takes the keys and values of one below.
        ("gemma4_text", {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3}),
        # Its configuration makes the last layer, which is the second, one of full attention.
        ("gemma4_text", {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
        # One table has a part for each layer.
        (
            "gemma4_text",
            {
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCABULARY_SIZE,
                "layer_types": ["full_attention"] * 3,
            },
        ),
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
    with pytest.raises(ValueError, match=r"cannot be cut to 2 layers: .* or take another LLM"):
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
    with pytest.raises(ValueError, match="Of 3 weights: 1 have no place in the LLM"):
        join_towers(tiny_vision(), (tall_llm(), tiny_tokenizer()), config)
