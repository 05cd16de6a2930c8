"""Take the screenshot of the server's page that the documents show, with the embedded photographs.

    python examples/scripts/screenshot_page.py aligned/model docs/images/page.png

The model was trained on photographs, as in the README. The script indexes those of
`examples/data`, serves them, and looks at the page with the system's Chromium
(`apt-get install chromium`, `pip install playwright`).
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from PIL import Image
from playwright.sync_api import sync_playwright

from modeling_llm2clip import ImageIndex
from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.data.records.record_loading import find_example_data
from modeling_llm2clip.serving.app import bind_socket, create_app
from modeling_llm2clip.serving.demo_page import add_demo_page
from modeling_llm2clip.serving.service import EmbeddingService

_QUERY = "a drink in a white cup with a spoon"
_WIDTH, _HEIGHT = 1100, 700
_COLORS = 192
_WAIT_MS = 60_000


@contextmanager
def serve(service: EmbeddingService) -> Iterator[str]:
    """Serve a service with its page on loopback.

    Args:
        service: The service that answers.

    Yields:
        The address.
    """
    bound = bind_socket(ServeConfig(port=0))
    app = create_app(service, page=add_demo_page)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def take_screenshot(url: str, query: str) -> Image.Image:
    """Search on the page, and take a screenshot.

    Args:
        url: Address of the page.
        query: The text to search for.

    Returns:
        The window.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome")
        )
        page = browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT})
        page.set_default_timeout(_WAIT_MS)
        page.goto(url)
        page.locator("#query textarea, #query input").first.fill(query)
        page.locator("#search-button").click()
        page.locator("#hits img").nth(11).wait_for()
        page.wait_for_function(
            "[...document.querySelectorAll('#hits img')].every((image) => image.naturalWidth > 0)"
        )
        page.mouse.move(0, 0)
        content = page.screenshot(animations="disabled")
        browser.close()
    return Image.open(io.BytesIO(content)).convert("RGB")


def main() -> None:
    """Index, serve, look, and write the image."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", type=Path, help="folder of a trained model")
    parser.add_argument("output", type=Path, help="PNG file to write")
    parser.add_argument("--query", default=_QUERY, help="text to search for")
    arguments = parser.parse_args()
    images = find_example_data() / "photographs" / "images"
    with tempfile.TemporaryDirectory() as scratch:
        ImageIndex.build(arguments.model, images, Path(scratch, "index"))
        service = EmbeddingService.open(
            arguments.model, ServeConfig(model_name="my-photo-model"), index=f"{scratch}/index"
        )
        with serve(service) as url:
            window = take_screenshot(url, arguments.query)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    window.quantize(_COLORS, dither=Image.Dither.NONE).save(arguments.output, optimize=True)
    print(f"Wrote {arguments.output}, {arguments.output.stat().st_size / 1024:.0f} KB.")


if __name__ == "__main__":
    main()
