"""What the service gives is what the model gives, whoever else asks at the same time."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from served_apps import MIXED_TEXTS, make_encoder, open_service, to_png, wait_until
from shared_models import ROUNDING, shared_model
from tiny import draw_noise, tiny_images, tiny_model
from tiny_folders import export_tiny_model
from tokenizing import note_tokenized

from modeling_llm2clip import LLM2CLIPTextModel, encode_images, encode_texts
from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.encoding.encode import TorchEncoder
from modeling_llm2clip.encoding.precision import DeviceTraits
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.serving.service import EmbeddingService
from modeling_llm2clip.serving.service_results import RequestError

IMAGES = [*tiny_images(3), draw_noise(90, 30), draw_noise(20, 70, seed=1)]


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


def embed_alone(value: Any) -> Any:
    """The model's own embedding of one input."""
    model, processor = shared_model()
    encode = encode_texts if isinstance(value, str) else encode_images
    return encode(model, processor, [value])[0].numpy()


def test_embeddings_equal_those_of_the_model_one_by_one_in_any_order() -> None:
    transparent = Image.new("RGBA", (40, 40), (10, 200, 30, 90))
    pairs = [(value, value) for value in [*MIXED_TEXTS, *IMAGES]]
    pairs += [(to_png(image), image) for image in [*IMAGES, transparent]]
    random.Random(0).shuffle(pairs)
    with open_service() as service:
        embedded = run(service.embed([sent for sent, _ in pairs]))
    expected = np.stack([embed_alone(value) for _, value in pairs])
    np.testing.assert_allclose(embedded.embeds, expected, atol=ROUNDING)
    assert embedded.embeds.dtype == np.float32
    assert torch.is_inference_mode_enabled() is False


def test_a_request_tokenizes_each_of_its_texts_once() -> None:
    texts = ["a dog", "dog " * 200, "two red apples", "x"]
    with open_service() as service, note_tokenized() as tokenized:
        found = run(service.embed([IMAGES[0], *texts, texts[0]]))
    assert sorted(tokenized) == sorted(text.strip() for text in texts)
    assert found.truncated == [2] and (found.embeds[1] == found.embeds[-1]).all()


def test_many_texts_are_measured_part_by_part_and_numbered_as_a_whole() -> None:
    texts = [f"text {number}" for number in range(70)] + [" "]
    texts[66] = MIXED_TEXTS[3]
    with open_service() as service:
        found = run(service.embed(texts[:70]))
        with pytest.raises(RequestError, match="number 71 is blank"):
            run(service.embed(texts))
    assert found.truncated == [66]
    ids, _ = shared_model()[1].list_ids(texts[:70])
    assert found.num_tokens == sum(map(len, ids))


def test_under_load_every_request_gets_its_own_embeddings() -> None:
    """Small budgets and mixed lengths split and mix requests in every way."""
    pool: list[Any] = [*MIXED_TEXTS, *IMAGES]
    expected = {id(value): embed_alone(value) for value in pool}
    choose = random.Random(1)
    requests = [choose.choices(pool, k=choose.randint(1, 7)) for _ in range(80)]

    async def ask_all(service: Any) -> Any:
        return await asyncio.gather(*map(service.embed, requests))

    with open_service(make_encoder(token_budget=64, batch_size=3)) as service:
        for request, embedded in zip(requests, run(ask_all(service)), strict=True):
            rows = np.stack([expected[id(value)] for value in request])
            np.testing.assert_allclose(embedded.embeds, rows, atol=ROUNDING)
        assert service.num_pending == 0


