"""Options of serving a model over HTTP, and of comparing an endpoint with its folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from .config_fields import DeviceConfig, Matches
from .data_config import ImageLimitsConfig
from .encoding_config import BackendConfig

API_KEY_VARIABLE = "LLM2CLIP_API_KEY"
Port = Annotated[int, Interval(ge=0, le=65535)]
ServerSchema = Literal["openai", "chat", "cohere", "jina"]


@dataclass(frozen=True, kw_only=True)
class ServeConfig(BackendConfig, ImageLimitsConfig):
    """Options of `serve`: batches of requests, and limits."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every IPv4 interface."""
    port: Port = 8000
    """Port to listen on; 0 is any free one."""
    model_name: str | None = None
    """Name of the model in requests and responses. Default: the last part of MODEL."""
    max_queue: Annotated[int, Interval(ge=1)] = 4096
    """Maximum number of texts and images in progress and waiting; further requests get 429 and
    Retry-After."""
    max_request_mb: Annotated[float, Interval(gt=0)] = 32
    """Maximum size of a request body, in MB; the bodies of all requests in progress may have 16
    times as much, further requests get 429."""
    max_image_mb: Annotated[float, Interval(gt=0)] = 20
    """Maximum size of an encoded image, in MB."""
    max_megapixels: Annotated[float, Interval(gt=0)] = 50
    """Maximum size of a decoded image, in millions of pixels."""
    timeout_s: Annotated[float, Interval(gt=0)] = 60
    """Seconds that a request may take from its first byte; after SIGTERM, running requests have as
    long to finish."""
    image_urls: bool = False
    """Fetch images from http and https URLs; data URLs always work."""

    @property
    def max_pending_mb(self) -> float:
        """Maximum size of the bodies of all requests in progress, and of the page's uploads."""
        return 16 * self.max_request_mb

    def list_limits(self) -> dict[str, float]:
        """Return the limits of images by their names; a download ends with its request."""
        sizes = {"max_image_mb": self.max_image_mb, "max_download_s": self.timeout_s}
        return {**super().list_limits(), **sizes}

    def _list_conflicts(self) -> dict[str, object]:
        image, request = self.max_image_mb, self.max_request_mb
        return {
            **super()._list_conflicts(),
            f"max_image_mb={image:g} does not fit into max_request_mb={request:g}. Raise the "
            "latter.": image > request and not self.image_urls,
        }


@dataclass(frozen=True, kw_only=True)
class RayServeConfig(ServeConfig):
    """Options of replicas under Ray Serve, which sets `host` and `port` itself."""

    model: str
    """Folder or Hub id of the model, readable by every node."""
    index: str | None = None
    """Image index that `/v1/search` searches, readable by every node. Default: none."""
    min_replicas: Annotated[int, Interval(ge=1)] = 1
    """Minimum number of replicas, each of which loads the model."""
    max_replicas: Annotated[int, Interval(ge=1)] = 2
    """Maximum number of replicas."""
    target_ongoing_requests: Annotated[float, Interval(gt=0)] = 32
    """Target number of running requests per replica; Ray adds replicas above it and removes them
    below it."""
    max_ongoing_requests: Annotated[int, Interval(ge=1)] = 256
    """Maximum number of running requests per replica; further ones wait at the proxy."""
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
    """Options of `check_server`: the endpoint, and the requests that it gets."""

    server: (
        Annotated[str, Matches(pattern=r"https?://.+", meaning="an http or https address")] | None
    ) = None
    """Endpoint to compare with the folder, e.g. http://127.0.0.1:8000; an address without a path
    gets the path of `schema`. Default: check only the folder."""
    schema: ServerSchema = "openai"
    """Request format of the server: openai is for texts only (`input`); chat (`messages` with
    `image_url`), cohere (`texts`, `images`) and jina (`input` of objects) also take images."""
    model_name: str | None = None
    """Name of the model in requests. Default: the only model in the server's /v1/models, or else
    the folder's name."""
    timeout_s: Annotated[float, Interval(gt=0, le=3600)] = 60.0
    """Seconds that one request may take."""

    def _list_conflicts(self) -> dict[str, object]:
        unused = [f"`{name}`" for name in self.list_given() if name not in ("server", "device")]
        return {
            f"{', '.join(unused)} needs `server`. Give its address.": self.server is None and unused
        }
