"""A good endpoint passes every check; each error of a bad one is found and named."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from breaking import find
from endpoints import (
    BadRequestError,
    Break,
    Endpoint,
    cut_suffix_off,
    embed_first,
    ignore_mask,
    keep_lengths,
    lose_prompt,
    pool_prefix,
    share_state,
    sort_by_length,
    truncate_at,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_model
from tiny_folders import export_tiny_model

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.base_llm2clip import set_attention_direction
from modeling_llm2clip.configs.serve_config import ServerCheckConfig
from modeling_llm2clip.doctor import server_checks
from modeling_llm2clip.doctor.endpoint_client import (
    EndpointClient,
    EndpointError,
    _find_rows,
    _parse_json,
    _to_tensor,
)
from modeling_llm2clip.doctor.server_checks import check_server
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.model_folders.model_writing import save_model

SCHEMAS = ("openai", "chat", "cohere", "jina")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = tiny_model(max_text_length=128)
    return save_model(
        model, processor, tmp_path_factory.mktemp("served") / "model",
        instructions={"query": "Find an image: "},
    )  # fmt: skip


def check(folder: Path, endpoint: Endpoint | str, **options: Any) -> Any:
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    options = {"device": "cpu", "concurrency": 4, **options}
    return check_server(folder, ServerCheckConfig(server=url, **options))


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_good_endpoint_passes_every_check(folder: Path, schema: Any) -> None:
    with Endpoint(folder) as endpoint:
        report = check(folder, endpoint, schema=schema)
    assert report.healthy, str(report)
    assert [one.name for one in report.checks] == [plan.name for plan in server_checks._PLANNED]
    images = {plan.name for plan in server_checks._PLANNED if plan.about not in (None, "option")}
    assert {one.name for one in report.checks if one.skipped} == {
        "openai": images,
        "chat": {"batched images", "mixed inputs"},
        "cohere": {"base64", "dimensions", "mixed inputs"},
        "jina": set(),
    }[schema]
    assert not any(one.concern for one in report.checks), str(report)
    assert {body["model"] for body in endpoint.seen} == {"tiny"}  # as /v1/models calls it


def make_client(url: str, **options: Any) -> EndpointClient:
    return EndpointClient(ServerCheckConfig(server=url, **options), model_name="tiny")


class Case(NamedTuple):
    """A way to break an endpoint, the check that must fail, and what it must say."""

    break_it: Break
    check: str
    says: str


def set_pooling(endpoint: Endpoint) -> None:
    endpoint.model.config.text_pooling = "last_token"


def answer_first(endpoint: Endpoint) -> None:
    honest = endpoint.embed_texts
    endpoint.embed_texts = lambda texts: honest(["a dog"]).expand(len(texts), -1)


def set_causal(endpoint: Endpoint) -> None:
    set_attention_direction(endpoint.model.text_model, bidirectional=False)


def set_dtype(dtype: torch.dtype) -> Break:
    return lambda endpoint: endpoint.model.to(dtype)


def serve_tower(endpoint: Endpoint) -> None:
    endpoint.embed_texts = lambda texts: F.normalize(
        encode_texts(endpoint.model, endpoint.processor, texts, project=False), dim=-1
    )


def skip_instruction(endpoint: Endpoint) -> None:
    honest = endpoint.embed_texts
    endpoint.embed_texts = lambda texts: honest(["Find an image: " + text for text in texts])


def lowercase(endpoint: Endpoint) -> None:
    honest = endpoint.embed_texts
    endpoint.embed_texts = lambda texts: honest([text.lower() for text in texts])


def embed_blank(endpoint: Endpoint) -> None:
    honest, endpoint.refuses_blank = endpoint.embed_texts, False
    endpoint.embed_texts = lambda texts: honest([text.strip() or "." for text in texts])


def set_attributes(**attributes: Any) -> Break:
    return lambda endpoint: [setattr(endpoint, *item) for item in attributes.items()]


def swap_channels(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    red, green, blue, alpha = image.split()
    return Image.merge("RGBA", (blue, green, red, alpha))


def drop_alpha(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def spoil_first(embeds: torch.Tensor) -> torch.Tensor:
    return torch.cat([embeds[:-1], embeds[-1:] * torch.nan])


def refuse_long(endpoint: Endpoint) -> None:
    def respond(handler: BaseHTTPRequestHandler) -> bool:
        texts = endpoint.seen[-1].get("input") or [""]
        if isinstance(texts[0], str) and len(texts[0]) > 128:
            handler.send(400, {"detail": "too long"})  # type: ignore[attr-defined]
            return True
        return False

    endpoint.respond = respond


CASES = {
    "last-token pooling": Case(set_pooling, "texts", "'last_token' pooling instead of 'mean'"),
    "prompt lost": Case(lose_prompt, "texts", "the prompt is lost"),
    "prefix pooled": Case(pool_prefix, "texts", "the prompt's prefix is pooled too"),
    "causal attention": Case(set_causal, "texts", "attention is causal"),
    "LLM alone": Case(serve_tower, "texts", "text adapter and projection are left out"),
    "not normalized": Case(keep_lengths, "texts", r"not normalized: lengths are .* not 1"),
    "instruction added": Case(skip_instruction, "texts", "texts get the instruction 'query'"),
    "lowercased": Case(lowercase, "texts", "texts are lowercased"),
    "float16": Case(set_dtype(torch.float16), "texts", "computing in float16 .*--served-dtype"),
    "bfloat16": Case(set_dtype(torch.bfloat16), "texts", "computing in bfloat16"),
    "int8": Case(
        set_attributes(finish=lambda embeds: (embeds * 127 / embeds.abs().max()).round()),
        "texts", "the values are integers",
    ),
    "NaN": Case(set_attributes(finish=spoil_first), "texts", "have NaN or infinity"),
    "zeros": Case(set_attributes(finish=torch.zeros_like), "texts", "are zero"),
    "dimensions cut off": Case(
        set_attributes(finish=lambda embeds: F.normalize(embeds[:, :8], dim=-1)),
        "texts", "have 8 dimensions, the model's have 32: only the first 8 dimensions",
    ),
    "truncated early": Case(truncate_at(64), "mixed lengths", "truncated to 64 tokens, not to 128"),
    "suffix cut off": Case(cut_suffix_off, "long text", "cuts off the prompt's suffix"),
    "padding pooled": Case(
        ignore_mask, "batched texts", "padding on the right is attended to and pooled"
    ),
    "rows in another order": Case(
        sort_by_length, "batched texts", "have another input's embedding: .*cross-talk"
    ),
    "one row for all": Case(embed_first, "batched texts", "inputs have one embedding"),
    "shared state": Case(share_state, "concurrent texts", "requests at once: .*cross-talk"),
    "blank accepted": Case(
        set_attributes(refuses_blank=False), "empty text", r"\[''\]: .* answered 500"
    ),
    "blank embedded": Case(
        embed_blank, "empty text", r"\['   '\] gets an answer without an error"
    ),
    "base64 of float64": Case(set_attributes(base64_dtype="<f8"), "base64", "different embeddings"),
    "base64 of big endian": Case(set_attributes(base64_dtype=">f4"), "base64", "different embeddi"),
    "pixels not normalized": Case(
        set_attributes(pixels=lambda pixels: pixels * 0.27 + 0.45), "images", "not normalized by m"
    ),
    "BGR": Case(set_attributes(decode=swap_channels), "images", "color channels are BGR"),
    "alpha dropped": Case(
        set_attributes(decode=drop_alpha), "image decoding", "transparency is not put on white"
    ),
}  # fmt: skip


def run_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Run the checks up to this one that it needs, and no others."""
    wanted, plans = {name}, []
    for plan in reversed(server_checks._PLANNED):
        if plan.name in wanted:
            wanted |= set(plan.needs)
            plans.insert(0, plan)
    monkeypatch.setattr(server_checks, "_PLANNED", tuple(plans))


