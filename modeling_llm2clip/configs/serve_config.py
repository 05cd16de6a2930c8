"""Options for serving a model over HTTP and for comparing an endpoint with its model folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from .config_fields import DeviceConfig, ImageLimitsConfig, Matches
from .encoding_config import BackendConfig

API_KEY_VARIABLE = "LLM2CLIP_API_KEY"
Port = Annotated[int, Interval(ge=0, le=65535)]
ServerSchema = Literal["openai", "chat", "cohere", "jina"]


@dataclass(frozen=True, kw_only=True)
class ServeConfig(BackendConfig, ImageLimitsConfig):
    """Options of `serve`: address, batching and request limits."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 listens on every IPv4 interface."""
    port: Port = 8000
    """Port to listen on; 0 picks a free port."""
    model_name: str | None = None
    """Model name in requests and responses. Default: the last part of MODEL."""
    max_queue: Annotated[int, Interval(ge=1)] = 4096
    """Maximum number of texts and images in progress or queued. Requests beyond this get status 429
    with Retry-After."""
    max_request_mb: Annotated[float, Interval(gt=0)] = 32
    """Maximum size of a request body, in MB. All request bodies in progress may take up to 16 times
    as much; requests beyond this get status 429."""
    max_image_mb: Annotated[float, Interval(gt=0)] = 20
    """Maximum size of an encoded image (the file, not its pixels), in MB."""
    max_megapixels: Annotated[float, Interval(gt=0)] = 50
    """Maximum size of a decoded image, in megapixels."""
    timeout_s: Annotated[float, Interval(gt=0)] = 60
    """Time limit per request in seconds, starting at its first byte. After SIGTERM, running
    requests have the same time to finish."""
    image_urls: bool = False
    """Fetch images from http and https URLs; data URLs always work."""

    @property
    def max_pending_mb(self) -> float:
        """Maximum total size in MB of all request bodies in progress, and of the page's uploads."""
        return 16 * self.max_request_mb

    def list_limits(self) -> dict[str, float]:
        """Return the image limits by name; an image download may take as long as a request."""
        sizes = {"max_image_mb": self.max_image_mb, "max_download_s": self.timeout_s}
        return {**super().list_limits(), **sizes}

    def _list_conflicts(self) -> dict[str, object]:
        image, request = self.max_image_mb, self.max_request_mb
        return {
            **super()._list_conflicts(),
            f"max_image_mb={image:g} exceeds max_request_mb={request:g}. Raise "
            "max_request_mb.": image > request and not self.image_urls,
        }


@dataclass(frozen=True, kw_only=True)
class RayServeConfig(ServeConfig):
    """Options for Ray Serve replicas; `host` and `port` are configured in Ray itself."""

    model: str
    """Model folder, readable from every node, or Hub id."""
    index: str | None = None
    """Database from `llm2clip index`, for `/v1/search`, readable from every node. Default: none, so
    the replicas cannot search."""
    min_replicas: Annotated[int, Interval(ge=1)] = 1
    """Minimum number of replicas; each loads its own copy of the model."""
    max_replicas: Annotated[int, Interval(ge=1)] = 2
    """Maximum number of replicas."""
    target_ongoing_requests: Annotated[float, Interval(gt=0)] = 32
    """Target number of running requests per replica; Ray adds replicas when the load is above it
    and removes them when it is below."""
    max_ongoing_requests: Annotated[int, Interval(ge=1)] = 256
    """Maximum number of running requests per replica; the rest wait at the proxy."""
    num_cpus: Annotated[float, Interval(ge=0)] = 1
    """CPUs that Ray reserves per replica."""
    num_gpus: Annotated[float, Interval(ge=0)] = 0
    """GPUs that Ray reserves per replica."""

    def _list_conflicts(self) -> dict[str, object]:
        return {
            **super()._list_conflicts(),
            f"min_replicas={self.min_replicas} exceeds max_replicas={self.max_replicas}.": (
                self.min_replicas > self.max_replicas
            ),
        }


@dataclass(frozen=True, kw_only=True)
class ServerCheckConfig(DeviceConfig):
    """Options of `check_server`: the endpoint and how to query it."""

    server: (
        Annotated[str, Matches(pattern=r"https?://.+", meaning="an http or https address")] | None
    ) = None
    """Endpoint to compare with the folder, such as http://127.0.0.1:8000. If the URL has no path,
    the standard path of `schema` is appended. Default: none; only the folder is checked."""
    schema: ServerSchema = "openai"
    """Request format of the server: openai (`input`) takes texts only; chat (`messages` with
    `image_url`), cohere (`texts`, `images`) and jina (`input` with objects) also take images."""
    model_name: str | None = None
    """Model name in requests. Default: the only model that the server lists at /v1/models,
    otherwise the folder's name."""
    timeout_s: Annotated[float, Interval(gt=0, le=3600)] = 60.0
    """Time limit per request, in seconds."""

    def _list_conflicts(self) -> dict[str, object]:
        unused = [f"`{name}`" for name in self.list_given() if name not in ("server", "device")]
        return {
            f"{', '.join(unused)} cannot be used without `server`. Set it to the endpoint's "
            "address.": self.server is None and unused
        }
