"""Endpoints for embeddings on loopback, right or wrong in one way, around a tiny model.

They share no code with the package's server, and none with the checks that look at them.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from modeling_llm2clip.base_llm2clip import set_attention_direction
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.model_folders.model_loading import load_model

Break = Callable[["Endpoint"], object]


class BadRequestError(Exception):
    """A request that gets 400."""


@cache
def load_once(folder: Path) -> tuple[Any, Any]:
    """Load a model and its processor, which no test may change."""
    return load_model(folder, device="cpu")


class Endpoint(ThreadingHTTPServer):
    """Serves a model folder in all four schemas, until a test replaces methods or attributes."""

    def __init__(self, folder: Path, *broken: Break) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.processor = copy.deepcopy(load_once(folder))
        self.api_key = ""
        self.paths = ("/v1/embeddings", "/v2/embed")
        self.finish: Callable[[Tensor], Tensor] = lambda embeds: embeds
        self.refuses_blank = True
        self.base64_dtype = "<f4"
        self.reply: bytes | None = None
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.embed_texts: Callable[[list[str]], Tensor] = self._embed_texts
        self.embed_with: Callable[[str, list[str]], Tensor] = self._embed_with
        self.decode: Callable[[bytes], Any] = lambda content: Image.open(io.BytesIO(content))
        self.pixels: Callable[[Tensor], Tensor] | None = None
        self.respond: Callable[[BaseHTTPRequestHandler], bool] = lambda _: False
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        for break_it in broken:
            break_it(self)

    def __enter__(self) -> Endpoint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """A client may go away."""

    def _embed_texts(self, texts: list[str]) -> Tensor:
        return encode_texts(self.model, self.processor, texts)

    def embed_images(self, addresses: Sequence[str]) -> Tensor:
        contents = [base64.b64decode(one.partition(",")[2]) for one in addresses]
        images = [self.decode(content) for content in contents]
        if self.pixels is None:
            return encode_images(self.model, self.processor, images)
        pixels = self.pixels(self.processor(images=images)["pixel_values"])
        with torch.no_grad():
            features = self.model.get_image_features(pixels).pooler_output
        return F.normalize(features, dim=-1)

    def embed(self, body: dict[str, Any]) -> Tensor:
        if "messages" in body:
            (part,) = body["messages"][0]["content"]
            return self.embed_images([part["image_url"]["url"]])
        if "images" in body:
            return self.embed_images(body["images"])
        name = body.get("prompt_name")
        if body.get("input_type") is not None:
            name = {"search_query": "query", "search_document": "document"}[body["input_type"]]
        inputs = body.get("texts", body.get("input"))
        if not isinstance(inputs, list):
            raise BadRequestError("give a list")
        if inputs and isinstance(inputs[0], dict):
            embeds = {
                key: iter(embed([one[key] for one in inputs if key in one]))
                for key, embed in (("image", self.embed_images), ("text", self.embed_texts))
                if any("image" in one for one in inputs) and any(key in one for one in inputs)
            }
            if "image" in embeds:
                return torch.stack([next(embeds[next(iter(one))]) for one in inputs])
            inputs = [one["text"] for one in inputs]
        if self.refuses_blank and (not inputs or not all(text.strip() for text in inputs)):
            raise BadRequestError("an input is blank")
        return self.embed_texts(inputs) if name is None else self.embed_with(name, inputs)

    def _embed_with(self, name: str, texts: list[str]) -> Tensor:
        """Embed texts with an instruction, which is attended to and not pooled."""
        instruction = self.model.config.instructions[name]
        start = len(self.model.config.prompt_prefix_ids) + len(tokenize_bare(self, instruction))
        return torch.cat(
            [
                pool(
                    self, run_llm(self, self.processor.list_ids([instruction + text])[0][0])[start:]
                )
                for text in texts
            ]
        )

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        embeds = self.finish(self.embed(body))
        if (count := body.get("dimensions")) is not None:
            embeds = F.normalize(embeds[:, :count], dim=-1)
        if "embedding_types" in body:
            return {"embeddings": {"float": embeds.tolist()}}
        rows: list[Any] = embeds.tolist()
        if body.get("encoding_format") == "base64":
            rows = [
                base64.b64encode(row.numpy().astype(self.base64_dtype).tobytes()).decode()
                for row in embeds
            ]
        data = [
            {"object": "embedding", "index": place, "embedding": row}
            for place, row in enumerate(rows)
        ]
        return {"object": "list", "model": "tiny", "data": data}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgment
    server: Endpoint
    timeout = 5

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append(body)
        server.keys.append(self.headers.get("Authorization"))
        if server.respond(self):
            return
        if self.path not in server.paths:
            return self.send(404, {"detail": "Not Found"})
        if server.api_key and server.keys[-1] != f"Bearer {server.api_key}":
            return self.send(401, {"error": {"message": "Incorrect API key provided"}})
        try:
            return self.send(200, server.answer(body))
        except BadRequestError as error:
            return self.send(400, {"error": {"message": str(error)}})
        except ValueError as error:
            return self.send(500, {"error": {"message": str(error)}})

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            return self.send(404, {"detail": "Not Found"})
        return self.send(200, {"object": "list", "data": [{"id": "tiny"}]})

    def send(self, status: int, content: Any, **headers: str) -> None:
        """Send JSON, or bytes as they are."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def run_llm(endpoint: Endpoint, ids: list[int]) -> Tensor:
    row = torch.tensor([ids])
    with torch.no_grad():
        output = endpoint.model.text_model(
            input_ids=row, attention_mask=torch.ones_like(row), use_cache=False
        )
    return output.last_hidden_state[0]


