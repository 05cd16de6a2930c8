"""A good endpoint passes every check, whatever its schema and precision; what is reported."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import choose_checks, find
from endpoints import (
    BadRequestError,
    Break,
    Endpoint,
    load_once,
    lose_prompt,
    serve_tower,
    set_causal,
    set_dtype,
    set_pooling,
)
from served_apps import run_app
from server_checking import check
from shared_models import mostly_slow
from tiny import tiny_model

from modeling_llm2clip import LLM2CLIPVisionModel
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.doctor import server_checks
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.serving.app import create_app
from modeling_llm2clip.serving.service import EmbeddingService

IMAGE_CHECKS = {plan.name for plan in server_checks._PLANNED if plan.about not in (None, "option")}
SKIPPED: dict[Any, set[str]] = {
    "openai": IMAGE_CHECKS,
    "chat": {"batched images", "mixed inputs"},
    "cohere": {"base64", "dimensions", "mixed inputs"},
    "jina": set(),
}


@pytest.fixture(scope="module")
def own_url(served: Path) -> Iterator[str]:
    service = EmbeddingService.open(served, ServeConfig(device="cpu"))
    with run_app(create_app(service)) as address:
        yield address


def require_good(report: Any, schema: Any) -> None:
    """Every check passed without a warning, but those that the schema does not allow."""
    assert report.healthy, str(report)
    assert [result.name for result in report.checks] == [p.name for p in server_checks._PLANNED]
    assert {result.name for result in report.checks if result.skipped} == SKIPPED[schema]
    assert not any(result.concern for result in report.checks), str(report)


@pytest.mark.slow
@pytest.mark.parametrize("schema", mostly_slow(SKIPPED, {"openai", "jina"}))
def test_the_own_server_gives_the_embeddings_of_the_folder(
    schema: Any, served: Path, own_url: str
) -> None:
    require_good(check(served, own_url, schema=schema), schema)


@pytest.mark.slow
@pytest.mark.parametrize("schema", ["chat", "cohere"])
def test_a_server_of_other_code_passes_every_check(schema: Any, served: Path) -> None:
    with Endpoint(served) as endpoint:
        require_good(check(served, endpoint, schema=schema), schema)
        options = {"model_name": "own", "schema": schema}
        assert check(served, endpoint, "texts", **options).healthy
    assert {body["model"] for body in endpoint.seen} == {"tiny", "own"}  # as /v1/models calls it


@pytest.fixture(scope="module")
def half_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in half precision, by dtype."""
    root, folders = tmp_path_factory.mktemp("half"), {}
    for dtype in ("float16", "bfloat16"):
        model, processor = tiny_model(max_text_length=128)
        folders[dtype] = save_model(model.to(getattr(torch, dtype)), processor, root / dtype)
    return folders


# A server computes as its folder says, or in float32.
PRECISIONS = [
    ("float16", "float32"), pytest.param("bfloat16", "bfloat16", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "computed"), PRECISIONS)
def test_a_folder_in_half_precision_certifies_a_good_server(
    stored: str, computed: str, half_folders: dict[str, Path]
) -> None:
    with Endpoint(half_folders[stored], set_dtype(getattr(torch, computed))) as endpoint:
        report = check(half_folders[stored], endpoint)
    assert report.healthy, str(report)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lose_prompt, "The prompt is missing"),
        (set_pooling, "differ"),
        (set_causal, "differ"),
        (serve_tower, "differ"),
    ],
)
@pytest.mark.parametrize(("stored", "computed"), PRECISIONS)
def test_an_error_is_found_in_half_precision(
    stored: str, computed: str, break_it: Break, says: str, half_folders: dict[str, Path]
) -> None:
    with Endpoint(half_folders[stored], break_it, set_dtype(getattr(torch, computed))) as endpoint:
        report = check(half_folders[stored], endpoint, "texts")
    assert says in find(report, "texts").message, str(report)


def ignore_instruction(endpoint: Endpoint) -> None:
    endpoint.embed_with = lambda _, texts: endpoint.embed_texts(texts)


