"""Which LLMs stay what they are in transformers' LLaVA classes, and which the recipe refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llava_model import build_llava, load_llava
from llava_parts import TEMPLATE, build
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

IDS = torch.tensor([[1, 20, 30, 40]])


def save_llm(parts: Path, folder: Path, family: str, **settings: Any) -> Any:
    """Save a tiny LLM of a family with the tokenizer of the parts; returns it."""
    tokenizer = AutoTokenizer.from_pretrained(parts / "llm")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model(
        family, **sizes, num_attention_heads=4, vocab_size=len(tokenizer), pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in llm.named_parameters():
        if name.endswith("bias"):  # zeros would hide that they are lost
            torch.nn.init.normal_(weight)
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return llm


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        ("mistral", {"num_key_value_heads": 2}),
        ("qwen2", {"num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
        ("olmo2", {"num_key_value_heads": 2}),
        ("gemma", {"num_key_value_heads": 2, "head_dim": 8}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_written_llm_says_of_words_what_it_said_before(
    parts: Path, tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    llm = save_llm(parts, tmp_path / "llm", family, **settings)
    model, processor = build_llava(parts / "tower", tmp_path / "llm", chat_template=TEMPLATE)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    written = load_llava(tmp_path / "model")[0].eval()
    with torch.no_grad():
        before = llm(input_ids=IDS).logits
        after = written(input_ids=IDS).logits[..., : before.shape[-1]]
    # A token more in the vocabulary: float32 sums in another order.
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


OTHER = r"of the family '{}', would be another LLM: its logits differ by up to \d"
NO_PLACE = r"has \['lm_head.bias'\], for which .* has no place"
NO_MODEL = r"of the family '{}', has no model.* to put into"
# Low, since the logits of a random LLM are.
CAPPED = {"final_logit_softcapping": 0.01, "head_dim": 8, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("granite", {"logits_scaling": 8.0}, OTHER),
        ("cohere", {"logit_scale": 0.0625}, OTHER),
        ("gemma2", CAPPED, OTHER),
        ("phi", {}, NO_PLACE),
        ("gpt_neox", {}, NO_MODEL),
        ("gpt2", {}, NO_MODEL),
    ],
)
def test_an_llm_that_would_be_another_one_is_refused_with_the_reason(
    parts: Path, tmp_path: Path, family: str, settings: dict[str, Any], message: str
) -> None:
    save_llm(parts, tmp_path, family, **settings)
    with pytest.raises(ValueError, match=message.format(family)):
        build_llava(parts / "tower", tmp_path, chat_template=TEMPLATE)


def test_a_written_model_with_a_weight_that_has_no_place_is_refused(
    parts: Path, tmp_path: Path
) -> None:
    model, processor = build(parts)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    bias = torch.ones(len(model.lm_head.weight))
    save_file({**weights, "language_model.lm_head.bias": bias}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=NO_PLACE):
        load_llava(tmp_path)
