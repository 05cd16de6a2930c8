"""Keys, sizes, deadlines and clients that leave, over real connections."""

from __future__ import annotations

import base64
import json
import socket
from typing import Any

import pytest
from served_apps import MODEL_NAME, HeldEncoder, open_service, run_app, run_service, wait_until
from shared_models import shared_model

from modeling_llm2clip.configs.serve_config import API_KEY_VARIABLE, ServeConfig
from modeling_llm2clip.encoding.encode import TorchEncoder
from modeling_llm2clip.serving.app import create_app


def write_request(body: bytes, *, path: str = "/v1/embeddings", headers: str = "") -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{headers}\r\n"
    )
    return head.encode() + body


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def ask(url: str, request: bytes) -> tuple[int, dict[str, str], Any]:
    """Send raw bytes; returns status, headers and JSON, or None for other content."""
    with connect(url) as client:
        client.sendall(request)
        with client.makefile("rb") as file:
            status = int(file.readline().split()[1])
            headers = {}
            while line := file.readline().strip():
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            content = file.read(int(headers["content-length"]))
    is_json = headers.get("content-type") == "application/json"
    return status, headers, json.loads(content) if is_json else None


def embed(text: str = "a") -> bytes:
    return write_request(json.dumps({"input": text}).encode())


def test_with_a_key_only_those_who_have_it_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "sesame-ü")
    basic = base64.b64encode("any:sesame-ü".encode()).decode()
    body = json.dumps({"input": "a"}).encode()
    with run_service() as (url, _):
        for headers, expected in (
            ("", 401),
            ("Authorization: Bearer wrong\r\n", 401),
            ("Authorization: Bearer \r\n", 401),
            ("Authorization: Basic !\r\n", 401),
            ("Authorization: Bearer sesame-ü\r\n", 200),
            (f"Authorization: Basic {basic}\r\n", 200),
        ):
            status, answered, content = ask(url, write_request(body, headers=headers))
            assert status == expected
            if status == 401:
                assert content["error"]["type"] == "authentication_error"
                assert answered["www-authenticate"] == 'Basic realm="llm2clip"'
        get = "GET {} HTTP/1.1\r\nHost: x\r\n\r\n"
        assert ask(url, get.format("/health").encode())[0] == 200
        for path in ("/", "/metrics", "/docs", "/openapi.json", "/v1/models"):
            assert ask(url, get.format(path).encode())[0] == 401


def test_a_blank_key_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, " ")
    with open_service() as service, pytest.raises(ValueError, match="is blank"):
        create_app(service)


def test_a_large_request_is_refused_before_it_is_read() -> None:
    with run_service(max_request_mb=0.01, max_image_mb=0.005) as (url, _):
        stated = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 10001\r\n\r\n"
        assert ask(url, stated)[0] == 413  # although nothing of it came
        chunked = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunked += b"2000\r\n" + b"x" * 0x2000 + b"\r\n2000\r\n" + b"x" * 0x2000
        status, _, content = ask(url, chunked)
        assert status == 413
        assert "--max-request-mb" in content["error"]["message"]
        assert ask(url, embed())[0] == 200


def test_all_requests_together_may_have_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = HeldEncoder()
    monkeypatch.setattr(ServeConfig, "max_pending_mb", 0.012)
    with run_service(encoder=encoder, max_request_mb=0.01, max_image_mb=0.005) as (url, _):
        with connect(url) as first:
            first.sendall(embed("a" * 9000))
            assert encoder.begun.wait(10)
            status, headers, _ = ask(url, embed("b" * 9000))
            assert (status, headers["retry-after"]) == (429, "1")
            encoder.go.set()
            assert first.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: ask(url, embed("b" * 9000))[0] == 200)


def test_a_full_queue_answers_429_with_retry_after() -> None:
    encoder = HeldEncoder()
    with run_service(encoder=encoder, max_queue=1) as (url, _):
        with connect(url) as first:
            first.sendall(embed())
            assert encoder.begun.wait(10)
            status, headers, content = ask(url, embed())
            assert status == 429
            assert int(headers["retry-after"]) >= 1
            assert content["error"]["code"] == "queue_full"
            encoder.go.set()
            assert first.recv(100).startswith(b"HTTP/1.1 200")


def answer_in_time(url: str) -> None:
    """Ask until the answer comes in time; on a busy machine, the first may not."""
    wait_until(lambda: ask(url, embed())[0] == 200)


def test_a_request_that_takes_too_long_is_given_up() -> None:
    encoder = HeldEncoder()
    with run_service(encoder=encoder, timeout_s=0.3) as (url, service):
        status, _, content = ask(url, embed())
        assert status == 504
        assert "0.3 seconds" in content["error"]["message"]
        assert service.num_pending == 0
        encoder.go.set()
        answer_in_time(url)


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    with run_service(timeout_s=0.3) as (url, _):
        assert ask(url, embed()[:-3])[0] == 408
        answer_in_time(url)


def test_the_work_of_a_client_that_hung_up_is_dropped() -> None:
    encoder = HeldEncoder()
    encoder.token_budget = 1
    with run_service(encoder=encoder) as (url, service):
        with connect(url) as holder:
            holder.sendall(embed("first"))
            assert encoder.begun.wait(10)
            with connect(url) as leaver:
                leaver.sendall(embed("left"))
                wait_until(lambda: service.num_pending == 2)
            wait_until(lambda: service.num_pending == 1)
            encoder.go.set()
            assert holder.recv(100).startswith(b"HTTP/1.1 200")
        assert ask(url, embed("last"))[0] == 200
    assert encoder.seen == ["first", "last"]


def test_an_error_of_the_model_shows_no_traceback() -> None:
    class BrokenEncoder(TorchEncoder):
        def encode_texts(self, texts: Any) -> Any:
            if "bad" in map(str, texts):
                raise ArithmeticError("the secret of the model")
            return super().encode_texts(texts)

    with run_service(encoder=BrokenEncoder(*shared_model())) as (url, _):
        status, _, content = ask(url, embed("bad"))
        assert status == 500
        assert "ArithmeticError" in content["error"]["message"]
        assert "secret" not in json.dumps(content)
        assert ask(url, embed("good"))[0] == 200


def test_a_page_is_shown_at_the_root_and_guarded_by_the_key_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def add_page(app: Any, service: Any) -> None:
        @app.get("/", include_in_schema=False)
        async def show() -> dict[str, str]:
            seen.append(await service.embed(["a dog"]))
            return {"page": service.model_name}

    monkeypatch.setenv(API_KEY_VARIABLE, "key")
    get = b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n\r\n"
    with open_service() as service, run_app(create_app(service, page=add_page)) as url:
        assert ask(url, get.replace(b"Bearer key", b"Bearer no"))[0] == 401
        assert ask(url, get)[2] == {"page": MODEL_NAME}
    assert len(seen[0].embeds) == 1
