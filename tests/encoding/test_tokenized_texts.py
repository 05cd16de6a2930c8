"""A text is tokenized once, wherever it is counted and encoded, and its ids are those of a call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from indexes import build, save_images
from onnx_folders import shared_graphs, shared_source
from served_apps import open_service
from shared_models import shared_model
from tokenizing import note_tokenized

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.evaluation_config import EncoderConfig
from modeling_llm2clip.encoding.encode import encode_texts, encode_tokenized_texts
from modeling_llm2clip.encoding.tokenized_texts import TokenizedTexts
from modeling_llm2clip.evaluation.encoders.auto import load_encoder
from modeling_llm2clip.model_folders.onnx_folder import load_onnx_encoder
from modeling_llm2clip.serving.served_encoder import ModelEncoder, OnnxModelEncoder

LONG_TEXT = "dog " * 200
TEXTS = ["a dog", LONG_TEXT, "two red apples", "x"]


def embed(encoder: Any) -> Any:
    with open_service(encoder) as service:
        return asyncio.run(service.embed([*TEXTS, TEXTS[0]]))


SERVED: dict[str, Callable[[], Any]] = {
    "torch": lambda: ModelEncoder(*shared_model()),
    "onnx": lambda: OnnxModelEncoder(load_onnx_encoder(shared_graphs())),
}


@pytest.mark.parametrize("load", SERVED.values(), ids=SERVED)
def test_a_request_tokenizes_each_of_its_texts_once(load: Callable[[], Any]) -> None:
    encoder = load()
    with note_tokenized() as tokenized:
        found = embed(encoder)
    assert sorted(tokenized) == sorted(text.strip() for text in TEXTS)
    assert found.truncated == [1] and (found.embeds[0] == found.embeds[-1]).all()


def test_an_evaluation_tokenizes_each_of_its_texts_once() -> None:
    encoder = load_encoder(str(shared_source()), EncoderConfig(device="cpu"))
    with note_tokenized() as tokenized:
        found = encoder.encode_texts(TEXTS)
    assert sorted(tokenized) == sorted(text.strip() for text in TEXTS)
    assert found.is_truncated is not None and found.is_truncated.tolist() == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.usefixtures("own_cache")
def test_tags_and_searches_tokenize_each_text_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = save_images(tmp_path / "images", count=2)
    (tmp_path / "labels.txt").write_text("\n".join(TEXTS))
    build(shared_source(), images, tmp_path / "db")
    tag = ["tag", str(shared_source()), str(images), "--labels", str(tmp_path / "labels.txt")]
    for command, what in (
        ([*tag, "--device", "cpu"], "prompts"),
        (["search", str(tmp_path / "db"), *TEXTS, "--device", "cpu"], "sentences"),
    ):
        with note_tokenized() as tokenized:
            assert main(command) == 0
        assert sorted(tokenized) == sorted(text.strip() for text in TEXTS)
        assert f"Truncated 1 of 4 {what} to the 128 tokens" in capsys.readouterr().err


def test_a_search_without_torch_tokenizes_each_text_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_onnx = pytest.importorskip("modeling_llm2clip.encoding.encode_onnx")
    opened: list[Any] = []

    class NotingTokenizer:
        """Notes the texts that a tokenizer reads."""

        def __init__(self, tokenizer: Any) -> None:
            self.texts: list[str] = []
            self._tokenizer = tokenizer
            opened.append(self)

        def encode_batch(self, texts: list[str]) -> Any:
            self.texts += texts
            return self._tokenizer.encode_batch(texts)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._tokenizer, name)

    open_tokenizer = encode_onnx.open_tokenizer
    monkeypatch.setattr(
        encode_onnx, "open_tokenizer", lambda folder: NotingTokenizer(open_tokenizer(folder))
    )
    build(shared_source(), save_images(tmp_path / "images", count=2), tmp_path / "db")
    assert main(["search", str(tmp_path / "db"), *TEXTS, "--model", str(shared_graphs())]) == 0
    [tokenizer] = opened
    assert tokenizer.texts == [text.strip() for text in TEXTS]


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
    found = encode_tokenized_texts(model, processor, mixed)
    assert torch.equal(found, encode_texts(model, processor, [*texts, "x"]))


@pytest.mark.parametrize(
    ("texts", "message"),
    [("a dog", "Got one string"), ([], "the list is empty"), (["a", " "], "number 1 is blank")],
)
def test_what_is_no_list_of_texts_is_refused(texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizedTexts(shared_model()[1], texts)
