"""Images that are refused by their header, wherever they come from, and who sets the limits."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_images import write_gif, write_png_header, write_progressive, write_tiff
from PIL import Image
from shared_models import fresh_processor
from tiny import draw_noise

from modeling_llm2clip import ImageLimits, get_image_limits, load_images, set_image_limits
from modeling_llm2clip.__main__ import LINE, main
from modeling_llm2clip.data.images.image_sources import EncodedImage, open_image
from modeling_llm2clip.image_loading_llm2clip import (
    LIMITS_VARIABLE,
    ImageTooLargeError,
    read_image_header,
)
from modeling_llm2clip.serving.image_inputs import decode_sent_image
from modeling_llm2clip.serving.service_results import RequestError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def restore_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start from the default limits, and leave none behind."""
    monkeypatch.setenv(LIMITS_VARIABLE, "{}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


def encode(form: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or draw_noise()).save(buffer, form, **options)
    return buffer.getvalue()


def load_path(content: bytes, folder: Path) -> Any:
    (folder / "a.png").write_bytes(content)
    return load_images(folder / "a.png")


def load_opened(content: bytes, _: Path) -> Any:
    return load_images(Image.open(io.BytesIO(content)))


def load_packed(content: bytes, _: Path) -> Any:
    return load_images(open_image(EncodedImage("a.png", content)))


def load_with_processor(content: bytes, _: Path) -> Any:
    processor = fresh_processor()
    return processor(images=processor.open_image(io.BytesIO(content), name="a.png"))


def load_from_url(content: bytes, _: Path) -> Any:
    with serve(lambda handler: send(handler, content)) as address:
        return load_images(address)


def load_request(content: bytes, _: Path) -> Any:
    try:
        return decode_sent_image(content, get_image_limits())
    except RequestError as error:
        raise ValueError(error.message) from error


WAYS: dict[str, Callable[[bytes, Path], Any]] = {
    "path": load_path,
    "opened": load_opened,
    "packed": load_packed,
    "processor": load_with_processor,
    "URL": load_from_url,
    "request": load_request,
}


class serve:  # noqa: N801  # used as a function
    """A web server on this machine that answers every request in one way."""

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            def log_message(self, *_: Any) -> None:
                """Log nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True

    def __enter__(self) -> str:
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{self.http.server_port}/a.png"

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


def send(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


@pytest.fixture
def nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("an image was decoded")

    for name in ("PngImagePlugin.PngImageFile", "EpsImagePlugin.EpsImageFile",
                 "TiffImagePlugin.TiffImageFile", "JpegImagePlugin.JpegImageFile",
                 "GifImagePlugin.GifImageFile"):  # fmt: skip
        monkeypatch.setattr(f"PIL.{name}.load", fail)


# Name, file, and what the error says.
REFUSED = {
    # 0.7 MB of an RGBA image of this size would take 3.5 GB.
    "a bomb": (write_png_header(13_370, 13_370), "13370 × 13370 pixels are more"),
    "above Pillow's own": (write_png_header(60_000, 60_000), "pixels"),
    "PostScript": (encode("EPS"), "not an image|EPS is not one of"),
    "an icon": (encode("ICO"), "not an image|ICO is not one of"),
    "scans": (write_progressive(101), "more than 100 scans"),
    "scans after segments": (
        write_progressive(101)[:2] + b"\xff\xfe\x00\x02" * 20_000 + write_progressive(101)[2:],
        "more than 100 scans",
    ),
    "a tile": (
        write_tiff(
            16, 16, zlib.compress(b"\0" * 999), {258: 8, 259: 8, 322: 16_000, 323: 16_000}
        ),
        "16000 × 16000 pixels are more than 160",
    ),
    "a frame": (write_gif((4, 4), (13_370, 13_370)), "13370 × 13370 pixels are more than 160"),
    "a strip": (encode("PNG", Image.new("L", (5_000, 1))), "times longer than the other"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.usefixtures("nothing_is_decoded")
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("way", WAYS)
def test_an_image_beyond_the_limits_is_refused_before_it_is_decoded(
    way: str, kind: str, tmp_path: Path
) -> None:
    content, message = REFUSED[kind]
    if way == "opened" and kind in ("above Pillow's own", "an icon"):
        pytest.skip("the caller's own call of Pillow raises, or decodes")
    with pytest.raises(ValueError, match=message):
        WAYS[way](content, tmp_path)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM",
                                  "TIFF", "WEBP"])  # fmt: skip
def test_all_frames_formats_and_ways_within_the_limits_give_equal_pixels(
    way: str, form: str, tmp_path: Path
) -> None:
    several = form in ("GIF", "MPO", "PNG", "TIFF", "WEBP")
    frames = {"save_all": True, "append_images": [draw_noise(seed=9)]} if several else {}
    content = encode(form, **frames)
    opened = Image.open(io.BytesIO(content))
    wanted: Any = opened.convert("RGB")
    found = WAYS[way](content, tmp_path)
    if way == "processor":
        found, wanted = (
            batch["pixel_values"] for batch in (found, fresh_processor()(images=wanted))
        )
    assert np.array_equal(np.asarray(found), np.asarray(wanted))


def test_an_image_at_each_limit_is_decoded() -> None:
    content = write_progressive(100)
    limits = ImageLimits(
        max_megapixels=draw_noise().width * draw_noise().height / 1e6,
        max_image_mb=len(content) / 1e6,
        max_jpeg_scans=100,
        formats=("JPEG",),
    )
    with read_image_header(io.BytesIO(content), name="a", limits=limits) as image:
        assert load_images(image, limits=limits).size == draw_noise().size
    for name, less in (("max_megapixels", limits.max_megapixels * 0.999),
                       ("max_image_mb", limits.max_image_mb * 0.999),
                       ("max_jpeg_scans", 99), ("formats", ("PNG",))):  # fmt: skip
        is_size = name in ("max_megapixels", "max_image_mb")
        error, shown = (ImageTooLargeError, f"raise {name}") if is_size else (ValueError, "^a: ")
        with pytest.raises(error, match=shown):
            read_image_header(io.BytesIO(content), name="a", limits=replace(limits, **{name: less}))  # type: ignore[arg-type]


def test_limits_above_pillows_own_raise_it(monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_png_header(20_000, 20_000)
    set_image_limits(get_image_limits(max_megapixels=400))
    with pytest.warns(Image.DecompressionBombWarning):
        assert read_image_header(io.BytesIO(content), name="a").size == (20_000, 20_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # who sets it, keeps it
    with pytest.raises(ValueError, match="exceeds limit of 2000 pixels"):
        read_image_header(io.BytesIO(content), name="a")


@pytest.mark.slow
def test_limits_reach_threads_and_processes_that_are_started_later(tmp_path: Path) -> None:
    draw_noise(40, 56).save(tmp_path / "a.png")
    code = (
        "import sys; from modeling_llm2clip import load_images\n"
        "try: load_images(sys.argv[1])\n"
        "except ValueError as error: print(error)"
    )

    def report() -> str:
        try:
            load_images(tmp_path / "a.png")
        except ValueError as error:
            return str(error)
        return ""

    set_image_limits(ImageLimits(max_megapixels=0.002))
    with ThreadPoolExecutor(1) as pool:
        assert "more than 0.002 million" in pool.submit(report).result()
    printed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=100,
    ).stdout  # fmt: skip
    assert "more than 0.002 million" in printed


@pytest.mark.parametrize("text", ["300", "{", '{"max_pixels": 3}', '{"max_megapixels": "many"}',
                                  '{"max_jpeg_scans": 0}'])  # fmt: skip
def test_limits_in_the_environment_that_cannot_be_read_are_named(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMITS_VARIABLE, text)
    with pytest.raises(ValueError, match=rf"^{LIMITS_VARIABLE}=.*must be a JSON object"):
        load_images(draw_noise())


def test_a_flag_sets_the_limits_of_a_command_and_keeps_those_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LIMITS_VARIABLE, json.dumps({"max_jpeg_scans": 7}))
    draw_noise(40, 56).save(tmp_path / "a.png")
    words = ["search", "nowhere", "--image", str(tmp_path / "a.png"), "--max-megapixels", "0.002"]
    main(words)
    capsys.readouterr()
    assert get_image_limits() == ImageLimits(max_jpeg_scans=7, max_megapixels=0.002)
    with pytest.raises(ValueError, match=r"56 × 40 pixels are more than 0.002 million"):
        load_images(tmp_path / "a.png")


@pytest.mark.parametrize(
    "command", ["align", "embed", "evaluate", "extract", "index", "search", "serve", "tag", "train"]
)
def test_every_command_that_decodes_images_has_the_flags(command: str) -> None:
    arguments = LINE[command].assemble_argument_collection()
    flags = {name for argument in arguments for name in argument.names}
    assert "--max-megapixels" in flags


def test_an_incomplete_download_is_named_by_its_url() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b"abc")

    with serve(answer) as address:
        error = rf"^{address}: .*cannot be downloaded \(IncompleteRead"
        with pytest.raises(ValueError, match=error):
            load_images(address)


def test_a_download_ends_at_its_limits() -> None:
    """One that never ends, and one that sends a byte now and then."""

    def answer(handler: BaseHTTPRequestHandler, content: bytes | None, pause_s: float) -> None:
        if content is not None:
            handler.send_response(200)
            handler.end_headers()
        with contextlib.suppress(OSError):  # the client leaves
            while True:
                handler.wfile.write(content or b"H")
                handler.wfile.flush()
                threading.Event().wait(pause_s)

    limits = ImageLimits(max_image_mb=0.2, max_download_s=0.2)
    for content, pause_s, message in (
        (b"a" * 2**16, 0, "larger than 0.2 MB"),
        (b"a", 0.01, "more than 0.2 seconds"),
        (None, 0.01, "more than 0.2 seconds"),  # a byte of the header now and then
    ):
        sending = partial(answer, content=content, pause_s=pause_s)
        with serve(sending) as address, pytest.raises(ValueError, match=message):
            load_images(address, limits=limits)


@pytest.mark.parametrize(
    "proxies",
    [
        {},
        {"no_proxy": "example.org"},
        {"https_proxy": "http://127.0.0.1:9"},
        {"http_proxy": "http://127.0.0.1:9", "no_proxy": "localhost,127.0.0.1,[::ffff:10.0.0.1]"},
    ],
)
def test_a_redirect_stays_within_the_web_or_within_this_network(
    proxies: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is as public as its addresses; localhost has one of the web here.

    A proxy decides about the requests that it gets, not about those that go around it.
    """
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    content = io.BytesIO()
    Image.new("RGB", (2, 2)).save(content, "PNG")
    targets: list[str] = []
    asked: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        if handler.path == "/a.png":
            handler.send_response(302)
            handler.send_header("Location", targets[-1])
            handler.end_headers()
        else:
            send(handler, content.getvalue())

    look_up = socket.getaddrinfo

    def pass_for_public(host: Any, *args: Any, **kwargs: Any) -> Any:
        """Resolve localhost to the web, except where a connection is made, which gives a port."""
        if host != "localhost":
            return look_up(host, *args, **kwargs)
        return look_up("127.0.0.1" if args[0] else "8.8.8.8", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", pass_for_public)
    with serve(answer) as address:
        inside = address.replace("/a.png", "/b.png")
        public = address.replace("127.0.0.1", "localhost")
        targets.append(inside)
        assert load_images(address).size == (2, 2)
        targets.append(public.replace("/a.png", "/c.png"))
        assert load_images(public).size == (2, 2)
        for target in (inside, "http://[::ffff:10.0.0.1]/b.png", "ftp://127.0.0.1/b.png"):
            targets.append(target)
            with pytest.raises(ValueError, match=r"it redirects to .*, which is not public"):
                load_images(public)
    assert asked == ["/a.png", "/b.png", "/a.png", "/c.png", "/a.png", "/a.png", "/a.png"]
