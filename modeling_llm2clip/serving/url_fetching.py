"""Fetches images from the web without letting requests reach the server's own network (SSRF).

A host is resolved once, all of the host's addresses must be public, and the connection goes to a
checked address, so a second lookup cannot return a different address. A redirect is checked like a
new URL. Proxies, cookies and compression are not used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

try:
    import httpcore2 as httpcore
except ImportError:  # huggingface_hub 1 installs the older one
    import httpcore  # type: ignore[no-redef]

from ..image_loading_llm2clip import is_public
from .service_results import RequestError

_MOST_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_SHOWN = 100  # characters of a URL in an error
_SCHEMES = ("http", "https")
_FAILURES = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)


class UrlFetcher:
    """Fetches public http and https URLs.

    Args:
        max_bytes: Maximum size of the content in bytes.
        timeout_s: Time limit in seconds per URL, including redirects.
    """

    def __init__(self, *, max_bytes: int, timeout_s: float) -> None:
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._tls = ssl.create_default_context()

    async def fetch(self, url: str) -> bytes:
        try:
            return await asyncio.wait_for(self._follow(url), self._timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            raise _refuse(url, f"did not answer within {self._timeout_s:g} seconds") from None
        except (OSError, *_FAILURES) as error:
            raise _refuse(url, f"cannot be fetched ({type(error).__name__})") from error

    async def _follow(self, url: str) -> bytes:
        for _ in range(_MOST_REDIRECTS + 1):
            answer = await self._get(url, _parse(url))
            if isinstance(answer, bytes):
                return answer
            try:
                url = urljoin(url, answer)
            except ValueError:  # such as an unclosed bracket
                raise _refuse(url, "redirects to an invalid URL") from None
        raise _refuse(url, f"redirects more than {_MOST_REDIRECTS} times")

    async def _get(self, url: str, parts: SplitResult) -> bytes | str:
        """Return the content as bytes, or the target of a redirect as a string."""
        target = httpcore.URL(
            scheme=parts.scheme, host=str(parts.hostname), port=parts.port,
            target=(parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
        )  # fmt: skip
        headers = [
            ("Host", parts.netloc), ("User-Agent", "modeling_llm2clip"), ("Accept", "image/*"),
            ("Accept-Encoding", "identity"), ("Connection", "close"),
        ]  # fmt: skip
        backend = _CheckedBackend(lambda host, port: self._resolve(url, host, port))
        async with (
            httpcore.AsyncConnectionPool(ssl_context=self._tls, network_backend=backend) as pool,
            pool.stream("GET", target, headers=headers) as response,
        ):
            answered = {name.lower(): value for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in answered:
                return answered[b"location"].decode("latin-1")
            if response.status != 200:
                raise _refuse(url, f"returned status {response.status}")
            content = bytearray()
            async for part in response.aiter_stream():
                content += part
                if len(content) > self._max_bytes:
                    raise _refuse(url, f"exceeds {self._max_bytes / 1e6:g} MB", status=413)
            return bytes(content)

    async def _resolve(self, url: str, host: str, port: int) -> str:
        """Resolve the host and return one of its IP addresses, all of which must be public."""
        loop = asyncio.get_running_loop()
        try:
            entries = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise _refuse(url, "has a host that cannot be resolved") from None
        addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in entries]
        if not all(map(is_public, addresses)):
            raise _refuse(url, "is not on the public internet", code="url_not_allowed")
        return str(addresses[0])


class _CheckedBackend(httpcore.AnyIOBackend):
    """Network backend that connects to the checked address of a host."""

    def __init__(self, resolve: Callable[[str, int], Awaitable[str]]) -> None:
        self._resolve = resolve

    async def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> Any:
        return await super().connect_tcp(await self._resolve(host, port), port, *args, **options)


def _parse(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port_is_valid = parts.port != 0
    except ValueError:  # such as a non-numeric port
        raise _refuse(url, "is not a valid URL") from None
    if parts.scheme not in _SCHEMES:
        raise _refuse(url, "is not an http or https URL", code="url_not_allowed")
    if not parts.hostname or not port_is_valid:
        raise _refuse(url, "has no host or an invalid port")
    if "@" in parts.netloc:
        raise _refuse(url, "contains a user name", code="url_not_allowed")
    # A line break would end the request header.
    if not url.isascii() or any(char <= " " or char == "\x7f" for char in url):
        raise _refuse(url, "has characters that must be percent-encoded")
    return parts


def _refuse(
    url: str, problem: str, *, status: int = 400, code: str = "invalid_image_url"
) -> RequestError:
    return RequestError(status, f"The image URL {url[:_SHOWN]!r} {problem}.", code=code)
