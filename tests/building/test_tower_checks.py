"""The checks find from outside whether a decoder is bidirectional on every path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LLM_FAMILIES, tiny_llm, tiny_timm, tiny_tokenizer, tiny_vision
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPImageProcessorPil, PreTrainedModel

from modeling_llm2clip import LLM2CLIPConfig
from modeling_llm2clip.base_llm2clip import set_attention_direction
from modeling_llm2clip.building.build_model import build_model, join_towers
from modeling_llm2clip.building.tower_checks import find_direction_errors, require_direction
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.doctor.check_model import check_model
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.model_folders.golden_embeddings import compare_golden
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel

BLIND = r"first token does not see the last"
SIZE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": 400, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Drops the attention arguments on the way, so that the configuration alone leaves it causal where
# nothing is padded.
FORGETFUL = ("stablelm", {"num_key_value_heads": 2})
# Learned positions and ALiBi.
OTHER_POSITIONS = {"gpt2": {}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "bloom": {}}
# Families that no flag makes bidirectional: no attention at all, attention in chunks.
REFUSED = {
    "mamba": {"state_size": 4},
    "llama4_text": {
        "intermediate_size_mlp": 64, "num_key_value_heads": 2, "head_dim": 16,
        "attention_chunk_size": 4, "num_local_experts": 2,
    },
}  # fmt: skip
CAUSAL = BuildConfig(prompt="llama-3", text_adapter_layers=0, bidirectional=False)
BOTH_SIDES = BuildConfig(prompt="llama-3", text_adapter_layers=0)


def build_decoder(family: str, extras: dict[str, Any]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModel.from_config(
            AutoConfig.for_model(family, **{**SIZE, **extras})
        )
    return model.eval()


def list_places(model: PreTrainedModel, *, bidirectional: bool) -> list[str]:
    """Return where a decoder does not have the direction that it should."""
    errors = find_direction_errors(model, bidirectional=bidirectional)
    return [error.split(",")[0] for error in errors]


@pytest.mark.parametrize(
    ("llm", "dtype"),
    [*((llm, torch.float32) for llm in LLM_FAMILIES), ("llama", torch.bfloat16),
     ("gemma2", torch.bfloat16), ("phi", torch.bfloat16)],
)  # fmt: skip
def test_a_decoder_has_the_direction_that_was_set(llm: str, dtype: torch.dtype) -> None:
    model = tiny_llm(llm).to(dtype)
    require_direction(model, bidirectional=False)
    assert list_places(model, bidirectional=True) == ["without padding", "with padding"]
    with pytest.raises(ValueError, match=rf"'{llm}' family cannot be .*{BLIND}.*bidirectional=Fal"):
        require_direction(model, bidirectional=True)
    set_attention_direction(model, bidirectional=True)
    require_direction(model, bidirectional=True)
    errors = list_places(model, bidirectional=False)
    assert errors[:2] == ["without padding", "with padding"]
    set_attention_direction(model, bidirectional=False)
    assert list_places(model, bidirectional=True) == ["without padding", "with padding"]


def test_the_configuration_alone_is_found_out_where_a_family_forgets_it() -> None:
    model = build_decoder(*FORGETFUL)
    model.config.is_causal = False
    with pytest.raises(ValueError, match=f"without padding, the {BLIND}"):
        require_direction(model, bidirectional=True)
    set_attention_direction(model, bidirectional=True)
    require_direction(model, bidirectional=True)


def test_a_decoder_whose_pass_fails_without_its_causal_mask_is_refused_with_the_error() -> None:
    config = AutoConfig.for_model("mpt", d_model=32, n_heads=4, n_layers=2, vocab_size=100)
    model = AutoModel.from_config(config).eval()
    set_attention_direction(model, bidirectional=True)
    with pytest.raises(ValueError, match=r"'mpt' family cannot be .* pass fails \(AttributeError"):
        require_direction(model, bidirectional=True)


@pytest.mark.parametrize("family", OTHER_POSITIONS)
def test_decoders_with_other_positions_pass(family: str) -> None:
    model = build_decoder(family, OTHER_POSITIONS[family])
    set_attention_direction(model, bidirectional=True)
    require_direction(model, bidirectional=True)


# Text encoders are causal only without padding, and one configuration of Gemma 3 never is.
NEVER_CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"pad_token_id": 0}),
    "xlm-roberta": ("xlm-roberta", {"pad_token_id": 0}),
    "modernbert": ("modernbert", {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "num_key_value_heads": 2, "use_bidirectional_attention": True},
    ),
}


@pytest.mark.parametrize("name", NEVER_CAUSAL)
def test_an_encoder_that_does_not_stay_causal_is_built_bidirectional_alone(name: str) -> None:
    family, extras = NEVER_CAUSAL[name]
    error = rf"{family}' family cannot be kept causal here: .* sees a later .*bidirectional=True"
    with pytest.raises(ValueError, match=error):
        join_towers(tiny_vision(), (build_decoder(family, extras), tiny_tokenizer()), CAUSAL)
    encoder = build_decoder(family, extras)
    model, _ = join_towers(tiny_vision(), (encoder, tiny_tokenizer()), BOTH_SIDES)
    assert find_direction_errors(model.text_model, bidirectional=True) == []


# Recurrences that take padding for text: on the right it comes too late to matter.
READ_PADDING: dict[str, dict[str, Any]] = {
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"num_heads": 4, "mode": "inference", "hidden_size": 64},
}


@pytest.mark.parametrize("family", READ_PADDING)
def test_building_refuses_a_causal_llm_that_reads_padding_on_the_left(family: str) -> None:
    pytest.importorskip(f"transformers.models.{family}")
    decoder = build_decoder(family, READ_PADDING[family])
    error = r"here: with padding on the left, .*\. Use another LLM, or try bidirectional"
    with pytest.raises(ValueError, match=error):
        join_towers(tiny_vision(), (decoder, tiny_tokenizer()), CAUSAL)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_an_llm_of_neither_direction_is_refused(bidirectional: bool) -> None:
    encoder = build_decoder("albert", {"embedding_size": 16})  # its layers share one module
    arguments = BuildConfig(prompt="none", text_adapter_layers=0, bidirectional=bidirectional)
    with pytest.raises(ValueError, match=r"'albert' family cannot be .*\. Use another LLM"):
        join_towers(tiny_vision(), (encoder, tiny_tokenizer()), arguments)


@pytest.mark.parametrize(("width", "side"), [(16, 0), (0, 32)])
def test_a_convolutional_tower_with_a_size_of_0_is_named(width: int, side: int) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, width], "depths": [1, 1]}
    config = AutoConfig.for_model("resnet", layer_type="basic", **sizes)
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, do_center_crop=False)
    parts = AutoModel.from_config(config), processor
    arguments = BuildConfig(prompt="none", text_adapter_layers=0)
    with pytest.raises(ValueError, match=r"tower 'resnet' .* or an image processor with the"):
        join_towers(parts, (tiny_llm(), tiny_tokenizer()), arguments)


@pytest.mark.parametrize("family", REFUSED)
def test_building_refuses_a_decoder_that_stays_causal(family: str) -> None:
    decoder = build_decoder(family, REFUSED[family])
    with pytest.raises(ValueError, match=rf"{family}' family cannot be made bidirectional"):
        join_towers(tiny_vision(), (decoder, tiny_tokenizer()), BOTH_SIDES)


# Families with causal layers among others: each passes where the first token alone is watched.
# Convolutions, recurrent attention, state spaces.
GATED_DELTA = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": [*["linear_attention"] * 3, "full_attention"],
}  # fmt: skip
MIXED: dict[str, tuple[int, dict[str, Any]]] = {
    "lfm2": (3, {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "qwen3_5_text": (3, {**GATED_DELTA, "head_dim": 8}),
}
STATE_SPACE = {
    "num_key_value_heads": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
    "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
}  # fmt: skip
# What comes out is projected once more.
OTHER_WIDTHS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48},
    "embedding_gemma2_text": {
        "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 16,
        "embedding_dim": 48, "num_key_value_heads": 2, "pad_token_id": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", MIXED)
def test_causal_layers_among_others_are_counted_and_refused(family: str) -> None:
    num_causal, extras = MIXED[family]
    pytest.importorskip(f"transformers.models.{family.removesuffix('_text')}")
    model = build_decoder(family, {"num_hidden_layers": 4, "num_key_value_heads": 2, **extras})
    set_attention_direction(model, bidirectional=True)
    with pytest.raises(
        ValueError, match=f"{num_causal} of its 4 layers do not look ahead .*: numb"
    ):
        require_direction(model, bidirectional=True)
    assert list_places(model, bidirectional=True) == ["without padding", "with padding"]


def test_a_causal_part_beside_attention_is_refused_by_its_name() -> None:
    pytest.importorskip("transformers.models.falcon_h1")
    decoder = build_decoder("falcon_h1", STATE_SPACE)
    error = r"'falcon_h1' family cannot .* do not look ahead: mamba \(FalconH1Mixer\)"
    with pytest.raises(ValueError, match=error):
        join_towers(tiny_vision(), (decoder, tiny_tokenizer()), BOTH_SIDES)


@pytest.mark.slow
def test_a_tower_with_an_infinity_in_its_configuration_is_saved_and_loaded(tmp_path: Path) -> None:
    sizes = {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "num_hidden_layers": 1}
    decoder = build_decoder("mamba2", sizes)
    assert decoder.config.time_step_limit[1] == float("inf")
    built = join_towers(tiny_vision(), (decoder, tiny_tokenizer()), CAUSAL)
    folder = save_model(*built, tmp_path / "model")
    assert LLM2CLIPConfig.from_pretrained(folder).text_config.time_step_limit[1] == float("inf")
    assert compare_golden(folder, *load_model(folder, device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_which_each_sees_one_token_are_no_error(dtype: torch.dtype) -> None:
    decoder = build_decoder("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4})
    for bidirectional in (True, False):
        set_attention_direction(decoder, bidirectional=bidirectional)
        require_direction(decoder.to(dtype), bidirectional=bidirectional)


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHER_WIDTHS)
def test_an_llm_whose_states_have_another_width_than_its_layers_encodes_and_comes_back(
    family: str, tmp_path: Path
) -> None:
    pytest.importorskip(f"transformers.models.{family.removesuffix('_text')}")
    decoder = build_decoder(family, OTHER_WIDTHS[family])
    arguments = BuildConfig(prompt="llama-3", max_text_length=32, projection_dim=8)
    model, processor = join_towers(tiny_vision(), (decoder, tiny_tokenizer()), arguments)
    assert model.config.text_width == 48 != model.config.text_config.hidden_size
    captions = ["a dog", "two red apples on a wooden table"]
    before = encode_texts(model, processor, captions, project=False)
    assert before.shape == (2, 48)
    folder = save_model(model, processor, tmp_path / "model")
    assert check_model(folder).failed == []
    loaded = LLM2CLIPModel.from_pretrained(folder)
    assert torch.equal(encode_texts(loaded, processor, captions, project=False), before)
    assert AlignmentModel.from_pretrained(folder).text_projection.in_features == 48


def test_one_layer_that_turned_causal_is_found_by_its_number() -> None:
    model = tiny_llm()
    set_attention_direction(model, bidirectional=True)
    model.layers[1].self_attn.register_forward_pre_hook(mask_the_future, with_kwargs=True)
    errors = find_direction_errors(model, bidirectional=True)
    # The hook also lets tokens see padding on the left.
    assert len(errors) == 3
    assert all("1 of its 2 layers do not look ahead (the first: number 1)" in f for f in errors[:2])


def mask_the_future(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    length = kwargs["hidden_states"].shape[1]
    allowed = torch.ones(length, length).tril()[None, None]
    return args, {**kwargs, "attention_mask": (1 - allowed) * torch.finfo(torch.float32).min}


class Mixing(nn.Module):
    """A layer that adds the mean of all positions, padding included."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + hidden.mean(dim=1, keepdim=True)


