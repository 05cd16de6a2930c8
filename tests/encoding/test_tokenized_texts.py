"""A text is tokenized once, wherever it is counted and encoded, and its ids are those of a call."""

from __future__ import annotations

import torch
from shared_models import shared_model
from tokenizing import note_tokenized

from modeling_llm2clip.encoding.encode import TorchEncoder, encode_texts
from modeling_llm2clip.encoding.tokenized_texts import TokenizedTexts

LONG_TEXT = "dog " * 200
TEXTS = ["a dog", LONG_TEXT, "two red apples", "x"]


def test_tokenized_texts_have_the_ids_of_a_call_and_the_embeddings_of_texts() -> None:
    model, processor = shared_model()
    texts = [" a dog\n", *TEXTS, "a dog", LONG_TEXT]
    with note_tokenized() as read:
        tokens = TokenizedTexts(processor, texts)
    assert read == ["a dog", LONG_TEXT.strip(), "two red apples", "x"]
    batch = processor(text=texts)
    for row, mask, one, text in zip(
        batch["input_ids"], batch["attention_mask"], tokens, texts, strict=True
    ):
        assert one.ids.tolist() == row[: mask.sum()].tolist()
        assert str(one) == one.text == text.strip()
    assert tokens.lengths.tolist() == [len(one.ids) for one in tokens]
    assert tokens.num_truncated == sum(tokens.is_truncated) == 2
    # Of several callers, as a server mixes them.
    mixed = [*tokens, *TokenizedTexts(processor, ["x"])]
    found = TorchEncoder(model, processor).encode_texts(mixed)
    assert torch.equal(found, encode_texts(model, processor, [*texts, "x"]))