def pool_instruction(endpoint: Endpoint) -> None:
    endpoint.embed_with = lambda _, texts: endpoint.embed_texts(
        ["Find an image: " + text for text in texts]
    )


@pytest.mark.parametrize(
    ("break_it", "verdict", "says", "is_weak"),
    [
        (ignore_instruction, "warning", "the server ignores prompt_name='query'", False),
        (ignore_instruction, "warning", "the server ignores prompt_name='query'", True),
        (pool_instruction, "FAILED", "pooled only if the model pools its prompt", False),
    ],
)
def test_a_server_that_applies_an_instruction_otherwise_is_found(
    break_it: Break, verdict: str, says: str, is_weak: bool, served: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if is_weak:  # it changes embeddings by less than the tolerance of a dtype
        monkeypatch.setattr(server_checks, "find_tolerance", lambda *_, **__: 1.9)
    with Endpoint(served, break_it) as endpoint:
        result = find(check(served, endpoint, "instructions"), "instructions")
    assert result.verdict == verdict and says in result.message, result.message


def limit_batches(endpoint: Endpoint) -> None:
    honest = endpoint.embed

    def embed(body: dict[str, Any]) -> torch.Tensor:
        if len(body.get("input", [])) > 32:
            raise BadRequestError("at most 32 inputs")
        return honest(body)

    endpoint.embed = embed  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_server_with_small_batches_passes(served: Path) -> None:
    with Endpoint(served, limit_batches) as endpoint:
        report = check(served, endpoint, "batched texts", "mixed inputs", "base64")
    assert report.healthy, str(report)


def refuse_long(endpoint: Endpoint) -> None:
    def respond(handler: BaseHTTPRequestHandler) -> bool:
        texts = endpoint.seen[-1].get("input") or [""]
        if isinstance(texts[0], str) and len(texts[0]) > 128:
            handler.send(400, {"detail": "too long"})  # type: ignore[attr-defined]
            return True
        return False

    endpoint.respond = respond


def test_a_long_text_may_be_refused(served: Path) -> None:
    with Endpoint(served, refuse_long) as endpoint:
        report = check(served, endpoint, "long text", schema="openai")
    assert "is refused with 400" in find(report, "long text").message
    assert report.healthy, str(report)


def test_a_folder_that_is_not_itself_is_reported_first(served: Path, tmp_path: Path) -> None:
    other, processor = tiny_model(max_text_length=128)
    with torch.no_grad():
        other.text_projection.weight.mul_(-1)
    changed = save_model(other, processor, tmp_path / "other")
    golden = "golden_embeddings.safetensors"
    (changed / golden).write_bytes((served / golden).read_bytes())
    with Endpoint(changed) as endpoint:
        report = check(changed, endpoint, "model")
    assert report.checks[0].verdict == "FAILED"
    assert "without --server" in report.checks[0].message


def test_the_command_prints_the_report_and_its_exit_code(
    served: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_checks, "_PLANNED", choose_checks(server_checks._PLANNED, "texts"))
    with Endpoint(served) as endpoint:
        url = endpoint.url
        words = ["doctor", str(served), "--server", url, "--schema", "jina", "--device", "cpu"]
        assert main(words) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"{url}: healthy"
        lose_prompt(endpoint)
        assert main(words) == 1
    assert "The prompt is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--schema", "jina"], "`schema` cannot be used without `server`"),
        (["--server", "127.0.0.1:8000"], "an http or https address"),
        (["--server", "ftp://host"], "an http or https address"),
        (["--server", "http://"], "an http or https address"),
        (["--server", "http://:80"], "has no host"),
        (["--server", "http://me:secret@host"], "host contains a user name or password"),
    ],
)
def test_an_address_that_is_none_is_refused(
    words: list[str], says: str, served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(served), *words, "--device", "cpu"]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_without_texts_is_refused(served: Path, tmp_path: Path, capsys: Any) -> None:
    LLM2CLIPVisionModel.from_pretrained(served).save_pretrained(tmp_path)
    load_once(served)[1].save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path), "--server", "http://127.0.0.1:1"]) == 2
    assert "has no text tower" in capsys.readouterr().err
