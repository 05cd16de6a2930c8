"""Images from the web: fetched from where it is allowed, and from nowhere else."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.image_loading_llm2clip import is_public
from modeling_llm2clip.serving.image_inputs import ImageInputs
from modeling_llm2clip.serving.service_results import RequestError
from modeling_llm2clip.serving.url_fetching import UrlFetcher

LOOPBACK = ("127.0.0.0/8", "::1/128")
CONTENT = bytes(range(256)) * 40


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name, _, rest = self.path.lstrip("/").partition("/")
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        if name == "moved":
            self.answer(302, b"", Location=rest)
        elif name == "silent":
            self.server.go.wait(5)  # type: ignore[attr-defined]
        elif name == "chunked":
            self.protocol_version = "HTTP/1.1"
            parts = (CONTENT[start : start + 1000] for start in range(0, len(CONTENT), 1000))
            chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
            self.answer(200, chunks + b"0\r\n\r\n", **{"Transfer-Encoding": "chunked"})
        elif name == "image":
            self.answer(200, CONTENT, **{"Content-Length": str(len(CONTENT))})
        elif name == "rubbish":
            self.wfile.write(b"\x00\x01 what\r\n\r\n")
        else:
            self.send_error(404)

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def web() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.paths, server.go = [], threading.Event()  # type: ignore[attr-defined]
    server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.go.set()  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def allowing(networks: Sequence[str] = LOOPBACK) -> Iterator[None]:
    """Take these networks for public ones."""
    known = [ipaddress.ip_network(network) for network in networks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            f"{UrlFetcher.__module__}.is_public",
            lambda address: is_public(address) or any(address in network for network in known),
        )
        yield


def fetch(url: str, *, networks: Any = LOOPBACK, **limits: Any) -> bytes:
    fetcher = UrlFetcher(**{"max_bytes": 20_000, "timeout_s": 5, **limits})
    with allowing(networks):
        return asyncio.run(fetcher.fetch(url))


def refuse(url: str, **limits: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        fetch(url, **limits)
    return caught.value


def answer_with(*addresses: str) -> Callable[..., Any]:
    """A look-up that gives these addresses for any name."""

    async def look_up(_: Any, __: str, port: int, **___: Any) -> Any:
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "",
             (address, port))
            for address in addresses
        ]  # fmt: skip

    return look_up


@pytest.mark.parametrize("path", ["image", "chunked", "moved//image", "moved//moved//image"])
def test_an_image_is_fetched(web: Any, path: str) -> None:
    assert fetch(f"{web.url}/{path}") == CONTENT


def test_a_path_with_a_query_is_asked_for_as_it_is(web: Any) -> None:
    fetch(f"{web.url}/image/%20a;e?b=c&d=%2F#part")
    assert web.paths == ["/image/%20a;e?b=c&d=%2F"]


def test_without_permission_nothing_on_this_machine_is_asked(web: Any) -> None:
    error = refuse(f"{web.url}/image", networks=())
    assert error.code == "url_not_allowed"
    assert web.paths == []


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "127.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1", "192.168.1.1",
        "172.16.0.1", "169.254.169.254", "100.64.0.1", "[fe80::1]", "[fd00::1]", "224.0.0.1",
        "255.255.255.255", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "2130706433", "0x7f000001",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(host: str) -> None:
    error = refuse(f"http://{host}/image", networks=())
    assert error.status == 400
    assert error.code in ("url_not_allowed", "invalid_image_url")
    assert "public" in error.message or "cannot be resolved" in error.message


@pytest.mark.parametrize(
    "address",
    [
        "64:ff9b:1::a00:1", "64:ff9b:1::808:808", "::127.0.0.1", "::8.8.8.8", "::", "::1",
        "::ffff:0:127.0.0.1", "::ffff:0:8.8.8.8", "::ffff:10.0.0.1", "fec0::1", "fe80::1",
        "::ffff:8.8.8.8", "64:ff9b::7f00:1", "2002:808:808::",
        "64:ff9b::10.0.0.1", "64:ff9b::192.0.0.8", "2002:a00:1::", "2002:c058:6301::", "ff02::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "100::1", "192.0.0.8", "fc00::1",
        "5f00::1", "3fff::1", "100:0:0:1::1", "4000::1",
        "192.88.99.1", "198.18.0.1", "192.0.2.1", "224.0.0.1", "240.0.0.1", "0.0.0.0", "0.1.2.3",
        "93.184.215.14 10.0.0.1",  # one of them
    ],
)  # fmt: skip
def test_addresses_that_lead_into_a_network_are_not_public(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", answer_with(*address.split()))
    assert refuse("http://example.com/", networks=()).code == "url_not_allowed"


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1", "64:ff9b::8.8.8.8"])
def test_public_addresses_are_connected_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def connect(_: Any, host: str, *__: Any, **___: Any) -> Any:
        asked.append(host)
        raise OSError

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", answer_with(address))
    monkeypatch.setattr(f"{UrlFetcher.__module__}.httpcore.AnyIOBackend.connect_tcp", connect)
    assert refuse("http://example.com/", networks=()).code == "invalid_image_url"
    assert [ipaddress.ip_address(host) for host in asked] == [ipaddress.ip_address(address)]


def test_the_connection_goes_to_the_address_that_was_checked(
    web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is looked up again may have another address by then."""
    hosts: list[str] = []
    look_up = answer_with("127.0.0.1")

    async def note(loop: Any, host: Any, port: Any, **_: Any) -> Any:
        hosts.append(host)
        return await look_up(loop, host, port)

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", note)
    url = f"http://images.example:{web.server_port}/image"
    assert fetch(url) == CONTENT
    assert hosts.count("images.example") == 1


