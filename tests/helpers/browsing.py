"""A real browser for tests of pages: the system's Chromium, driven by Playwright."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None
)
WIDTHS = {"phone": (390, 844), "tablet": (768, 1024), "desktop": (1280, 800), "wide": (1920, 1080)}
WAIT_MS = 30_000  # decides nothing but how long a failure takes

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium on this machine (apt-get install chromium)"
)
# What the page's own code does on a drop: a file comes in a DataTransfer.
_DROP = """
([selector, name, type, content]) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, { type }));
    for (const kind of ["dragenter", "dragover", "drop"]) {
        document.querySelector(selector).dispatchEvent(
            new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true })
        );
    }
}
"""


_DRAWN_TWICE = "new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)))"
# Of a list of hits: how far it is from filling its place, and the captions that overlap an image.
_MEASURE_HITS = """
(list) => {
    const box = (element) => element.getBoundingClientRect();
    const entries = [...list.querySelectorAll("li")].map(box);
    const images = [...list.querySelectorAll("img")].map(box);
    const overlap = (a, b) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0.5 &&
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.5;
    const captions = [...list.querySelectorAll(".caption, .caption *")];
    return {
        top: entries[0].top,
        unused: box(list.parentElement).right - Math.max(...entries.map((entry) => entry.right)),
        covering: captions.filter((one) => images.some((image) => overlap(box(one), image))).length,
        narrow: images.filter((image) => image.width < 100).length,
    };
}
"""


def measure_hits(page: Any) -> dict[str, float]:
    """Return where hits begin, their unused pixels, covering captions and narrow images."""
    found: dict[str, float] = page.locator(".hits").first.evaluate(_MEASURE_HITS)
    return found


@contextmanager
def open_browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


class Visit:
    """A page in a window of its own, and what it asked for and complained of."""

    def __init__(self, browser: Any, url: str, *, width: str = "desktop", **options: Any) -> None:
        size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
        self.context = browser.new_context(viewport=size, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.outside: list[str] = []
        self.errors: list[str] = []
        self.height = size["height"]
        self.page.on("request", self._note_request)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url, wait_until="domcontentloaded")
        self.page.get_by_role("tab", name="API").wait_for()

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the window; nothing may have left the machine, and no script failed."""
        self.context.close()
        assert not self.outside
        assert not self.errors

    def _note_request(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname != "127.0.0.1":
            self.outside.append(request.url)

    def fill(self, name: str, text: str) -> None:
        """Type a text, again if Gradio, still mounting the box, puts its first value back."""
        box = self.page.locator(f"#{name} textarea, #{name} input").first
        for _ in range(20):
            box.fill(text)
            self.page.evaluate(_DRAWN_TWICE)
            if box.input_value() == text:
                return
        raise AssertionError(f"#{name} keeps {box.input_value()!r} instead of {text!r}")

    def drop(self, name: str, file: Path, media_type: str = "image/png") -> None:
        """Drop a file onto the image of this id."""
        content = base64.b64encode(file.read_bytes()).decode()
        selector = f"#{name} button"
        self.page.locator(selector).first.wait_for()
        self.page.evaluate(_DROP, [selector, file.name, media_type, content])

    def press(self, name: str) -> None:
        self.page.locator(f"#{name}").click()

    def read_error(self) -> str:
        """Wait for an error, close it, and return its text."""
        shown = self.page.get_by_test_id("toast-text").first
        shown.wait_for()
        text: str = shown.inner_text()
        self.page.get_by_test_id("toast-close").first.click()
        shown.wait_for(state="detached")
        return text

    def overflows(self) -> bool:
        return overflows(self.page)


def overflows(page: Any) -> bool:
    """Whether a page is wider than its window."""
    wide: bool = page.evaluate(
        "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    )
    return wide
