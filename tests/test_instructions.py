"""Instructions of sentence-transformers are attended to and not pooled, and need a caption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from shared_models import INSTRUCTION, ROUNDING, shared_model
from tiny import tiny_model
from transformers import AutoModel, AutoProcessor

from modeling_llm2clip.model_folders.model_writing import save_model


def encode_by_hand(folder: Path, instruction: str, caption: str) -> tuple[torch.Tensor, str]:
    """Pool all tokens after the instruction's last word; return the embedding and their text.

    The tokens are found by the characters that they cover instead of by counting.
    """
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    encoded = processor.tokenizer(
        instruction + caption, return_tensors="pt", return_offsets_mapping=True
    )
    ids, num_suffix = encoded["input_ids"], len(model.config.prompt_suffix_ids)
    pooled = encoded["offset_mapping"][0, :, 1] > len(instruction.rstrip())
    caption_text = processor.tokenizer.decode(ids[0, pooled])
    pooled[len(pooled) - num_suffix :] = True
    with torch.no_grad():
        hidden = model.text_model(input_ids=ids, use_cache=False).last_hidden_state
        features = model.project_caption_embeds(hidden[:, pooled].mean(dim=1))
    return torch.nn.functional.normalize(features, dim=-1)[0], caption_text


@pytest.mark.parametrize(
    ("prefix", "suffix", "ends_special"),
    [
        ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>", False),
        ("<|user|>\n", "<|end|>", True),  # sentence-transformers excludes such a token
        ("", "", False),
    ],
    ids=["ends plain", "ends special", "no prompt"],
)
def test_an_instruction_is_attended_to_and_not_pooled(
    prefix: str, suffix: str, ends_special: bool, tmp_path: Path
) -> None:
    chosen = (
        {"prompt": "none"} if not prefix else {"prompt_prefix": prefix, "prompt_suffix": suffix}
    )
    model, processor = tiny_model(max_text_length=64, **chosen)
    assert model.config.prompt_suffix_ends_special == ends_special
    folder = save_model(model, processor, tmp_path / "model", instructions={"query": INSTRUCTION})
    sentence_model = SentenceTransformer(str(folder))
    for caption in ("a dog", "7 red cars"):
        wanted, pooled_text = encode_by_hand(folder, INSTRUCTION, caption)
        # The space after the instruction is part of the caption's first token.
        assert pooled_text == f" {caption}"
        found = sentence_model.encode(caption, prompt_name="query", convert_to_tensor=True)
        assert torch.allclose(found, wanted, atol=ROUNDING)
        for other in (caption, INSTRUCTION + caption):
            embedding = sentence_model.encode(other, convert_to_tensor=True)
            assert not torch.allclose(found, embedding, atol=1e-3), other


def test_an_instruction_without_a_caption_is_rejected(tmp_path: Path) -> None:
    model, processor = shared_model()
    with pytest.raises(ValueError, match=r"'query' leaves no room .* of 32 tokens\. Shorten"):
        save_model(model, processor, tmp_path / "model", instructions={"query": INSTRUCTION})
    roomy = tiny_model(max_text_length=64)
    folder = save_model(*roomy, tmp_path / "roomy", instructions={"query": INSTRUCTION})
    loaded = SentenceTransformer(str(folder))
    num_tokens = loaded.preprocess([INSTRUCTION])["input_ids"].shape[1]
    apart = loaded.encode(["a dog", "a cat"], prompt_name="query")
    assert not np.allclose(*apart, atol=1e-3)
    for blank in ("", "  "):
        with pytest.raises(ValueError, match="nothing after their instruction: the text is blank"):
            loaded.encode([blank], prompt_name="query")
    loaded.max_seq_length = num_tokens
    with pytest.raises(
        ValueError, match=r"leave no room for it\. Shorten the instruction, or raise"
    ):
        loaded.encode(["a dog", "a cat"], prompt_name="query")


@pytest.mark.parametrize("instruction", ["Find the image:\n", "Find the image of\t"])
def test_an_instruction_whose_tokens_change_before_a_caption_is_rejected_on_saving(
    instruction: str, tmp_path: Path
) -> None:
    model, processor = shared_model()
    with pytest.raises(ValueError, match=r"'query'.*End each with ': '"):
        save_model(model, processor, tmp_path / "model", instructions={"query": instruction})
    assert list(tmp_path.iterdir()) == []
    assert model.config.instructions == {}