def test_a_redirect_is_checked_as_a_new_url(web: Any) -> None:
    for target in ("http://10.0.0.1/", "file:///etc/passwd", "http://localhost@10.0.0.1/"):
        assert refuse(f"{web.url}/moved/{target}").code == "url_not_allowed"
    error = refuse(f"{web.url}/moved/http://[")
    assert (error.status, error.code) == (400, "invalid_image_url")
    circle = "/moved/" * 6 + "/image"
    assert "redirects" in refuse(f"{web.url}{circle}").message


@pytest.mark.parametrize(
    "url",
    [
        "http://", "http:///path", "http://user:secret@example.com/", "http://example.com:0/",
        "http://example.com:99999/", "http://example.com:x/", "http://[::1/", "http://exa mple/",
        "http://example.com/a\r\nHost: other", "http://example.com/ü", "http://a..b/",
        "http://" + "a" * 300 + "/",
    ],
)  # fmt: skip
def test_invalid_urls_are_refused(url: str) -> None:
    assert refuse(url).status == 400


def test_what_is_too_large_is_not_read_to_its_end(web: Any) -> None:
    for path in ("image", "chunked"):
        assert refuse(f"{web.url}/{path}", max_bytes=5000).status == 413


def test_a_server_that_is_silent_or_talks_rubbish_is_left(web: Any) -> None:
    assert "within 0.2 seconds" in refuse(f"{web.url}/silent", timeout_s=0.2).message
    assert "cannot be fetched" in refuse(f"{web.url}/rubbish").message
    assert "status 404" in refuse(f"{web.url}/nothing").message
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert refuse(f"http://127.0.0.1:{port}/").status == 400


def test_the_images_of_a_request_have_a_limit_together(web: Any) -> None:
    config = ServeConfig(image_urls=True, max_request_mb=0.05, max_image_mb=0.02)
    images = ImageInputs(config)
    urls = [f"{web.url}/image/{number}" for number in range(40)]
    with allowing():
        assert asyncio.run(images.read(urls[:4])) == [CONTENT] * 4
        with pytest.raises(RequestError, match=r"exceed 0.05 MB"):
            asyncio.run(images.read(urls))
    assert len(web.paths) < 40
