"""Options of comparing an endpoint with a model folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
    """Check this endpoint against the folder, e.g. http://127.0.0.1:8000; an address without a
    path gets that of `schema`. Default: check the folder itself."""
    schema: ServerSchema = "openai"
    """Requests that the server takes: openai has texts alone (`input`); images go with chat
    (`messages` with `image_url`), cohere (`texts`, `images`) or jina (`input` of objects)."""
    model_name: str | None = None
    """Name of the model in requests. Default: the only one of the server's /v1/models, else the
    folder's name."""
    served_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype that the server is meant to compute in, which sets what may differ. Default: that of
    the folder's weights."""
    api_key_env: Annotated[
        str, Matches(pattern=r"[A-Za-z_]\w*", wanted="the name of an environment variable")
    ] = "LLM2CLIP_API_KEY"
    """Environment variable with the API key, sent as a bearer token if it is set."""
    timeout_s: Annotated[float, Interval(gt=0, le=3600)] = 60.0
    """Seconds that one request may take."""
    concurrency: Annotated[int, Interval(ge=1, le=256)] = 8
    """Requests in flight at once in the check for cross-talk."""

    def find_conflicts(self) -> Iterator[str]:
        """Yield a sentence for options of an endpoint without one."""
        given = [name for name in self.list_given() if name not in ("server", "device")]
        if self.server is None and given:
            yield f"{', '.join(f'`{name}`' for name in given)} needs `server`. Give its address."