class LeakyPadding(nn.Module):
    """Bidirectional over all positions, padding included."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.config = AutoConfig.for_model("llama", vocab_size=100, num_hidden_layers=2)
        self.embeddings = nn.Embedding(100, 8)
        self.layers = nn.ModuleList(layers)
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = self.embeddings(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return type("Output", (), {"last_hidden_state": hidden})


def test_a_decoder_that_attends_to_padding_is_found_out() -> None:
    # The second layer mixes no positions, which is not an error.
    model = LeakyPadding(Mixing(), nn.Linear(8, 8))
    places = list_places(model, bidirectional=True)  # type: ignore[arg-type]
    assert places == ["with padding on the right", "with padding on the left"]


def test_layers_that_cannot_be_found_are_not_taken_for_good() -> None:
    errors = find_direction_errors(LeakyPadding(Mixing()), bidirectional=True)  # type: ignore[arg-type]
    assert errors[-1].startswith("its layers are not in a ModuleList")


# A model that its configuration does not describe

SMALL = BuildConfig(prompt="llama-3", projection_dim=16, max_text_length=32, text_adapter_layers=0)


def make_llm() -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer()
    return tiny_llm(vocabulary_size=len(tokenizer)), tokenizer


@pytest.mark.parametrize(
    ("architecture", "depth", "error"),
    [
        ("swin_tiny_patch4_window7_224", 1, r"back.*position.*does not describe its"),
        # No table depends on its windows.
        (
            "swinv2_tiny_window8_256",
            2,
            r"differently: the embeddings of the 'timm_wrapper' tower are off by",
        ),
    ],
)
def test_a_network_that_was_changed_behind_its_configuration_is_refused(
    architecture: str, depth: int, error: str
) -> None:
    sizes = {"img_size": 64, "embed_dim": 16, "depths": [depth], "num_heads": [2], "window_size": 4}
    tower, image_processor = tiny_timm(architecture, sizes)
    tower.timm_model.set_input_size(window_size=(8, 8))
    with pytest.raises(ValueError, match=error):
        join_towers((tower, image_processor), make_llm(), SMALL)


def test_layers_that_a_configuration_does_not_state_are_refused() -> None:
    llm, tokenizer = make_llm()
    llm.layers[0].mlp.act_fn = nn.Tanh()  # the configuration says SiLU
    with pytest.raises(
        ValueError, match=r"differently: the embeddings of the 'llama' tower are off by"
    ):
        join_towers(tiny_vision(), (llm, tokenizer), SMALL)
    llm, tokenizer = make_llm()
    llm.layers[0].self_attn.q_proj = nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"cannot be loaded back.*q_proj.bias"):
        join_towers(tiny_vision(), (llm, tokenizer), SMALL)


def test_a_folder_that_loads_with_other_embeddings_is_not_left(tmp_path: Path) -> None:
    vision, image_processor = tiny_vision()
    with (
        pytest.warns(UserWarning, match="different dtypes"),
        pytest.raises(ValueError, match=r"was not saved: loaded again, .*image_embeds moved"),
    ):
        # All weights of a folder are loaded in one dtype.
        build_model((vision, image_processor), make_llm_in_half(), tmp_path / "model", SMALL)
    assert list(tmp_path.iterdir()) == []


def make_llm_in_half() -> tuple[Any, Any]:
    llm, tokenizer = make_llm()
    return llm.to(torch.bfloat16), tokenizer
