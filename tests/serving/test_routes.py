"""The API over HTTP: the schemas that clients send, errors in OpenAI's shape, its own client."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from served_apps import (
    MIXED_TEXTS,
    MODEL_NAME,
    from_base64,
    open_service,
    run_app,
    run_service,
    send,
    to_data_url,
    to_png,
)
from shared_models import ROUNDING, shared_model
from tiny import draw_noise, tiny_images

from modeling_llm2clip import encode_images, encode_texts
from modeling_llm2clip.data.labels import make_labels
from modeling_llm2clip.encoding.encode import average_prompts
from modeling_llm2clip.search.tag_images import rank_labels
from modeling_llm2clip.serving.app import create_app
from modeling_llm2clip.serving.schemas import MOST_CHARACTERS

IMAGES = [draw_noise(), *tiny_images(2)]
URLS = [to_data_url(to_png(image)) for image in IMAGES]
TEXT_PART = {"type": "text", "text": "x"}
IMAGE_PART = {"type": "image_url", "image_url": {"url": URLS[0]}}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with run_service() as (address, _):
        yield address


def embed(url: str, body: Any) -> Any:
    status, answer, _ = send(f"{url}/v1/embeddings", body)
    assert status == 200, answer
    assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
    return np.array([row["embedding"] for row in answer["data"]])


def expect(*inputs: Any) -> Any:
    model, processor = shared_model()
    return np.concatenate(
        [
            (encode_texts if isinstance(value, str) else encode_images)(model, processor, [value])
            for value in inputs
        ]
    )


def test_the_client_of_openai_works_unmodified(url: str) -> None:
    import openai  # here, since it takes a second, which every worker would spend

    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        assert [model.id for model in client.models.list()] == [MODEL_NAME]
        found = client.embeddings.create(model=MODEL_NAME, input=MIXED_TEXTS)  # base64
        floats = client.embeddings.create(
            model=MODEL_NAME, input=MIXED_TEXTS[1], encoding_format="float", dimensions=7
        )
        with pytest.raises(openai.NotFoundError, match="no model 'other'"):
            client.embeddings.create(model="other", input="a")
        # As LangChain and LlamaIndex send it.
        with pytest.raises(openai.BadRequestError, match="no instruction 'other'"):
            client.embeddings.create(
                model=MODEL_NAME, input="a", extra_body={"prompt_name": "other"}
            )
        with pytest.raises(openai.BadRequestError, match="not token ids"):
            client.embeddings.create(model=MODEL_NAME, input=[[1, 2, 3]])
    expected = expect(*MIXED_TEXTS)
    embeds = [row.embedding for row in found.data]
    np.testing.assert_allclose(embeds, expected, atol=ROUNDING)
    first = expected[1, :7] / np.linalg.norm(expected[1, :7])
    np.testing.assert_allclose(floats.data[0].embedding, first, atol=ROUNDING)
    ids, _ = shared_model()[1].list_ids(MIXED_TEXTS)
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, ids))
    assert found.model_extra is not None and found.model_extra["truncated"] == [3]


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        ({"input": "a dog"}, ["a dog"]),
        ({"input": "a", "dimensions": None, "encoding_format": None, "model": None}, ["a"]),
        ({"input": ["a dog", "x"]}, ["a dog", "x"]),
        ({"input": {"text": "a dog"}}, ["a dog"]),
        ({"input": [{"image": URLS[0]}, {"text": "x"}, "y"]}, [IMAGES[0], "x", "y"]),
        ({"input": URLS[0]}, [IMAGES[0]]),
        ({"input": ["a dog", URLS[0]]}, ["a dog", IMAGES[0]]),
        ({"input": IMAGE_PART}, [IMAGES[0]]),
        ({"input": [TEXT_PART, IMAGE_PART, "y"]}, ["x", IMAGES[0], "y"]),
        ({"messages": [{"role": "user", "content": "a dog"}]}, ["a dog"]),
        ({"messages": [{"role": "user", "content": [IMAGE_PART]}]}, [IMAGES[0]]),
        ({"messages": [{"role": "user", "content": [TEXT_PART]}]}, ["x"]),
        ({"texts": ["a dog", "x"]}, ["a dog", "x"]),
        ({"images": URLS}, IMAGES),
        ({"inputs": [{"content": [IMAGE_PART]}, {"content": [TEXT_PART]}]}, [IMAGES[0], "x"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_texts_and_images_come_in_any_of_the_schemas(
    url: str, body: dict[str, Any], inputs: list[Any]
) -> None:
    np.testing.assert_allclose(embed(url, body), expect(*inputs), atol=ROUNDING)


def test_base64_is_little_endian_float32_and_decimals_lose_no_bit(url: str) -> None:
    floats = embed(url, {"input": MIXED_TEXTS[:2]})
    assert np.array_equal(floats.astype(np.float32).astype(np.float64), floats)
    body = {"input": MIXED_TEXTS[:2], "encoding_format": "base64"}
    answer = send(f"{url}/v1/embeddings", body)[1]
    rows = [from_base64(row["embedding"]) for row in answer["data"]]
    np.testing.assert_array_equal(np.array(rows), floats.astype(np.float32))


def test_coheres_api_gives_the_same_embeddings(url: str) -> None:
    body = {
        "model": MODEL_NAME, "input_type": "search_query", "texts": ["a dog", "x"],
        "embedding_types": ["float", "base64"], "truncate": "END", "output_dimension": 9,
    }  # fmt: skip
    status, answer, _ = send(f"{url}/v2/embed", body)
    assert status == 200
    expected = embed(url, {"input": ["a dog", "x"], "dimensions": 9})
    np.testing.assert_array_equal(answer["embeddings"]["float"], expected)
    rows = [from_base64(row) for row in answer["embeddings"]["base64"]]
    np.testing.assert_array_equal(np.array(rows), expected.astype(np.float32))
    assert answer["texts"] == ["a dog", "x"]
    assert answer["response_type"] == "embeddings_by_type"
    _, of_images, _ = send(f"{url}/v2/embed", {"images": URLS[:1]})
    np.testing.assert_array_equal(
        of_images["embeddings"]["float"], embed(url, {"images": URLS[:1]})
    )


@pytest.mark.parametrize(
    "text",
    [
        "data:image/png,AAAA",
        "data:image/;base64,AAAA",
        "data:text/plain;base64,AAAA",
        "see data:image/png;base64,AAAA",
        "data:image/png a;base64,AAAA",
    ],
)
def test_a_string_that_is_not_the_data_url_of_an_image_is_a_text(url: str, text: str) -> None:
    np.testing.assert_array_equal(embed(url, {"input": text}), embed(url, {"texts": [text]}))


def test_a_data_url_may_be_longer_than_a_text_and_a_text_object_is_never_an_image(url: str) -> None:
    image = draw_noise(256, 256)
    data_url = to_data_url(to_png(image))
    assert len(data_url) > MOST_CHARACTERS
    for sent in (data_url, data_url.replace("data:image/png;base64", "DATA:IMAGE/PNG;BASE64")):
        np.testing.assert_allclose(embed(url, {"input": [sent]}), expect(image), atol=ROUNDING)
    assert send(f"{url}/v1/embeddings", {"input": "x" * (MOST_CHARACTERS + 1)})[0] == 400
    [as_text] = embed(url, {"input": {"text": URLS[0]}})
    np.testing.assert_array_equal([as_text], embed(url, {"texts": [URLS[0]]}))


def test_ollamas_api_gives_the_same_embeddings(url: str) -> None:
    inputs = ["a dog", URLS[0], MIXED_TEXTS[3]]
    # As Ollama's own client and LangChain's send it.
    body = {"model": MODEL_NAME, "input": inputs, "options": {"num_ctx": 8}, "keep_alive": "5m"}
    status, answer, _ = send(f"{url}/api/embed", body)
    assert status == 200
    assert answer["model"] == MODEL_NAME
    np.testing.assert_array_equal(answer["embeddings"], embed(url, {"input": inputs}))
    tokens = send(f"{url}/v1/embeddings", {"input": inputs})[1]["usage"]["prompt_tokens"]
    assert answer["prompt_eval_count"] == tokens
    _, one, _ = send(f"{url}/api/embed", {"input": "a dog", "dimensions": 9, "truncate": None})
    np.testing.assert_array_equal(
        one["embeddings"], embed(url, {"input": "a dog", "dimensions": 9})
    )


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"input": "a", "model": "other"}, 404, "no model 'other'"),
        ({"input": MIXED_TEXTS[3], "truncate": False}, 400, "limit of 32 tokens is exceeded"),
        ({"input": ["a", [1, 2]]}, 400, "not token ids"),
        ({"input": "a", "encoding_format": "base64"}, 400, "encoding_format: Extra inputs"),
        ({"prompt": "a"}, 400, "input: Field required"),
    ],
)
def test_what_ollamas_api_cannot_answer_is_refused(
    url: str, body: Any, status: int, message: str
) -> None:
    answered, answer, _ = send(f"{url}/api/embed", body)
    assert answered == status
    assert message in answer["error"]["message"]


def test_a_classification_equals_that_of_tag(url: str) -> None:
    names, templates = ["red", "blue", "dog"], ("a photo of {}", "{}")
    model, processor = shared_model()
    labels = make_labels(names, templates=templates)
    prompts = [prompt for label in labels for prompt in label.prompts]
    averages = average_prompts(encode_texts(model, processor, prompts), [len(templates)] * 3)
    embeds, rule = encode_images(model, processor, IMAGES), model.logit_head.plain_rule()
    body = {"images": URLS, "candidate_labels": names, "templates": templates, "top_k": 2}
    status, answer, _ = send(f"{url}/v1/classify", body)
    assert status == 200
    expected = rank_labels(embeds, averages, labels, rule=rule, top_k=2)
    for row, tags in zip(answer["data"], expected, strict=True):
        for found, tag in zip(row["labels"], tags, strict=True):
            assert found["label"] == tag.label
            assert found["cosine"] == pytest.approx(tag.cosine, abs=ROUNDING)
            # The scale, about 14 here, multiplies the rounding of a cosine.
            assert found["probability"] == pytest.approx(tag.probability, abs=20 * ROUNDING)


def test_labels_whose_prompts_are_truncated_are_listed(url: str) -> None:
    labels = ["red", "very " * 40 + "blue", "dog"]
    body = {"images": URLS[:1], "candidate_labels": labels, "templates": ["a {}", "the {}"]}
    assert send(f"{url}/v1/classify", body)[1]["truncated"] == [1]


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"input": ""}, "at least 1 character", "input"),
        ({"input": []}, "at least 1 item", "input"),
        ({"input": ["a", " \t\x1f\u2003"]}, "input.1: a text must not be blank", "input.1"),
        ({"input": float("nan")}, "not token ids", "input"),
        ({"input": ["a", 3]}, "not token ids", "input.1"),
        ({"input": {"type": "audio"}}, "'text', 'image_url'", "input"),
        ({"input": "a", "dimensions": 1000}, "not 1000", "dimensions"),
        ({"input": "a", "dimensions": True}, "valid integer", "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "'float' or 'base64'", "encoding_format"),
        ({"input": "a", "dimension": 3}, "Extra inputs are not permitted", "dimension"),
        ({"input": "a", "texts": ["b"]}, "exactly one of input, messages", None),
        ({}, "exactly one of input, messages", None),
        ([], "exactly one of input, messages", None),
        ({"input": [{"image": "nonsense!"}]}, "not valid base64", None),
        ({"images": ["https://example.com/a.png"]}, "does not fetch", None),
        ({"images": [to_data_url(b"nothing")]}, "not an image", None),
        (
            {"messages": [{"role": "user", "content": [IMAGE_PART] * 2}]},
            "exactly one text or image",
            "messages",
        ),
        ({"input": [MIXED_TEXTS[3]], "truncate": False}, "limit of 32 tokens is exceeded", None),
        ({"input": "\ud800"}, "unicode", "input"),
    ],
)
def test_what_is_not_valid_is_refused_by_name(
    url: str, body: Any, message: str, param: str | None
) -> None:
    status, answer, _ = send(f"{url}/v1/embeddings", body)
    error = answer["error"]
    assert status == 400, answer
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"input": ' + b"9" * 5000 + b"}", "Exceeds the limit (4300 digits)"),
        (b"", "Field required"),
        (b"\xff\xfe", "not valid JSON: Expecting value"),
        (b"[" * 200_000, "maximum recursion depth exceeded"),
        (b'{"input": "\xe9"}', "byte 0xe9 in position 11"),
        (b'{"input": "a"', "not valid JSON: Expecting ',' delimiter: line 1 column 14"),
        (b'{"input": "a", "input": "b"}', "field 'input' occurs twice"),
        (b'{"input": [{"text": "a", "text": "b"}]}', "field 'text' occurs twice"),
    ],
    ids=["digits", "empty", "mark", "deep", "latin-1", "cut", "twice", "twice-below"],
)
def test_a_body_that_cannot_be_read_is_refused_with_the_reason(
    url: str, body: bytes, message: str
) -> None:
    for path, media_type in (("/v1/embeddings", "application/JSON"), ("/v1/search", "text/json")):
        status, answer, _ = send(url + path, body, **{"Content-Type": media_type})
        assert status == 400
        assert message in answer["error"]["message"]


def test_what_a_template_lacks_is_reported_of_the_templates(url: str) -> None:
    body = {"images": URLS[:1], "candidate_labels": ["a", "a"], "templates": ["a {}", "no place"]}
    status, answer, _ = send(f"{url}/v1/classify", body)
    assert (status, answer["error"]["param"]) == (400, "templates")
    status, answer, _ = send(f"{url}/v1/classify", {**body, "templates": ["{}"]})
    assert (status, answer["error"]["param"]) == (400, "candidate_labels")


def test_a_classification_asks_for_a_bounded_number_of_labels(url: str) -> None:
    body = {"images": ["AAAA"] * 201, "candidate_labels": [f"label {n}" for n in range(101)]}
    for top_k in (None, 100):
        status, answer, _ = send(f"{url}/v1/classify", {**body, "top_k": top_k})
        assert status == 400
        labels = top_k or 101
        expected = f"201 images would return {201 * labels:,} results"
        assert expected in answer["error"]["message"]


def test_a_body_that_is_not_said_to_be_json_is_refused(url: str) -> None:
    status, answer, _ = send(
        f"{url}/v1/embeddings", {"input": "a"}, **{"Content-Type": "text/plain"}
    )
    assert status == 400
    assert "Content-Type: application/json" in answer["error"]["message"]


def test_unknown_routes_and_methods_have_the_same_shape(url: str) -> None:
    assert send(f"{url}/v1/nothing", {})[0] == 404
    status, answer, headers = send(f"{url}/v1/embeddings", None)
    assert status == 405 and "error" in answer
    assert headers["Allow"] == "POST"


def test_a_search_without_an_index_says_how_to_get_one(url: str) -> None:
    status, answer, _ = send(f"{url}/v1/search", {"queries": ["a"]})
    assert status == 404
    assert "--index" in answer["error"]["message"]


def test_health_and_metrics_tell_what_happens(url: str) -> None:
    embed(url, {"input": ["a", "b"]})
    status, health, _ = send(f"{url}/health", None)
    assert status == 200
    assert health == {
        "status": "ok", "model": MODEL_NAME, "modalities": ["text", "image"], "embedding_dim": 32,
        "max_text_length": 32, "num_pending": 0, "num_images": None, "index_error": None,
        "far_images": False,
        "working_routes": ["/v1/embeddings", "/v2/embed", "/api/embed", "/predict", "/v1/classify"],
    }  # fmt: skip
    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['llm2clip_inputs_total{modality="text"}']) >= 2
    assert float(values['llm2clip_requests_total{route="/v1/embeddings",status="200"}']) >= 1


def test_health_answers_head_where_a_page_takes_all_other_routes() -> None:
    def add_page(app: Any, _: Any) -> None:
        app.mount("/", lambda *_: None)

    with open_service() as service, run_app(create_app(service, page=add_page)) as url:
        request = urllib.request.Request(f"{url}/health", method="HEAD")
        with urllib.request.urlopen(request) as response:
            assert response.status == 200
            assert int(response.headers["Content-Length"]) > 0 and response.read() == b""


def test_every_example_of_the_openapi_is_answered(url: str) -> None:
    schema = send(f"{url}/openapi.json", None)[1]
    num_examples = 0
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            for example in body.get("examples", {}).values():
                num_examples += 1
                status, answer, _ = send(url + path, example["value"])
                assert status == 200 or (path == "/v1/search" and status == 404), answer
    assert num_examples >= 8
    assert "422" not in json.dumps(schema)