def test_several_event_loops_may_ask_at_once() -> None:
    with open_service() as service, ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda text: run(service.embed([text])), MIXED_TEXTS[:4]))
    expected = [embed_alone(text) for text in MIXED_TEXTS[:4]]
    np.testing.assert_allclose([r.embeds[0] for r in results], expected, atol=ROUNDING)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([], {}, "nothing to embed"),
        (["a", " \n"], {}, "number 2 is blank"),
        (["a"], {"dimensions": 33}, "not 33"),
        (["a"], {"dimensions": 0}, "not 0"),
        (["a", b"not an image"], {}, "not an image"),
        (["a"] * 9, {}, "at most 8"),
        (["a", 3], {}, "number 2 is of type int"),
    ],
)
def test_what_cannot_be_embedded_is_refused(
    inputs: list[Any], options: dict[str, Any], message: str
) -> None:
    with open_service(max_queue=8) as service:
        with pytest.raises(RequestError, match=message) as caught:
            run(service.embed(inputs, **options))
        assert caught.value.status in (400, 413)
        wait_until(lambda: not service.num_pending)  # what was valid beside it may be computed


def test_a_model_with_one_tower_serves_that_one(tmp_path: Any) -> None:
    LLM2CLIPTextModel.from_pretrained(
        save_model(*shared_model(), tmp_path / "whole")
    ).save_pretrained(tmp_path / "text")
    shared_model()[1].save_pretrained(tmp_path / "text")
    with open_service(TorchEncoder(*load_model(tmp_path / "text", device="cpu"))) as service:
        found = run(service.embed(["a dog"]))
        with pytest.raises(RequestError, match="no image tower"):
            run(service.embed([IMAGES[0]]))
        with pytest.raises(RequestError, match="one tower"):
            run(service.classify(IMAGES[:1], ["a"]))
    np.testing.assert_allclose(found.embeds[0], embed_alone("a dog"), atol=ROUNDING)


def test_a_closed_service_says_that_it_stops() -> None:
    with open_service() as service:
        pass
    with pytest.raises(RequestError, match="stopping") as caught:
        run(service.embed(["a"]))
    assert caught.value.status == 503


def test_an_untrained_model_is_not_served(tmp_path: Any) -> None:
    folder = save_model(*tiny_model(trained=False), tmp_path / "untrained")
    with pytest.raises(ValueError, match="untrained"):
        EmbeddingService.open(folder)


INSTRUCTIONS = {"query": "Find an image: ", "topic": "Name the topic: "}


@pytest.mark.parametrize("pools_prompt", [False, True])
def test_an_instruction_by_name_gives_the_embeddings_of_sentence_transformers(
    pools_prompt: bool, tmp_path: Path
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, processor = tiny_model()
    if pools_prompt:
        model.config.text_pooling = "full_mean"
    folder = save_model(model, processor, tmp_path / "model", instructions=INSTRUCTIONS)
    library = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    texts = ["a dog", "two red apples on a table"]
    service = EmbeddingService.open(folder, ServeConfig(device="cpu"))

    async def embed_all() -> list[Any]:  # at once, so that texts of all names wait together
        names = [None, "query", "topic", "document"]
        return await asyncio.gather(*(service.embed(texts, prompt_name=name) for name in names))

    try:
        embedded = run(embed_all())
        with pytest.raises(RequestError, match="no instruction 'other'"):
            run(service.embed(texts, prompt_name="other"))
        with pytest.raises(RequestError, match="blank"):
            run(service.embed(["a dog", " "], prompt_name="query"))
    finally:
        service.close()
    for name, found in zip((None, "query", "topic", None), embedded, strict=True):
        expected = library.encode(texts, prompt_name=name)
        np.testing.assert_allclose(found.embeds, expected, atol=ROUNDING)
    assert np.abs(embedded[0].embeds - embedded[1].embeds).max() > 100 * ROUNDING


@pytest.mark.parametrize(("precision", "dtype"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_a_cpu_serves_in_the_stored_dtype_unless_another_is_chosen(
    precision: Any, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeviceTraits, "read", lambda _: DeviceTraits("cpu", has_bfloat16=True))
    folder = export_tiny_model(tmp_path / "model")
    with closing(
        EmbeddingService.open(folder, ServeConfig(device="cpu", precision=precision))
    ) as service:
        described = service.encoder.describe_precision("text", torch.float32)
    assert described.get("precision", "float32") == dtype