def pool(endpoint: Endpoint, hidden: Tensor) -> Tensor:
    """Return the embedding of the mean of hidden states, (1, P)."""
    with torch.no_grad():
        return endpoint.model.to_text_embeds(hidden.mean(0, keepdim=True))


def tokenize_bare(endpoint: Endpoint, text: str) -> list[int]:
    """Return the ids of a text without prompt and truncation."""
    return endpoint.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def change_ids(
    change: Callable[[Endpoint, list[str]], list[list[int]]], *, pools_prefix: bool = False
) -> Break:
    """Give the LLM other ids of texts, one text at a time."""

    def apply(endpoint: Endpoint) -> None:
        start = 0 if pools_prefix else len(endpoint.model.config.prompt_prefix_ids)
        endpoint.embed_texts = lambda texts: torch.cat(
            [pool(endpoint, run_llm(endpoint, ids)[start:]) for ids in change(endpoint, texts)]
        )

    return apply


lose_prompt = change_ids(
    lambda endpoint, texts: [tokenize_bare(endpoint, text) for text in texts], pools_prefix=True
)
pool_prefix = change_ids(
    lambda endpoint, texts: endpoint.processor.list_ids(texts)[0], pools_prefix=True
)


@change_ids
def cut_suffix_off(endpoint: Endpoint, texts: list[str]) -> list[list[int]]:
    """Truncate the ids, prompt included, at the end."""
    config = endpoint.model.config
    prefix, suffix = config.prompt_prefix_ids, config.prompt_suffix_ids
    rows = ([*prefix, *tokenize_bare(endpoint, text), *suffix] for text in texts)
    return [ids[: config.max_text_length] for ids in rows]


@change_ids
def ignore_mask(endpoint: Endpoint, texts: list[str]) -> list[list[int]]:
    """Pad batches, and attend to and pool the padding."""
    rows = endpoint.processor.list_ids(texts)[0]
    pad = endpoint.processor.tokenizer.pad_token_id
    return [ids + [pad] * (max(map(len, rows)) - len(ids)) for ids in rows]


def truncate_at(length: int) -> Break:
    """Truncate as the model does, but earlier."""

    def apply(endpoint: Endpoint) -> None:
        endpoint.processor.tokenizer.model_max_length = length

    return apply


def share_state(endpoint: Endpoint) -> None:
    """Keep the texts of a request where the next request overwrites them."""
    honest, state = endpoint.embed_texts, {}

    def embed(texts: list[str]) -> Tensor:
        state["texts"] = texts
        time.sleep(0.02)  # as a queue in front of the model waits
        current = state["texts"]
        return honest((current * len(texts))[: len(texts)])

    endpoint.embed_texts = embed


def alter_texts(embed: Callable[[Callable[[list[str]], Tensor], list[str]], Tensor]) -> Break:

    def apply(endpoint: Endpoint) -> None:
        endpoint.embed_texts = partial(embed, endpoint.embed_texts)

    return apply


def keep_lengths(endpoint: Endpoint) -> None:

    def embed(texts: list[str]) -> Tensor:
        caption_embeds = encode_texts(endpoint.model, endpoint.processor, texts, project=False)
        with torch.no_grad():
            return endpoint.model.project_caption_embeds(caption_embeds)

    endpoint.embed_texts = embed


def set_attributes(**attributes: Any) -> Break:
    return lambda endpoint: [setattr(endpoint, *item) for item in attributes.items()]


def set_pooling(endpoint: Endpoint) -> None:
    endpoint.model.config.text_pooling = "last_token"


def set_causal(endpoint: Endpoint) -> None:
    """Let tokens attend to earlier ones alone."""
    set_attention_direction(endpoint.model.text_model, bidirectional=False)


def set_dtype(dtype: torch.dtype) -> Break:
    return lambda endpoint: endpoint.model.to(dtype)


def serve_tower(endpoint: Endpoint) -> None:
    endpoint.embed_texts = lambda texts: F.normalize(
        encode_texts(endpoint.model, endpoint.processor, texts, project=False), dim=-1
    )
