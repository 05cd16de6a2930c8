"""Builds the web page at `/`: search, zero-shot classification and links to the API."""

from __future__ import annotations

import asyncio
import atexit
import html
import os
import re
import shutil
import tempfile
from collections.abc import Coroutine
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

# Gradio reads this variable on import; with analytics enabled, it would contact other hosts.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Match, Mount

from .._suggestions import counted
from ..data.images.image_sources import register_heif_reader
from ..search.search_results import (
    HITS_CSS,
    PAGE_SIDE,
    PageImage,
    SearchResult,
    note_rank,
    read_thumbnail,
    to_data_url,
    write_hits,
)
from .request_guard import API_PREFIXES
from .service import EmbeddingService, Input
from .service_results import RequestError

T = TypeVar("T")

_MAX_TOP_K, _TOP_K = 48, 12
_MAX_LABELS = 200
_RUNNING, _WAITING = 16, 64  # requests from the page
_CLEANED_EVERY_S, _KEPT_S = 600, 3600  # uploads
_TEMPLATE = "a photo of a {}"
_BEFORE_SEARCH = "Describe what to look for, or drop an image. The best matches will appear here."
# On a phone the columns become one: text and button, then the hits, then a smaller image box and
# the options.
_CSS = f"""{HITS_CSS}
footer {{ display: none !important; }}
#heading h1 {{ margin: 0; }}
#heading p {{ margin: 0.25rem 0 0; overflow-wrap: anywhere; }}
#hits .html-container, #hits {{ padding: 0; }}
#hits-note .wrap:has(.error) {{ display: none; }}  /* the error appears at the top of the window */
@media (max-width: 640px) {{
  .gradio-container main {{ padding: 1rem !important; }}
  #search-parts > .column {{ display: contents; }}
  #search-parts > .column > * {{ flex: 0 0 100%; }}
  #query-image, #more {{ order: 1; }}
  #query-image, #image {{ height: 9rem !important; }}
  #query-image:not(:has(img)), #image:not(:has(img)) {{ height: 5rem !important; }}
  #query-image .source-selection, #image .source-selection, #query-image .icon-wrap,
    #image .icon-wrap {{ display: none; }}
}}
"""
_API = """
- [All routes](docs), with examples
- [OpenAPI](openapi.json), for generated clients
- [Metrics](metrics), for Prometheus
- [Health](health), for load balancers

OpenAI's clients work with this server's address plus `/v1`:

```python
from openai import OpenAI

client = OpenAI(base_url="http://HOST:PORT/v1", api_key="…")
client.embeddings.create(model={model!r}, input=["two red apples"])
```
"""


@lru_cache(maxsize=1024)
def encode_thumbnail(image: Path, sha256: str) -> str:
    """Encode an image's thumbnail as a data URL; raise ValueError if the file's content changed."""
    return to_data_url(read_thumbnail(image, sha256, PAGE_SIDE))


