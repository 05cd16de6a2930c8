"""Requests to the server, right and wrong, and the numbers that the model itself gives for them."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from shared_models import ROUNDING
from tiny import draw_noise

Item = tuple[str, str]
"""What is embedded: "text" or "image", and the text, or an image as a request has it."""

PATHS = ("/v1/embeddings", "/v2/embed", "/v1/classify", "/v1/search")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
WORDS = (
    "a dog", "two red apples", "夜の東京", "Eine Katze", "🐕", "x", "the sea at night " * 20,
    "\ufeff", "a\0b", "'); DROP TABLE images; --", "\x1b[31m", "ﷺ" * 40, "e\u0301" * 30,
)  # fmt: skip
# Values in place of others, and pieces of JSON that Python's own writer would not write.
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 2**63, 10**400, math.nan, math.inf, -0.0, "", " ", "\x1f", "\ud800",
    "a" * 100_001, [], {}, [[]], {"text": {}}, {"image": ""}, {"a": 1}, [1, 2, 3],
    "../etc/passwd", "data:image/png;base64,", "data:text/html,<b>", "data:image/png;base64,####",
)  # fmt: skip
RAW = (
    b"", b"null", b"{", b"[" * 100_000, b'{"input":' * 50_000, b"9" * 5_000, b"\xff\xfe",
    b"\x00" * 9, b'{"input": "a", "input": "b"}', b'{"input": "\xff"}',
    b'{"input": [' + b'"a",' * 3000 + b'"a"]}',
    b'\xef\xbb\xbf{"input": "a"}', b'{"input": 1e99999}', b'{"input": "\\ud800"}',
    b'{"input": [' + b'"a",' * 999 + b'"a"]}',
)  # fmt: skip

JUNK = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9, b"\0" * 500, b"\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n", b"* * *\r\n\r\n", b"GET /docs\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET http://127.0.0.1/ HTTP/1.1\r\n\r\n",
    b"POST /v1/embeddings HTTP/1.1\r\nContent-Length: abc\r\n\r\n{}",
    b"POST /v1/embeddings HTTP/1.1\r\nContent-Length: -1\r\n\r\n{}",
    b"POST /v1/embeddings HTTP/1.1\r\nContent-Length: 1" + b"0" * 30 + b"\r\n\r\n{}",
    b"POST /v1/embeddings HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 9\r\n\r\n{}",
    b"POST /v1/embeddings HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    b"POST /v1/embeddings HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}",
    b"POST /v1/embeddings HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
    b"POST /v1/embeddings HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n{}",
    b"POST /v1/embeddings HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    b"GET / HTTP/1.1\r\nHost: \xff\r\nContent-Type: \xff\r\nAuthorization: Basic \xff\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    b"GET /%s HTTP/1.1\r\n\r\n" % (b"a" * 60_000), b"GET /?%ff=%00&q=%C0%AF HTTP/1.1\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", b"GET /health HTTP/1.0\r\n\r\n",
)  # fmt: skip
JUNK += tuple(
    junk.replace(b" HTTP/1.1\r\n", b" HTTP/1.1\r\nHost: x\r\n")
    for junk in JUNK
    if b"Host" not in junk
)
# Of this machine, or not to be fetched; {port} is one that listens.
URLS = tuple(
    f"http://{host}:{{port}}/a.png"
    for host in (
        "127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f000001",
        "127.1", "0.0.0.0", "[::]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "017700000001",
        "a@127.0.0.1", "[fe80::1%25lo]", "127.0.0.1.", "[::127.0.0.1]",
    )
)  # fmt: skip
URLS += (
    "ftp://127.0.0.1/a", "file:///etc/passwd", "http://", "https://127.0.0.1:{port}/", "http://[",
    "http://127.0.0.1:99999/", "gopher://127.0.0.1:{port}/", "//127.0.0.1/a",
    "HTTP://LOCALHOST:{port}/",
)  # fmt: skip
CONTENT_TYPES = (
    "text/plain", "", "multipart/form-data; boundary=a", "application/json; charset=utf-16", "\xff",
    "application/x-www-form-urlencoded", "application/vnd.api+json", "json", "application/xml",
)  # fmt: skip


def draw_item(random: Random) -> Item:
    """Draw a text, or an image as a data URL or base64."""
    if random.random() < 0.6:
        end = random.choice((str(random.randrange(40)), chr(random.randrange(0xD800))))
        return "text", f"{random.choice(WORDS)} {end}"
    content, number = io.BytesIO(), random.randrange(40)
    draw_noise(9 + number, 50 - number, seed=number).save(content, FORMATS[number % len(FORMATS)])
    text = base64.b64encode(content.getvalue()).decode()
    return "image", text if number % 2 else f"data:image/png;base64,{text}"


def draw_request(random: Random) -> tuple[str, dict[str, Any]]:
    """Draw the path and the body of a request that must be answered."""
    path = random.choice((PATHS[0], *PATHS))
    items = [draw_item(random) for _ in range(random.choice((1, 1, 2, 5, 20)))]
    objects: list[Any] = [{kind: value} for kind, value in items]
    parts = [_write_part(item) for item in items]
    if path == "/v1/search":
        queries = [random.choice((query, [query, objects[0]])) for query in objects]
        return path, {"queries": queries, "top_k": random.choice((1, 3, 1000))}
    if path == "/v1/classify":
        images = [draw_item(Random(number)) for number in range(40)]
        labels = random.sample(WORDS[:6], random.randrange(1, 6))
        chosen = [value for kind, value in random.sample(images, 30) if kind == "image"]
        body = {"images": chosen, "candidate_labels": labels, "templates": ["{}", "a photo of {}"]}
        return path, body
    inputs = [{"content": [part]} for part in parts]
    if path == "/v2/embed":
        return path, {"inputs": inputs, "embedding_types": ["float", "base64"]}
    forms: list[dict[str, Any]] = [
        {"input": objects},
        {"input": objects[0], "dimensions": 5},
        {"inputs": inputs},
        {"messages": [{"role": "user", "content": [parts[0]]}]},
    ]
    form = random.choice(("float", "base64"))
    return path, {**random.choice(forms), "encoding_format": form, "prompt_name": "query"}


def _write_part(item: Item) -> dict[str, Any]:
    kind, value = item
    if kind == "text":
        return {"type": "text", "text": value}
    return {"type": "image_url", "image_url": {"url": value}}


def mutate(random: Random, body: Any) -> bytes:
    """Change some fields of a body, and sometimes some of its bytes."""
    for _ in range(random.randrange(1, 4)):
        parent, key = random.choice(list(_list_places(body)))
        change = random.randrange(5)
        if change == 0:
            del parent[key]
        elif change == 1 and isinstance(parent, dict):
            parent[random.choice(("", "input", "texts", "user", "where", "top_k"))] = parent[key]
        elif change == 2:
            parent[key] = [parent[key]] * random.choice((1, 2, 3))
        else:
            parent[key] = deepcopy(random.choice(ODD))  # further changes may go into it
        if not body:
            break
    encoding = random.choice(("utf-8",) * 8 + ("utf-16", "utf-32", "latin-1"))
    is_ascii = random.random() < 0.8
    content = bytearray(json.dumps(body, ensure_ascii=is_ascii).encode(encoding, "replace"))
    for _ in range(random.choice((0, 0, 0, 1, 4))):
        place = random.randrange(len(content))
        content[place : place + random.randrange(3)] = random.randbytes(random.randrange(3))
    return bytes(content)


def _list_places(body: Any) -> Iterator[tuple[Any, Any]]:
    """List containers and keys of all values below a value."""
    entries = body.items() if isinstance(body, dict) else enumerate(body)
    for key, value in entries:
        yield body, key
        if isinstance(value, dict | list):
            yield from _list_places(value)


class Oracle:
    """The model's own embeddings of what a request has, each computed alone.

    It reads requests by itself: it shares no code with the server's schemas.
    """

    def __init__(self, model: Path, index: Path) -> None:
        from modeling_llm2clip import ImageIndex, load_model

        self._model: Any
        self._model, self._processor = load_model(model, device="cpu")
        self._known: dict[Item, Any] = {}
        batches = ImageIndex.open(index, device="cpu").iterate_embeddings()
        self._indexed = {
            path.name: row for paths, rows in batches for path, row in zip(paths, rows, strict=True)
        }

    def embed(self, item: Item) -> Any:
        """Embed a text or an image; each is remembered."""
        from modeling_llm2clip import encode_images, encode_texts

        if item not in self._known:
            kind, value = item
            if kind == "text":
                embeds = encode_texts(self._model, self._processor, [value])
            else:
                content = base64.b64decode(value.partition(",")[2] or value)
                with Image.open(io.BytesIO(content)) as image:
                    embeds = encode_images(self._model, self._processor, [image])
            if len(self._known) > 2000:
                self._known.clear()
            self._known[item] = embeds[0].numpy()
        return self._known[item]

    def find_problem(self, path: str, request: bytes, answer: bytes) -> str:
        """Compare the answer with status 200 to a request; empty if it is the model's."""
        try:
            return self._find_problem(path, json.loads(request), json.loads(answer))
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            return f"accepted, but {error!r}"

    def _find_problem(self, path: str, body: Any, answer: Any) -> str:
        if path == "/v1/search":
            return self._check_search(body, answer)
        if path == "/v1/classify":
            return self._check_labels(body, answer)
        expected = np.stack([self.embed(item) for item in _list_items(body)])
        width = body.get("dimensions") or body.get("output_dimension") or expected.shape[1]
        expected = _normalize(expected[:, :width])
        if path == "/v2/embed":
            kinds = answer["embeddings"]
        else:
            rows = [entry["embedding"] for entry in answer["data"]]
            kinds = {body.get("encoding_format") or "float": rows}
        for kind, rows in kinds.items():
            if kind == "base64":
                rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
            if problem := _compare(rows, expected):
                return problem
        return ""

    def _check_search(self, body: Any, answer: Any) -> str:
        top_k = min(body.get("top_k", 6), len(self._indexed))
        for query, entry in zip(body["queries"], answer["data"], strict=True):
            parts = query if isinstance(query, list) else [query]
            mean = np.mean([self.embed(_read_item(part)) for part in parts], axis=0)
            cosines = {name: float(_normalize(mean) @ row) for name, row in self._indexed.items()}
            hits = {hit["path"]: hit["cosine"] for hit in entry["hits"]}
            best = sorted(cosines.values(), reverse=True)[:top_k]
            if body.get("where") is None and (problem := _compare([*hits.values()], best)):
                return problem
            if problem := _compare([*hits.values()], [cosines[name] for name in hits]):
                return problem
        return ""

    def _check_labels(self, body: Any, answer: Any) -> str:
        names = [name.strip() for name in body["candidate_labels"]]
        templates = body.get("templates", ["{}"])
        labels = {}
        for name in names:
            prompts = [template.replace("{}", name) for template in templates]
            labels[name] = _normalize(np.mean([self.embed(("text", p)) for p in prompts], axis=0))
        for image, entry in zip(body["images"], answer["data"], strict=True):
            embed = self.embed(("image", image))
            cosines = {label["label"]: label["cosine"] for label in entry["labels"]}
            expected = [float(embed @ labels[name]) for name in cosines]
            if len(cosines) != min(body.get("top_k") or len(names), len(names)):
                return f"{len(cosines)} labels"
            if problem := _compare([*cosines.values()], expected):
                return problem
        return ""


def _list_items(body: Any) -> list[Item]:
    """List what a body of embeddings has, in order."""
    if "messages" in body:
        content = body["messages"][0]["content"]
        return [_read_item(part) for part in ([content] if isinstance(content, str) else content)]
    if "inputs" in body:
        return [_read_item(entry["content"][0]) for entry in body["inputs"]]
    if "images" in body:
        return [("image", image) for image in body["images"]]
    content = body["input"] if "input" in body else body["texts"]
    return [_read_item(part) for part in (content if isinstance(content, list) else [content])]


def _read_item(part: Any) -> Item:
    if isinstance(part, str):
        return "text", part
    if part.get("type") == "image_url":
        return "image", part["image_url"]["url"]
    kind = "text" if "text" in part else "image"
    return kind, part[kind]


def _normalize(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _compare(rows: Any, expected: Any) -> str:
    rows, expected = np.asarray(rows, np.float64), np.asarray(expected, np.float64)
    if rows.shape != expected.shape:
        return f"shape {rows.shape} instead of {expected.shape}"
    most = float(np.abs(rows - expected).max(initial=0))
    return "" if most <= ROUNDING else f"differs by {most:g}"
