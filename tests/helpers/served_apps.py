"""Services and servers on loopback around tiny models, and images as requests carry them."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image
from shared_models import shared_model
from tiny_folders import export_tiny_model

from modeling_llm2clip import ImageIndex
from modeling_llm2clip.configs.encoding_config import IndexConfig
from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.encoding.encode import TorchEncoder
from modeling_llm2clip.serving.app import bind_socket, create_app
from modeling_llm2clip.serving.service import EmbeddingService

MODEL_NAME = "tiny"
# Of very different lengths, with the longest beyond the 32 tokens that the tiny model reads.
MIXED_TEXTS = [
    "a", "a dog", "two red apples on a wooden table by the window", "the sea at night " * 20,
    "Eine Katze schläft", "夜の東京", "x y z", "a photo of a red car", "🐕",
]  # fmt: skip


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def to_data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def from_base64(text: str) -> Any:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def send(address: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    """Send bytes or a body as JSON, a GET without one; returns status, JSON and headers."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), error.headers


def make_encoder(**sizes: int) -> TorchEncoder:
    """The shared model, with batches of these sizes."""
    encoder = TorchEncoder(*shared_model())
    vars(encoder).update(sizes)
    return encoder


def save_searched(root: Path, images: Mapping[str, Image.Image], *, model: str = "model") -> Path:
    """Save a tiny model, images and their index, which is `db`, in a folder."""
    export_tiny_model(root / model)
    for name, image in images.items():
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / "images" / name)
    ImageIndex.build(root / model, root / "images", root / "db", IndexConfig(show_progress=False))
    return root


class HeldEncoder(TorchEncoder):
    """The shared model, which waits before each batch of texts until it may go on."""

    def __init__(self) -> None:
        super().__init__(*shared_model())
        self.go, self.begun = threading.Event(), threading.Event()
        self.seen: list[str] = []

    def encode_texts(self, texts: Any) -> Any:
        self.seen += map(str, texts)
        self.begun.set()
        assert self.go.wait(20)
        return super().encode_texts(texts)


@contextmanager
def open_service(encoder: Any = None, *, index: Any = None, **limits: Any) -> Iterator[Any]:
    """A service around the shared tiny model, or another encoder."""
    service = EmbeddingService(
        encoder or TorchEncoder(*shared_model()),
        ServeConfig(device="cpu", **limits),
        model_name=MODEL_NAME,
        index=index,
    )
    try:
        yield service
    finally:
        service.close()


@contextmanager
def run_app(app: Any) -> Iterator[str]:
    """Serve an application on loopback in a thread; yields its URL."""
    bound = bind_socket(ServeConfig(port=0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.01)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def run_service(**options: Any) -> Iterator[tuple[str, Any]]:
    """Serve the shared tiny model on loopback; yields URL and service."""
    with open_service(**options) as service, run_app(create_app(service)) as url:
        yield url, service
