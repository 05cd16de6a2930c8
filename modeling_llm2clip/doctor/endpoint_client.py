"""A client for embedding endpoints that speaks the common request schemas."""

from __future__ import annotations

import http.client
import io
import json
import time
import urllib.request
from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .._suggestions import counted
from ..configs.serve_config import API_KEY_VARIABLE, ServerCheckConfig

_MAX_REPLY = 2**26  # bytes
_CHUNK_BYTES = 2**16
_MAX_TRIES = 5
_MAX_WAIT_S = 10.0
_SHOWN = 200  # characters of a reply


class EndpointError(ValueError):
    """An endpoint returned no embeddings; the message quotes its reply.

    Attributes:
        status: HTTP status of the reply; None if there was no reply.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class EndpointClient:
    """Sends texts and images to an endpoint and reads the embeddings in its replies.

    It is thread-safe.

    Args:
        config: The endpoint's URL, request schema and limits; `config.server` must be set.
        model_name: Name of the model in requests.
        api_key: Bearer token; empty for none.

    Raises:
        ValueError: The endpoint's URL has no host.
    """

    def __init__(self, config: ServerCheckConfig, *, model_name: str, api_key: str = "") -> None:
        self.schema = config.schema
        self.timeout_s = config.timeout_s
        self.model_name = model_name
        self._headers: dict[str, Any] = {
            "User-Agent": "llm2clip-doctor",
            "Content-Type": "application/json",
        }
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}".encode()
        self._opener = urllib.request.build_opener(_AsIs)
        address = urlsplit(config.server or "")
        if not address.hostname:
            raise ValueError(f"server={config.server!r} has no host. Use http://HOST:PORT.")
        if address.username is not None:
            raise ValueError(
                f"The address of {address.hostname} contains a user name or password. Set the "
                f"environment variable {API_KEY_VARIABLE} to the key instead."
            )
        self.base = f"{address.scheme}://{address.netloc}"
        path, query = address.path.rstrip("/"), f"?{address.query}" if address.query else ""
        if path in ("", "/v1", "/v2"):
            path, query = "/v2/embed" if self.schema == "cohere" else "/v1/embeddings", ""
        self.url = self.base + path + query

    def find_model_name(self) -> str | None:
        """Return the name of the model that the server lists; None unless there is exactly one."""
        try:
            [model] = self._send(f"{self.base}/v1/models", None)["data"]
            return str(model["id"])
        except (LookupError, TypeError, ValueError):  # ValueError includes EndpointError
            return None

    def embed(self, inputs: Sequence[str | Image.Image], **options: Any) -> Tensor:
        """Embed N texts or images as (N, width) float32; the jina schema can mix texts and images.

        All inputs go into one request, but the chat schema takes only one image per request.
        """
        values = [value if isinstance(value, str) else _to_data_url(value) for value in inputs]
        are_images = [not isinstance(value, str) for value in inputs]
        body: dict[str, Any] = {"model": self.model_name, "encoding_format": "float"}
        if self.schema == "jina":
            names = ["image" if is_image else "text" for is_image in are_images]
            body["input"] = [{name: value} for name, value in zip(names, values, strict=True)]
        elif self.schema == "cohere":
            name = "images" if any(are_images) else "texts"
            body = {"model": self.model_name, "embedding_types": ["float"], name: values}
        elif not any(are_images):
            body["input"] = values
        elif len(values) > 1:
            return torch.cat([self.embed([value], **options) for value in inputs])
        else:
            part = {"type": "image_url", "image_url": {"url": values[0]}}
            body["messages"] = [{"role": "user", "content": [part]}]
        rows = _find_rows(self._send(self.url, {**body, **options}))
        if len(rows) != len(inputs):
            count = counted(len(inputs), "input")
            raise EndpointError(f"The reply has {len(rows)} embeddings for {count}.")
        return _to_tensor(rows)

    def _send(self, url: str, body: dict[str, Any] | None) -> Any:
        """Send a request (a GET if there is no body) and return the JSON reply.

        The request is retried if the server replies 429 or 503.
        """
        content = None if body is None else json.dumps(body).encode()
        for number in range(1, _MAX_TRIES + 1):
            end = time.monotonic() + self.timeout_s
            try:
                request = urllib.request.Request(url, content, self._headers)
                with self._opener.open(request, timeout=self.timeout_s) as reply:
                    received = _read(reply, end=end)
            except (OSError, http.client.HTTPException, UnicodeError, OverflowError) as error:
                if time.monotonic() >= end:
                    raise EndpointError(
                        f"{url} sent no complete reply within {self.timeout_s:g} seconds. Raise "
                        "--timeout-s, or check what the server is waiting for."
                    ) from error
                text = str(error) or type(error).__name__
                raise EndpointError(
                    f"{url} cannot be reached ({text}). Start the server, or correct the address."
                ) from error
            if reply.status not in (429, 503) or number == _MAX_TRIES:
                break
            seconds = reply.headers.get("Retry-After", "")
            delay = float(seconds) if seconds.isdecimal() else 0.2 * 2**number
            time.sleep(min(max(delay, 0.1), _MAX_WAIT_S))
        if reply.status // 100 != 2:
            raise _describe_status(url, reply, received)
        return _parse_json(received)


class _AsIs(urllib.request.HTTPErrorProcessor):
    """Returns error replies, and does not follow redirects, which could leak the API key."""

    def http_response(self, request: Any, response: Any) -> Any:  # noqa: ARG002
        return response

    https_response = http_response


def _parse_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):  # invalid JSON, invalid encoding, or nested too deeply
        raise EndpointError(
            f"The reply is not JSON: {content[:_SHOWN]!r}. Check that the address is an embeddings "
            "endpoint."
        ) from None


def _read(reply: Any, *, end: float) -> bytes:
    """Read a reply; refuse one that takes too long or is too large."""
    content = bytearray()
    while chunk := reply.read1(_CHUNK_BYTES):
        content += chunk
        if len(content) > _MAX_REPLY:
            raise EndpointError(f"The reply is larger than {_MAX_REPLY:,} bytes.")
        if time.monotonic() > end:
            raise TimeoutError
    return bytes(content)


def _describe_status(url: str, reply: Any, content: bytes) -> EndpointError:
    by_key = f" Set the environment variable {API_KEY_VARIABLE} to the server's API key."
    by_address = " Check the address of the embeddings endpoint, and --schema."
    by_waiting = f" It did so {_MAX_TRIES} times: it is overloaded or not ready."
    remedies = {
        401: by_key, 403: by_key, 404: by_address, 405: by_address,
        429: by_waiting, 503: by_waiting,
    }  # fmt: skip
    remedy = remedies.get(reply.status, "")
    if reply.status // 100 == 3 and "Location" in reply.headers:
        remedy = f" It redirects to {reply.headers['Location']!r}. Use that address."
    message = " ".join(content.decode(errors="replace").split())[:_SHOWN]
    return EndpointError(
        f"{url} answered {reply.status} {reply.reason}: {message}.{remedy}",
        status=reply.status,
    )


def _find_rows(content: Any) -> list[Any]:
    """Return the embeddings in a reply that has OpenAI's or Cohere's format."""
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        rows = content["data"]
        if not all(isinstance(row, dict) and "embedding" in row for row in rows):
            raise EndpointError("An entry in the reply's `data` has no `embedding`.")
        places = [row.get("index", number) for number, row in enumerate(rows)]
        if places != list(range(len(rows))):
            raise EndpointError(
                f"The reply's `data` is not in input order: its `index` is {places[:8]}. Clients "
                "ignore `index`, so they would mix up the embeddings."
            )
        return [row["embedding"] for row in rows]
    rows = content.get("embeddings") if isinstance(content, dict) else None
    if isinstance(rows, dict):
        rows = rows.get("float", rows.get("float_"))
    if isinstance(rows, list):
        return rows
    keys = sorted(content) if isinstance(content, dict) else type(content).__name__
    raise EndpointError(f"The reply has neither `data` nor `embeddings`, but {keys}.")


def _to_tensor(rows: list[Any]) -> Tensor:
    """Convert rows, as numbers or as base64 of little-endian float32, to (N, width) float32."""
    arrays = []
    for row in rows:
        try:
            is_text = isinstance(row, str)
            values = np.frombuffer(b64decode(row, validate=True), "<f4") if is_text else row
            array = np.asarray(values)
        except ValueError:  # neither base64 of float32 nor a plain list
            array = np.empty(0)
        if array.ndim != 1 or not array.size or array.dtype.kind not in "if":
            raise EndpointError(
                "An embedding is neither a list of numbers nor base64 of float32: "
                f"{str(row)[:_SHOWN]}."
            )
        with np.errstate(over="ignore"):  # an overflow becomes infinity, which is reported later
            arrays.append(array.astype(np.float32))
    if len(widths := {len(array) for array in arrays}) > 1:
        raise EndpointError(f"The reply's embeddings have different widths: {sorted(widths)}.")
    return torch.from_numpy(np.stack(arrays))


def _to_data_url(image: Image.Image) -> str:
    """Encode an image as PNG, with its EXIF data."""
    file = io.BytesIO()
    exif = image.getexif()
    # A higher level would barely shrink the noise in photographs.
    image.save(file, format="PNG", compress_level=1, **({"exif": exif} if exif else {}))
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