@pytest.mark.parametrize("name", CASES)
def test_an_error_of_an_endpoint_is_found_and_named(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    run_alone(monkeypatch, case.check)
    with Endpoint(folder, case.break_it) as endpoint:
        report = check(folder, endpoint, schema="jina")
    found = find(report, case.check)
    assert not report.healthy
    assert (found.passed, found.skipped) == (False, False), str(report)
    assert re.search(case.says, found.message), found.message
    assert report.failed == [found]  # what it needs passed


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_half_precision_that_is_meant_passes(dtype: str, folder: Path) -> None:
    with Endpoint(folder, set_dtype(getattr(torch, dtype))) as endpoint:
        report = check(folder, endpoint, served_dtype=dtype)
    assert report.healthy, str(report)


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def half_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = tiny_model(max_text_length=128)
    return save_model(
        model.to(getattr(torch, request.param)),
        processor,
        tmp_path_factory.mktemp("half") / "model",
        instructions={"query": "Find an image: "},
    )


@pytest.mark.parametrize("computed", ["the folder's dtype", "float32"])
def test_a_folder_in_half_precision_certifies_a_good_server(
    computed: str, half_folder: Path
) -> None:
    break_it = set_dtype(torch.float32) if computed == "float32" else set_attributes()
    with Endpoint(half_folder, break_it) as endpoint:
        report = check(half_folder, endpoint, schema="jina")
    assert report.healthy, str(report)


HALF_CASES = {
    "prompt lost": (lose_prompt, "the prompt is lost"),
    "last-token pooling": (set_pooling, "'last_token' pooling instead of 'mean'"),
    "causal attention": (set_causal, "attention is causal"),
    "LLM alone": (serve_tower, "text adapter and projection are left out"),
    "one row for all": (answer_first, "inputs have one embedding"),
}


@pytest.mark.parametrize("name", HALF_CASES)
@pytest.mark.parametrize("computed", ["half", "float32"])
def test_an_error_is_named_in_half_precision(
    computed: str, name: str, half_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server computes as its folder says, or in float32: the cause is the same."""
    break_it, says = HALF_CASES[name]
    run_alone(monkeypatch, "texts")
    with Endpoint(half_folder, break_it) as endpoint:
        if computed == "float32":
            endpoint.model.float()
        report = check(half_folder, endpoint)
    assert says in find(report, "texts").message, str(report)


def test_what_half_precision_changes_is_explained_by_no_error(
    half_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding moves a text that no error changes: errors without an effect explain nothing."""
    run_alone(monkeypatch, "texts")
    noise = set_attributes(
        finish=lambda embeds: embeds + 0.4 * torch.ones(embeds.shape[1]) / embeds.shape[1] ** 0.5
    )
    with Endpoint(half_folder, noise) as endpoint:
        report = check(half_folder, endpoint)
    assert "No known error gives them" in find(report, "texts").message, str(report)


def normalize_as_imagenet(pixels: torch.Tensor) -> torch.Tensor:
    """Replace CLIP's mean and std, with which the tiny tower's pixels come, by ImageNet's."""
    statistics = [
        ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    (mean, std), (mean_2, std_2) = (
        [torch.tensor(one).view(1, 3, 1, 1) for one in pair] for pair in statistics
    )
    return (pixels * std + mean - mean_2) / std_2


def test_an_error_that_half_precision_would_allow_is_found_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_alone(monkeypatch, "images")
    with Endpoint(folder, set_attributes(pixels=normalize_as_imagenet)) as endpoint:
        report = check(folder, endpoint, schema="jina", served_dtype="bfloat16")
    assert re.search(
        "which is allowed, but pixels are normalized by ImageNet's",
        find(report, "images").message,
    ), str(report)


@pytest.mark.parametrize("name", ["texts", "images", "base64"])
def test_rounded_values_are_a_warning(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_alone(monkeypatch, name)
    rounded = set_attributes(finish=lambda embeds: embeds.half().float())
    with Endpoint(folder, rounded) as endpoint:
        report = check(folder, endpoint, schema="jina")
    assert report.healthy and find(report, name).concern
    assert "rounded to float16" in find(report, name).message, str(report)


def ignore_instruction(endpoint: Endpoint) -> None:
    endpoint.embed_with = lambda _, texts: endpoint.embed_texts(texts)


def pool_instruction(endpoint: Endpoint) -> None:
    endpoint.embed_with = lambda _, texts: endpoint.embed_texts(
        ["Find an image: " + t for t in texts]
    )


@pytest.mark.parametrize("is_weak", [False, True])
@pytest.mark.parametrize(
    ("break_it", "verdict", "says"),
    [
        (ignore_instruction, "warning", "the server ignores prompt_name='query'"),
        (pool_instruction, "FAILED", "pooled only if the model pools its prompt"),
    ],
)
def test_a_server_that_applies_an_instruction_otherwise_is_found(
    break_it: Break, verdict: str, says: str, is_weak: bool, folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run_alone(monkeypatch, "instructions")
    if is_weak:  # it changes embeddings by less than the tolerance of a dtype
        monkeypatch.setattr(server_checks, "find_tolerance", lambda *_, **__: 1.9)
    with Endpoint(folder, break_it) as endpoint:
        found = find(check(folder, endpoint), "instructions")
    assert found.verdict == verdict and says in found.message, found.message


def limit_batches(endpoint: Endpoint) -> None:
    honest = endpoint.embed

    def embed(body: dict[str, Any]) -> torch.Tensor:
        if len(body.get("input", [])) > 32:
            raise BadRequestError("at most 32 inputs")
        return honest(body)

    endpoint.embed = embed  # type: ignore[method-assign]


def test_a_server_with_small_batches_is_checked_with_those(folder: Path) -> None:
    with Endpoint(folder, limit_batches) as endpoint:
        report = check(folder, endpoint, schema="jina")
    assert report.healthy, str(report)
    for name in ("batched texts", "mixed inputs"):
        message = find(report, name).message
        assert message.startswith("32 embeddings") and "100 are refused with 400" in message


def test_a_long_text_may_be_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_alone(monkeypatch, "long text")
    with Endpoint(folder, refuse_long) as endpoint:
        report = check(folder, endpoint)
    assert "is refused with 400" in find(report, "long text").message
    assert report.healthy, str(report)


def test_a_folder_that_is_not_itself_is_reported_first(folder: Path, tmp_path: Path) -> None:
    other, processor = tiny_model(max_text_length=128)
    with torch.no_grad():
        other.text_projection.weight.mul_(-1)
    changed = save_model(other, processor, tmp_path / "other")
    golden = "golden_embeddings.safetensors"
    (changed / golden).write_bytes((folder / golden).read_bytes())
    with Endpoint(changed) as endpoint:
        report = check(changed, endpoint)
    assert report.checks[0].verdict == "FAILED"
    assert "without --server" in report.checks[0].message


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


GOOD_ROW = {"index": 0, "embedding": [0.5]}
FAILURES = {
    "HTML": (reply_with(200, b"<html>Hello</html>"), r"not JSON: b'<html>"),
    "no embeddings": (reply_with(200, {"id": 1}), r"neither `data` nor `embeddings`.*\['id'\]"),
    "a list": (reply_with(200, [1]), "neither `data` nor `embeddings`, but list"),
    "too few": (reply_with(200, {"data": []}), "0 embeddings for 1 input"),
    "no embedding": (reply_with(200, {"data": [{}]}), "has no `embedding`"),
    "null": (reply_with(200, {"data": [{"embedding": [None]}]}), "not a list of numbers"),
    "order": (
        reply_with(200, {"data": [{"index": 1, "embedding": [0.5]}]}), "not in the order of the"
    ),
    "odd base64": (reply_with(200, {"data": [{"embedding": "AAA="}]}), "of float32: AAA="),
    "403": (reply_with(403, b"no"), "answered 403 .*--api-key-env"),
    "404": (reply_with(404, {"detail": "Not Found"}), "answered 404 .*Not Found.*--schema"),
    "500": (reply_with(500, {"error": {"message": "out of memory"}}), "500 .*out of memory"),
    "redirect": (reply_with(307, b"", Location="http://example.org/"), "redirects to 'http://exa"),
    "overloaded": (reply_with(429, b"", Retry_After="0"), "did so 5 times"),
    "stalled": (set_attributes(respond=stall), "no whole reply within 0.3 seconds"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_an_endpoint_that_gives_no_embeddings_fails_with_the_reason(
    name: str, folder: Path
) -> None:
    break_it, says = FAILURES[name]
    options = {"timeout_s": 0.3} if name == "stalled" else {}
    with Endpoint(folder, break_it) as endpoint, pytest.raises(EndpointError, match=says):
        make_client(endpoint.url, **options).connect("a dog")


def test_an_endpoint_that_is_nowhere_fails_with_the_reason(folder: Path) -> None:
    with Endpoint(folder) as endpoint:
        url = endpoint.url
    report = check(folder, url)
    assert re.search("cannot be reached .*refused", find(report, "connection").message)
    assert find(report, "texts").message == "needs 'connection', which failed"
    assert [one.name for one in report.failed] == ["connection"]


def test_a_key_comes_from_the_environment_and_goes_nowhere_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_alone(monkeypatch, "texts")
    with Endpoint(folder, set_attributes(api_key="secret")) as endpoint:
        report = check(folder, endpoint)
        connection = find(report, "connection").message
        assert re.search("answered 401 .*Incorrect API key provided.*--api-key", connection)
        monkeypatch.setenv("MY_KEY", "secret")
        report = check(folder, endpoint, api_key_env="MY_KEY")
    assert report.healthy, str(report)
    assert "secret" not in str(report)
    assert set(endpoint.keys) == {None, "Bearer secret"}


@pytest.mark.parametrize(
    ("schema", "path", "asked"),
    [
        ("openai", "", "/v1/embeddings"),
        ("openai", "/v1/", "/v1/embeddings"),
        ("cohere", "", "/v2/embed"),
        ("cohere", "", "/v1/embeddings"),
        ("jina", "/own/path?a=1", "/own/path?a=1"),
    ],
)
def test_an_address_without_a_path_gets_that_of_the_schema(
    schema: Any, path: str, asked: str, folder: Path
) -> None:
    with Endpoint(folder, set_attributes(paths=(asked,))) as endpoint:
        client = make_client(endpoint.url + path, schema=schema)
        assert client.connect("a dog").shape == (1, 32)
    assert client.urls == [endpoint.url + asked]


@pytest.fixture
def served(folder: Path) -> Iterator[Endpoint]:
    with Endpoint(folder) as endpoint:
        yield endpoint


def test_the_command_prints_the_report_and_its_exit_code(
    folder: Path,
    served: Endpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_alone(monkeypatch, "texts")
    words = ["doctor", str(folder), "--server", served.url, "--schema", "jina", "--device", "cpu"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{served.url}: healthy"
    lose_prompt(served)
    assert main(words) == 1
    assert "the prompt is lost" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--schema", "jina"], "`schema` needs `server`"),
        (["--server", "127.0.0.1:8000"], "an http or https address"),
        (["--server", "ftp://host"], "an http or https address"),
        (["--server", "http://"], "an http or https address"),
        (["--server", "http://:80"], "has no host"),
        (["--server", "http://me:secret@host"], "host has a name or password"),
    ],
)
def test_an_address_that_is_none_is_refused(
    words: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(folder), *words, "--device", "cpu"]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_without_texts_is_refused(tmp_path: Path, capsys: Any) -> None:
    whole = export_tiny_model(tmp_path / "whole")
    assert main(["export", str(whole), str(tmp_path / "v"), "--components", "vision"]) == 0
    assert main(["doctor", str(tmp_path / "v"), "--server", "http://127.0.0.1:1"]) == 2
    assert "has no text tower" in capsys.readouterr().err


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
@settings(max_examples=200)
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


def test_a_reply_too_deep_to_read_is_not_json() -> None:
    with pytest.raises(EndpointError, match="not JSON"):
        _parse_json(b"[" * 200_000)