class DemoPage:
    """Passes requests from the page to a service and renders the results."""

    def __init__(self, service: EmbeddingService) -> None:
        self.service = service

    async def search(
        self,
        text: str | None,
        image: str | None,
        negative: str | None,
        top_k: float | None,
        threshold: float | None,
        where: str | None,
    ) -> tuple[str, str]:
        """Find images by text, image or both; return the hits as HTML, and a summary."""
        queries: list[Input] = [text] if text and text.strip() else []
        if image is not None:
            queries.append(Path(image).read_bytes())
        if not queries:
            raise _show("Describe what to look for, or drop an image.")
        count = min(max(int(top_k or _TOP_K), 1), _MAX_TOP_K)
        condition = (where or "").strip() or None

        async def find() -> tuple[str, str]:
            images = await self.service.search(
                [queries],
                negative=[negative] if negative and negative.strip() else [],
                top_k=count,
                threshold=threshold,
                where=condition,
            )
            hits, summary = await asyncio.to_thread(self._list_hits, images.results[0])
            limit = self.service.encoder.max_text_length
            note = f" A text was truncated to the model's limit of {limit} tokens."
            return hits, summary + note * len(images.truncated)

        return await self._await(find())

    async def _await(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a result with the API's time limit, and show the service's errors on the page."""
        seconds = self.service.config.timeout_s
        try:
            return await asyncio.wait_for(work, seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise _show(f"The request took more than {seconds:g} s. Try again later.") from None
        except (RequestError, ValueError) as error:
            raise _show(str(error)) from error

    def _list_hits(self, result: SearchResult) -> tuple[str, str]:
        shown: list[PageImage] = []
        num_gone = 0
        ranked = zip(result.hits, result.columns, strict=True)
        for rank, ((path, cosine), columns) in enumerate(ranked, start=1):
            try:
                address = encode_thumbnail(path, columns["sha256"])
            except ValueError:
                num_gone += 1
                continue
            shown.append(PageImage(columns["path"], address, note_rank(rank, cosine)))
        assert self.service.index is not None
        total = counted(len(self.service.index), "image")
        summary = result.note or f"{len(result.hits)} of {total}, best first."
        if num_gone:
            summary += f" {num_gone} cannot be shown: moved or changed since indexing."
        return write_hits(shown), summary

    async def classify(
        self, image: str | None, labels: str | None, template: str | None
    ) -> dict[str, float]:
        if image is None:
            raise _show("Drop an image first.")
        names = [name for name in re.split(r"[,\n]", labels or "") if name.strip()]
        if not 0 < len(names) <= _MAX_LABELS:
            raise _show(f"Enter 1 to {_MAX_LABELS} labels, separated by commas.")
        classified = await self._await(
            self.service.classify(
                [Path(image).read_bytes()],
                [name.strip() for name in names],
                templates=[(template or "").strip() or "{}"],
            )
        )
        if classified.truncated:
            raise _show(
                f"With the prompt, {names[classified.truncated[0]].strip()!r} exceeds the model's "
                f"limit of {self.service.encoder.max_text_length} tokens. Shorten it."
            )
        return {tag.label: tag.probability for tag in classified.tags[0]}


def add_demo_page(app: FastAPI, service: EmbeddingService) -> None:
    """Mount the page at `/`, after all other routes of the application."""
    register_heif_reader()
    folder = _make_upload_folder()
    gr.mount_gradio_app(
        app,
        _build_page(DemoPage(service)),
        path="/",
        theme=_make_theme(),
        css=_CSS,
        footer_links=[],
        max_file_size=int(service.config.max_image_mb * 1e6),
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
    )
    mounted = app.router.routes.pop()
    assert isinstance(mounted, Mount)
    max_bytes = int(service.config.max_pending_mb * 1e6)
    app.router.routes.append(_PageMount(mounted.app, folder, max_bytes=max_bytes))


class _PageMount(Mount):
    """Mounts the page for every path outside the API, and limits the total size of uploads."""

    def __init__(self, app: Any, folder: Path, *, max_bytes: int) -> None:
        super().__init__("/", app=app)
        self._folder = folder
        self._max_bytes = max_bytes

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        """Forward a request; refuse an upload if earlier uploads exceed the size limit."""
        if scope["path"].endswith("/upload"):
            await asyncio.to_thread(self._require_room)
        await super().handle(scope, receive, send)

    def _require_room(self) -> None:
        uploads = self._folder.glob("*/*")
        if sum(file.stat().st_size for file in uploads if file.is_file()) > self._max_bytes:
            raise RequestError(
                429,
                "Too many images were uploaded recently. Try again later.",
                code="uploads_full",
                retry_after_s=_CLEANED_EVERY_S,
            )

    def matches(self, scope: Any) -> tuple[Match, Any]:
        if scope.get("path", "").startswith(API_PREFIXES):
            return Match.NONE, {}
        return super().matches(scope)


@cache
def _make_upload_folder() -> Path:
    """Create a private folder for this process's uploads; the folder is deleted on exit."""
    folder = Path(tempfile.mkdtemp(prefix="llm2clip-page-"))
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _show(message: str) -> gr.Error:
    """Create an error message that stays on the page until dismissed; the text is HTML-escaped."""
    return gr.Error(html.escape(message), duration=None, print_exception=False)


def _make_theme() -> gr.themes.Base:
    """Create a theme with system fonts and a contrast ratio of at least 4.5:1."""
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return theme.set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        color_accent="*primary_600",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def _build_page(page: DemoPage) -> gr.Blocks:
    service = page.service
    blocks = gr.Blocks(title="LLM2CLIP", delete_cache=(_CLEANED_EVERY_S, _KEPT_S))
    with blocks:
        gr.Markdown(f"# LLM2CLIP\n\n{_describe(service)}", elem_id="heading")
        if service.index is not None:
            with gr.Tab("Search", id="search"):
                _add_search(page)
        if service.encoder.logit_rule is not None:
            with gr.Tab("Classify", id="classify"):
                _add_classification(page)
        with gr.Tab("API", id="api"):
            if service.index is None:
                gr.Markdown("To enable image search, start the server with `--index DB`.")
            gr.Markdown(_API.replace("{model!r}", repr(service.model_name)))
    # When mounted, Gradio copies any local file or URL named in a request into the folder it
    # serves, for every component.
    for block in blocks.blocks.values():
        block.async_move_resource_to_block_cache = partial(_take_upload, block)
    blocks.queue(default_concurrency_limit=_RUNNING, max_size=_WAITING)
    return blocks


def _describe(service: EmbeddingService) -> str:
    parts = [f"**{_escape(service.model_name)}**"]
    if service.index is not None:
        parts.append(f"{counted(len(service.index), 'image')} to search")
    return " · ".join(parts)


def _add_search(page: DemoPage) -> None:
    index = page.service.index
    assert index is not None
    with gr.Row(elem_id="search-parts"):
        with gr.Column(scale=1, min_width=280):
            text = gr.Textbox(
                label="What to look for", placeholder="two red apples", elem_id="query"
            )
            button = gr.Button("Search", variant="primary", elem_id="search-button")
            image = _make_image("Or a similar image", height=200, elem_id="query-image")
            with gr.Accordion("More", open=False, elem_id="more"):
                negative = gr.Textbox(label="Not", placeholder="people", elem_id="negative")
                top_k = gr.Slider(1, _MAX_TOP_K, value=_TOP_K, step=1, label="Images")
                threshold = gr.Number(
                    value=None, label="Lowest cosine", minimum=-1, maximum=1, step=0.01,
                    elem_id="threshold",
                )  # fmt: skip
                where = gr.Textbox(
                    label="Filter",
                    placeholder="width > 1000 AND path LIKE '2024/%'",
                    info=f"Columns: {', '.join(index.columns)}",
                    elem_id="filter",
                )
        with gr.Column(scale=3, min_width=280):
            note = gr.Markdown(_BEFORE_SEARCH, elem_id="hits-note")
            hits = gr.HTML(elem_id="hits", apply_default_css=False, js_on_load=None)
    gr.on(
        [button.click, text.submit, image.upload],
        page.search,
        [text, image, negative, top_k, threshold, where],
        [hits, note],
        api_name=False,
        show_progress_on=note,
    )


def _add_classification(page: DemoPage) -> None:
    with gr.Row():
        with gr.Column(min_width=280):
            image = _make_image("Image", height=280, elem_id="image")
            labels = gr.Textbox(
                "cat, dog, bird, person, car, building, food, plant",
                label="Labels",
                info="Separated by commas",
                lines=2,
                elem_id="labels",
            )
            template = gr.Textbox(
                _TEMPLATE, label="Prompt", info="{} is replaced by the label", elem_id="template"
            )
            button = gr.Button("Classify", variant="primary", elem_id="classify-button")
        with gr.Column(min_width=280):
            scores = gr.Label(label="Labels", num_top_classes=20, elem_id="scores")
    gr.on(
        [button.click, labels.submit, template.submit, image.upload],
        page.classify,
        [image, labels, template],
        scores,
        api_name=False,
    )


def _make_image(label: str, *, height: int, elem_id: str) -> gr.Image:
    """Create an image component that passes uploaded files through unchanged.

    By default, Gradio would decode and convert uploaded files. This is a function because, for a
    subclass of `gr.Image`, Gradio would write a stub file next to this module.
    """
    image = gr.Image(
        label=label,
        type="filepath",
        sources=["upload", "clipboard"],
        placeholder="Drop an image, or choose one",
        height=height,
        elem_id=elem_id,
    )

    def find_upload(payload: Any) -> str | None:
        return None if payload is None else _require_upload(payload.path, image.GRADIO_CACHE)

    image.preprocess = find_upload
    return image


async def _take_upload(block: Any, path: str | Path | None) -> str | None:
    return None if path is None else _require_upload(path, block.GRADIO_CACHE)


def _require_upload(path: str | Path, folder: str) -> str:
    file = Path(path).resolve()
    if not (file.is_relative_to(Path(folder).resolve()) and file.is_file()):
        raise _show("This is not an upload. Drop the file itself; paths and URLs are not read.")
    return str(file)


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~-])", r"\\\1", text)
