"""Options of comparing an endpoint with a model folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from annotated_types import Interval

from .config_fields import DeviceConfig, Matches

ServerSchema = Literal["openai", "chat", "cohere", "jina"]


@dataclass(frozen=True, kw_only=True)
class ServerCheckConfig(DeviceConfig):
    """Options of `check_server`: the endpoint, and the requests that it gets."""

    server: (
        Annotated[str, Matches(pattern=r"https?://.+", wanted="an http or https address")] | None
    ) = None
    """Endpoint to compare with the folder, e.g. http://127.0.0.1:8000; an address without a path
    gets the path of `schema`. Default: check only the folder."""
    schema: ServerSchema = "openai"
    """Request format of the server: openai is for texts only (`input`); chat (`messages` with
    `image_url`), cohere (`texts`, `images`) and jina (`input` of objects) also take images."""
    model_name: str | None = None
    """Name of the model in requests. Default: the only model in the server's /v1/models, or else
    the folder's name."""
    served_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype that the server should compute in, which sets the tolerance. Default: the dtype of the
    folder's weights."""
    api_key_env: Annotated[
        str, Matches(pattern=r"[A-Za-z_]\w*", wanted="the name of an environment variable")
    ] = "LLM2CLIP_API_KEY"
    """Environment variable with the API key, which is sent as a bearer token if set."""
    timeout_s: Annotated[float, Interval(gt=0, le=3600)] = 60.0
    """Seconds that one request may take."""
    concurrency: Annotated[int, Interval(ge=1, le=256)] = 8
    """Number of concurrent requests in the check for cross-talk."""

    def find_conflicts(self) -> Iterator[str]:
        """Yield a sentence for options of an endpoint without one."""
        given = [
            field.name
            for field in fields(self)
            if field.name not in ("server", "device") and getattr(self, field.name) != field.default
        ]
        if self.server is None and given:
            yield f"{', '.join(f'`{name}`' for name in given)} needs `server`. Give its address."
