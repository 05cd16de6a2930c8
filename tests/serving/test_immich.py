"""immich's machine-learning protocol, with requests as immich's server sends them."""

from __future__ import annotations

import io
import json
import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from served_apps import run_service, send, to_data_url, to_png
from tiny import draw_noise

from modeling_llm2clip.configs.serve_config import API_KEY_VARIABLE

PNG = to_png(draw_noise(40, 56))
TEXTUAL = {"clip": {"textual": {"modelName": "ViT-B-32__openai", "options": {"language": "de"}}}}
VISUAL = {"clip": {"visual": {"modelName": "ViT-B-32__openai"}}}
FACES = {
    "facial-recognition": {
        "detection": {"modelName": "buffalo_l", "options": {"minScore": 0.7}},
        "recognition": {"modelName": "buffalo_l"},
    }
}
OCR = {
    "ocr": {
        "detection": {"modelName": "PP-OCRv5_mobile", "options": {"minScore": 0.5}},
        "recognition": {"modelName": "PP-OCRv5_mobile", "options": {"minScore": 0.8}},
    }
}
BOUNDARY = "----formdata-undici-084152965738"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with run_service() as (address, _):
        yield address


def write_form(entries: Any, **fields: str | bytes) -> bytes:
    """Write the form as Node's fetch does; a file of immich is a blob without a name."""
    parts = []
    for name, value in {"entries": json.dumps(entries, separators=(",", ":")), **fields}.items():
        about = f'Content-Disposition: form-data; name="{name}"'
        if isinstance(value, bytes):
            about += '; filename="blob"\r\nContent-Type: application/octet-stream'
        content = value.encode() if isinstance(value, str) else value
        parts.append(f"--{BOUNDARY}\r\n{about}\r\n\r\n".encode() + content + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def predict(url: str, entries: Any, **fields: str | bytes) -> tuple[int, Any]:
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    status, answer, _ = send(f"{url}/predict", write_form(entries, **fields), **headers)
    return status, answer


def embed(url: str, value: str) -> Any:
    return send(f"{url}/v1/embeddings", {"input": value})[1]["data"][0]["embedding"]


def test_a_ping_is_answered_with_pong(url: str) -> None:
    with urllib.request.urlopen(f"{url}/ping") as response:
        assert (response.status, response.read()) == (200, b"pong")


def test_a_text_has_the_embedding_of_the_other_routes_as_a_string(url: str) -> None:
    text = "Ein Hund im Schnee 🐕"
    status, answer = predict(url, TEXTUAL, text=text)
    assert status == 200
    assert [*answer] == ["clip"] and isinstance(answer["clip"], str)
    assert json.loads(answer["clip"]) == embed(url, text)


@pytest.mark.parametrize("size", [(40, 56), (700, 600)])
def test_an_image_has_the_embedding_of_the_other_routes_and_its_size(
    url: str, size: tuple[int, int]
) -> None:
    png = to_png(draw_noise(*size))
    status, answer = predict(url, VISUAL, image=png)
    assert status == 200
    assert (answer["imageHeight"], answer["imageWidth"]) == size
    assert json.loads(answer["clip"]) == embed(url, to_data_url(png))


def test_the_size_of_a_rotated_image_is_that_of_its_pixels_as_stored(url: str) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    draw_noise(40, 56).save(buffer, "JPEG", exif=exif)
    status, answer = predict(url, VISUAL, image=buffer.getvalue())
    assert (status, answer["imageHeight"], answer["imageWidth"]) == (200, 40, 56)
    assert json.loads(answer["clip"]) == embed(url, to_data_url(buffer.getvalue(), "image/jpeg"))


@pytest.mark.parametrize("entries", [FACES, OCR, VISUAL | OCR, {"clip": {}}, {}])
def test_other_tasks_are_refused_so_that_immich_asks_its_next_server(
    url: str, entries: Any
) -> None:
    status, answer = predict(url, entries, image=PNG)
    assert (status, answer["error"]["code"]) == (404, "task_not_found")
    assert json.dumps(entries)[:20] in answer["error"]["message"]


@pytest.mark.parametrize(
    ("entries", "fields", "message"),
    [
        (VISUAL, {}, "Send `text` for clip/textual, and `image` for clip/visual"),
        (VISUAL, {"text": "a dog"}, "Send `text` for clip/textual"),
        (TEXTUAL, {"image": PNG}, "Send `text` for clip/textual"),
        (TEXTUAL, {"text": " \t"}, "text: a text must not be blank"),
        (TEXTUAL, {"text": "x" * 100_001}, "text: String should have at most 100000 characters"),
        (VISUAL, {"image": b""}, "empty"),
        (VISUAL, {"image": b"nothing"}, "not an image"),
        ([TEXTUAL], {"text": "a dog"}, "entries: Input should be"),
        ({"clip": "textual"}, {"text": "a dog"}, "entries.clip: Input should be"),
    ],
)
def test_what_is_not_valid_is_refused_with_the_reason(
    url: str, entries: Any, fields: dict[str, Any], message: str
) -> None:
    status, answer = predict(url, entries, **fields)
    assert status == 400, answer
    assert message in answer["error"]["message"]


def test_a_body_that_is_no_form_is_refused_with_what_is_missing(url: str) -> None:
    for media_type in ("application/json", "text/plain"):
        status, answer, _ = send(f"{url}/predict", b"{}", **{"Content-Type": media_type})
        assert status == 400
        assert "entries: Field required" in answer["error"]["message"]
    for boundary in ("", "; boundary=x"):
        headers = {"Content-Type": f"multipart/form-data{boundary}"}
        status, answer, _ = send(f"{url}/predict", b"{}", **headers)
        assert status == 400 and re.search(r"[^.]\.$", answer["error"]["message"]), answer


def test_the_limits_of_the_other_routes_hold() -> None:
    with run_service(max_image_mb=0.001, max_request_mb=0.02, max_megapixels=0.001) as (url, _):
        assert predict(url, VISUAL, image=to_png(draw_noise(16, 16)))[0] == 200
        for image, code in (
            (PNG, "image_too_large"),
            (to_png(Image.new("RGB", (40, 56))), "image_too_large"),
            (bytes(30_000), "request_too_large"),
        ):
            status, answer = predict(url, VISUAL, image=image)
            assert (status, answer["error"]["code"]) == (413, code)
        with urllib.request.urlopen(f"{url}/metrics") as response:
            metrics = response.read().decode()
        assert 'llm2clip_requests_total{route="/predict",status="413"} 3.0' in metrics


def test_with_a_key_neither_route_answers_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "sesame")
    with run_service() as (url, _):
        assert predict(url, TEXTUAL, text="a dog")[0] == 401
        assert send(f"{url}/ping")[0] == 401
