"""The client of endpoints: addresses, keys, and replies that are not embeddings."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import find
from endpoints import Break, Endpoint, set_attributes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from server_checking import check

from modeling_llm2clip.configs.serve_config import API_KEY_VARIABLE, ServerCheckConfig
from modeling_llm2clip.doctor.endpoint_client import (
    EndpointClient,
    EndpointError,
    _find_rows,
    _parse_json,
    _to_tensor,
)


def make_client(url: str, **options: Any) -> EndpointClient:
    return EndpointClient(ServerCheckConfig(server=url, **options), model_name="tiny")


def reply_with(status: int, content: Any, **headers: str) -> Break:
    def respond(handler: Any) -> bool:
        handler.send(status, content, **headers)
        return True

    return set_attributes(respond=respond)


def stall(handler: Any) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    for _ in range(20):  # no single wait is long
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)
    return True


FAILURES = {
    "HTML": (reply_with(200, b"<html>Hello</html>"), r"not JSON: b'<html>"),
    "deep": (reply_with(200, b"[" * 200_000), "not JSON"),
    "no embeddings": (reply_with(200, {"id": 1}), r"neither `data` nor `embeddings`.*\['id'\]"),
    "a list": (reply_with(200, [1]), "neither `data` nor `embeddings`, but list"),
    "too few": (reply_with(200, {"data": []}), "0 embeddings for 1 input"),
    "no embedding": (reply_with(200, {"data": [{}]}), "has no `embedding`"),
    "null": (reply_with(200, {"data": [{"embedding": [None]}]}), "neither a list of numbers"),
    "order": (
        reply_with(200, {"data": [{"index": 1, "embedding": [0.5]}]}), "not in input order"
    ),
    "odd base64": (reply_with(200, {"data": [{"embedding": "AAA="}]}), "of float32: AAA="),
    "403": (reply_with(403, b"no"), "answered 403 .*LLM2CLIP_API_KEY"),
    "404": (reply_with(404, {"detail": "Not Found"}), "answered 404 .*Not Found.*--schema"),
    "500": (reply_with(500, {"error": {"message": "out of memory"}}), "500 .*out of memory"),
    "redirect": (reply_with(307, b"", Location="http://example.org/"), "redirects to 'http://exa"),
    "overloaded": (reply_with(429, b"", Retry_After="0"), "did so 5 times"),
    "stalled": (set_attributes(respond=stall), "no complete reply within 0.3 seconds"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_an_endpoint_that_gives_no_embeddings_fails_with_the_reason(
    name: str, served: Path
) -> None:
    break_it, says = FAILURES[name]
    options = {"timeout_s": 0.3} if name == "stalled" else {}
    with Endpoint(served, break_it) as endpoint, pytest.raises(EndpointError, match=says):
        make_client(endpoint.url, **options).embed(["a dog"])


def test_an_endpoint_that_is_nowhere_fails_with_the_reason(served: Path) -> None:
    with Endpoint(served) as endpoint:
        url = endpoint.url
    report = check(served, url, "texts")
    assert re.search("cannot be reached .*refused", find(report, "connection").message)
    assert find(report, "texts").message == "needs 'connection', which failed"
    assert [result.name for result in report.failed] == ["connection"]


def test_a_key_comes_from_the_environment_and_goes_nowhere_else(
    served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Endpoint(served, set_attributes(api_key="secret")) as endpoint:
        report = check(served, endpoint, "texts")
        connection = find(report, "connection").message
        assert re.search("answered 401 .*Incorrect API key provided.*LLM2CLIP_API_KEY", connection)
        monkeypatch.setenv(API_KEY_VARIABLE, "secret")
        report = check(served, endpoint, "texts")
    assert report.healthy, str(report)
    assert "secret" not in str(report)
    assert set(endpoint.keys) == {None, "Bearer secret"}


@pytest.mark.parametrize(
    ("schema", "path", "asked"),
    [
        ("openai", "", "/v1/embeddings"),
        ("openai", "/v1/", "/v1/embeddings"),
        ("cohere", "", "/v2/embed"),
        ("jina", "/own/path?a=1", "/own/path?a=1"),
    ],
)
def test_an_address_without_a_path_gets_that_of_the_schema(
    schema: Any, path: str, asked: str, served: Path
) -> None:
    with Endpoint(served, set_attributes(paths=(asked,))) as endpoint:
        client = make_client(endpoint.url + path, schema=schema)
        assert client.embed(["a dog"]).shape == (1, 32)
    assert client.url == endpoint.url + asked


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["data", "embeddings", "embedding", "index", "float", "other"]), inner
        )
    ),
    max_leaves=8,
)


@given(JSON)
@settings(max_examples=100)
@example({"data": [{"embedding": [10**400]}]})
@example({"data": [{"embedding": [1e300]}]})
@example({"data": {"embedding": 1}})
@example({"embeddings": {"float": [[1], [1, 2]]}})
@example({"embeddings": [["1"]]})
def test_whatever_a_server_replies_is_embeddings_or_a_clear_error(content: Any) -> None:
    try:
        rows = _find_rows(_parse_json(json.dumps(content).encode()))
        embeds = _to_tensor(rows) if rows else torch.zeros(0, 1)
    except EndpointError as error:
        assert str(error)
    else:
        assert embeds.ndim == 2 and embeds.dtype == torch.float32
