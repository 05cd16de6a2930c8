"""Laws of merging a LoRA: all of it is merged, or it is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import edit_json
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llm
from tiny_folders import save_tiny_llm, save_tiny_vision
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.building.build_model import build_model
from modeling_llm2clip.building.lora_merging import merge_lora, merge_lora_weights
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.model_folders.model_card import read_card_data
from modeling_llm2clip.model_folders.weights import open_weights

NUM_MATRICES = 2 * 7  # two layers of seven linear ones
Weights = dict[str, Tensor]


def save_lora(model: nn.Module, folder: Path, *, base: str | None = None, **settings: Any) -> Path:
    """Save a LoRA that moves every linear layer visibly, as peft saves one."""
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    adapted = get_peft_model(model, LoraConfig(**chosen))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5, generator=generator)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(str(folder))
    return folder


def merge(folder: Path, model: PreTrainedModel | None = None) -> Weights:
    """Weights of a tiny LLM that a LoRA was merged into."""
    model = model or tiny_llm()
    merge_lora(model, folder)
    return model.state_dict()


def add_head(model: PreTrainedModel) -> Any:
    headed = AutoModelForCausalLM.from_config(model.config)
    headed.model.load_state_dict(model.state_dict())
    return headed


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return folder


def rename_layer(weights: Weights) -> Weights:
    return {name.replace("layers.1.", "layers.7."): value for name, value in weights.items()}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("with_head", [False, True], ids=["headless", "with head"])
def test_a_merged_lora_is_the_sum_worked_out_by_hand(
    with_head: bool, targets: Any, tmp_path: Path
) -> None:
    before = tiny_llm().state_dict()
    model = add_head(tiny_llm()) if with_head else tiny_llm()
    task = "CAUSAL_LM" if with_head else "FEATURE_EXTRACTION"
    inside = "model." if with_head else ""
    scaled = "layers.1.self_attn.q_proj"  # with an alpha of its own
    folder = save_lora(
        model, tmp_path / "lora", target_modules=targets, task_type=task,
        alpha_pattern={inside + scaled: 40},
    )  # fmt: skip
    factors = load_file(folder / "adapter_model.safetensors")
    merged = merge(folder)
    assert merged.keys() == before.keys()
    changed = [name for name in merged if not torch.equal(merged[name], before[name])]
    assert len(changed) == (NUM_MATRICES if targets == "all-linear" else 4)
    for name in changed:
        layer = name.removesuffix(".weight")
        down, up = (factors[f"base_model.model.{inside}{layer}.lora_{p}.weight"] for p in "AB")
        scale = (40 if layer == scaled else 8) / 4  # alpha by rank
        # Products of four numbers of about a quarter in float32, times the scale.
        expected = before[name] + scale * up @ down
        torch.testing.assert_close(merged[name], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (rename_layer, r"7 are not in the LLM.*layers\.7.*; 7 are missing.*layers\.1"),
        (lambda w: dict(list(w.items())[2:]), "Of 13 weights: 1 are missing"),
        (lambda w: dict(list(w.items())[1:]), "Of 14 weights: 1 are missing"),
        (lambda w: {k: torch.zeros_like(v) for k, v in w.items()}, "adds zero to all 14 of its"),
        (lambda w: {k: v * float("nan") for k, v in w.items()}, r"28 have NaN.*layers\.0"),
        (lambda w: {k: torch.cat([v, v], dim=1) for k, v in w.items()}, "is for another LLM"),
    ],
    ids=["a renamed layer", "a lost pair", "a lost matrix", "zeros", "NaN", "another width"],
)
def test_a_lora_that_does_not_fit_is_refused(change: Any, error: str, tmp_path: Path) -> None:
    folder = rewrite(save_lora(tiny_llm(), tmp_path / "lora"), change)
    model = tiny_llm()
    with pytest.raises(ValueError, match=error):
        merge_lora(model, folder)
    for name, value in tiny_llm().state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


# Of a family, and how its LoRA differs from a plain one.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "scale by the root of the rank": ("llama", {"use_rslora": True}),
    "some layers": ("llama", {"target_modules": r".*layers\.1\..*_proj"}),
    "weights of another orientation": ("gpt2", {}),
    "ranks and scales of single layers": (
        "llama",
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}, "alpha_pattern": {"k_proj": 3}},
    ),
    "all but some layers": ("llama", {"exclude_modules": ["mlp.up_proj"]}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_merged_as_peft_merges_it_bit_for_bit(
    variant: str, tmp_path: Path
) -> None:
    family, settings = VARIANTS[variant]
    folder = save_lora(tiny_llm(family), tmp_path / "lora", **settings)
    with_peft = PeftModel.from_pretrained(tiny_llm(family), str(folder)).merge_and_unload()
    merged, before = merge(folder, tiny_llm(family)), tiny_llm(family).state_dict()
    assert any(not torch.equal(before[name], merged[name]) for name in merged)
    torch.testing.assert_close(merged, dict(with_peft.state_dict()), rtol=0, atol=0)


def test_merging_file_by_file_gives_the_weights_of_merging_in_memory(tmp_path: Path) -> None:
    folder = save_lora(tiny_llm(), tmp_path / "lora")
    tiny_llm().save_pretrained(tmp_path / "llm")
    merged, counts = merge_lora_weights(
        open_weights(tmp_path / "llm"), folder, base="", dtype=torch.float32
    )
    wanted = merge(folder)
    assert len(merged) == NUM_MATRICES
    for _ in range(2):  # reading again gives the same again
        for name, tensor in merged.items():
            assert torch.equal(tensor.read(), wanted[name])
    before = tiny_llm().state_dict()
    assert sum(map(torch.tensor, counts.values())).tolist() == [
        sum(int((wanted[name] != before[name]).sum()) for name in merged),
        sum(before[name].numel() for name in merged),
    ]


def test_a_merge_into_bfloat16_is_rounded_once_or_refused_where_nothing_is_left(
    tmp_path: Path,
) -> None:
    folder = save_lora(tiny_llm(), tmp_path / "lora")
    rounded = tiny_llm().to(torch.bfloat16)
    exact = merge(folder, tiny_llm().to(torch.bfloat16).float())
    for name, value in merge(folder, rounded).items():
        assert torch.equal(value, exact[name].to(torch.bfloat16)), name
    rewrite(folder, lambda weights: {name: value * 1e-4 for name, value in weights.items()})
    with pytest.raises(
        ValueError, match=r"rounding to torch\.bfloat16 loses the LoRA's change.*32"
    ):
        merge_lora(tiny_llm().to(torch.bfloat16), folder)
    merge_lora(tiny_llm(), folder)


# Family, and settings of a LoRA that is more than matrices of linear layers.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a whole module": ("llama", {"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
    "DoRA": ("llama", {"use_dora": True}, "use_dora"),
    "aLoRA": ("llama", {"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens"),
    "VeLoRA": ("llama", {"velora_config": {}}, "velora_config"),
    "a start out of the base": ("llama", {"init_lora_weights": "pissa"}, "pissa"),
    "an embedding table": ("llama", {"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
    "expert tensors": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
        "target_parameters",
    ),
    "layers that the LLM has not": ("phi", {"target_modules": ["dense"]}, "not in the LLM.*dense"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_loras_than_those_of_linear_layers_are_refused(kind: str, tmp_path: Path) -> None:
    family, settings, error = REFUSED[kind]
    folder = save_lora(tiny_llm(family), tmp_path / "lora", **settings)
    with pytest.raises(ValueError, match=rf"(?s){error}.*merge_and_unload"):
        merge_lora(tiny_llm("llama" if family == "phi" else family), folder)


def test_a_folder_without_a_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        merge_lora(tiny_llm(), tmp_path)
    folder = save_lora(tiny_llm(), tmp_path / "lora")
    settings = json.loads((folder / "adapter_config.json").read_text())
    for content, message in (
        ([], r"adapter_config\.json contains a list, not an object"),
        (
            {**settings, "alpha_pattern": 3},
            r"lora cannot be loaded: adapter_config\.json has a field",
        ),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            merge_lora(tiny_llm(), folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights: none of .*adapter_model\.safetensors"):
        merge_lora(tiny_llm(), folder)


def test_the_command_refuses_a_lora_of_another_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vision, llm = save_tiny_vision(tmp_path / "vision"), save_tiny_llm(tmp_path / "llm")
    folder = save_lora(tiny_llm(), tmp_path / "lora", base="owner/Other-7B")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    output = tmp_path / "model"
    command = ["build", str(vision), str(llm), str(output), "--prompt", "llama-3"]
    command += ["--max-text-length", "64", "--lora", str(folder)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "is for the base 'owner/Other-7B', but the LLM is 'llm'" in error
    assert not output.exists()
    (folder / "README.md").write_text("---\ntraining_data: my captions\n---\n", encoding="utf-8")
    edit_json("adapter_config.json", lambda c: c.update(base_model_name_or_path="llm"))(folder)
    assert main(command) == 0
    built = load_file(output / "model.safetensors")["text_model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(built, tiny_llm().layers[0].self_attn.q_proj.weight)
    card = read_card_data(output)
    assert card.training_data == card.text_training_data == ("my captions",)
    # Owners, and the case of letters, are no difference between Hub ids.
    merge_lora(named(tiny_llm(), "mirror/LLM"), folder)


def test_the_card_of_a_lora_on_the_hub_is_read_and_a_broken_one_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests are offline, so that the repository is in the Hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--lora"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    card = save_lora(tiny_llm(), repository / "snapshots" / "abc") / "README.md"
    towers = save_tiny_vision(tmp_path / "vision"), save_tiny_llm(tmp_path / "llm")
    config = BuildConfig(prompt="llama-3", max_text_length=64, lora="me/lora")
    card.write_text("---\nmodel-index:\n- name: x\n---\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md: invalid metadata \(Invalid `mod"):
        build_model(*towers, tmp_path / "broken", config)
    score = "{metrics: [{type: a, value: N/A}], task: {type: t}, dataset: {type: d, name: d}}"
    others = f"license: [mit]\nlicense_name: 2\nmodel-index:\n- name: x\n  results:\n  - {score}"
    card.write_text(f"---\ntraining_data: theirs\n{others}\n---\n", encoding="utf-8")
    assert read_card_data(build_model(*towers, tmp_path / "m", config)).training_data == ("theirs",)


def named(model: PreTrainedModel, name: str) -> PreTrainedModel:
    model.config._name_or_path = name
    return model
