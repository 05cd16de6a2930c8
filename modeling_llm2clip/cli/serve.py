"""`llm2clip serve`."""

from __future__ import annotations

import ipaddress
import os
import sys
from functools import partial

from .._extras import ONNX_RUNTIME, PAGE, SERVE, list_needs_of_index, require
from ..configs.serve_config import API_KEY_VARIABLE, ServeConfig
from .command import command
from .options import require_model, use_device


@command(
    group="Use",
    examples=(
        "llm2clip serve aligned/model --index my-index",
        "llm2clip serve for-onnx --backend onnx --text-weights int8",
        "llm2clip serve aligned/model --host 0.0.0.0 --image-urls --max-megapixels 20",
    ),
)
def serve(
    model: str, /, *, index: str | None = None, page: bool = True, config: ServeConfig
) -> int:
    """Serves a model over HTTP with OpenAI's embeddings API for texts and images.

    If LLM2CLIP_API_KEY is set in the environment, requests must send that key, except to /health.
    After SIGTERM, running requests are finished before the server exits.

    Args:
        model: Hub id or folder of an LLM2CLIP model; with --backend onnx, of its ONNX export.
        index: Database from llm2clip index, for /v1/search and the page. Default: none, so the
            server cannot search.
        page: Serve a web page at / for searching and classifying images.
        config: Address, batching and request limits.
    """
    needs = [*SERVE, *([PAGE] if page else []), *list_needs_of_index(index)]
    if config.backend == "onnx":
        require(*needs, ONNX_RUNTIME)
    else:
        require_model(model, *needs)
    from ..search.index_database import require_place
    from ..serving.app import bind_socket, create_app, run_server

    if index is not None:
        require_place(index)
    with bind_socket(config) as bound:
        use_device(config.device, config.precision)
        from ..serving.service import EmbeddingService

        _warn_if_open(config.host)
        service = EmbeddingService.open(model, config, index=index)
        if far := service.describe_far_images():
            print(f"{index}: {far}", file=sys.stderr)
        if page:
            from ..serving.demo_page import add_demo_page  # imports gradio, which takes seconds
        app = create_app(service, page=add_demo_page if page else None)
        run_server(app, bound, config, on_listen=partial(_report_start, service.model_name, page))
    return 0


def _warn_if_open(host: str) -> None:
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not is_local and API_KEY_VARIABLE not in os.environ:
        print(
            f"{API_KEY_VARIABLE} is not set, so anyone who can reach {host} can use this server.",
            file=sys.stderr,
        )


def _report_start(model_name: str, has_page: bool, url: str) -> None:
    page = " (web page)" if has_page else ""
    print(f"Serving {model_name} on {url}{page}; API documentation: {url}/docs", flush=True)
