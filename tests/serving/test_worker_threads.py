"""Images that are slow to decode hold up neither texts, nor the queue's limit, nor the end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_apps import open_service, to_data_url, to_png
from tiny import draw_noise
from tiny_folders import export_tiny_model

from modeling_llm2clip.serving import service as service_module

PNG = to_png(draw_noise())


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Images are decoded once this is set."""
    go = threading.Event()
    decode = service_module.decode_sent_image

    def wait(content: bytes, limits: Any) -> Any:
        go.wait(30)
        return decode(content, limits)

    monkeypatch.setattr(service_module, "decode_sent_image", wait)
    monkeypatch.setattr(service_module, "default_num_workers", lambda: 2)
    yield go
    go.set()


def test_texts_are_embedded_while_all_threads_for_images_are_busy(slow: threading.Event) -> None:
    async def ask(service: Any) -> None:
        images = asyncio.ensure_future(service.embed([PNG] * 4))
        while service.num_pending < 4:
            await asyncio.sleep(0.001)
        assert len((await asyncio.wait_for(service.embed(["a dog"]), 20)).embeds) == 1
        assert not images.done()
        slow.set()
        assert len((await images).embeds) == 4

    with open_service() as service:
        asyncio.run(ask(service))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_sigterm_waits_for_an_image_no_longer_than_its_time(tmp_path: Path) -> None:
    model = export_tiny_model(tmp_path / "model")
    code = (
        "import sys, time; from modeling_llm2clip.serving import service;"
        "from modeling_llm2clip.__main__ import main;"
        "service.decode_sent_image = lambda *_, **__: time.sleep(300);"
        f"sys.exit(main(['serve', {str(model)!r}, '--port', '0', '--device', 'cpu', '--no-page',"
        "'--timeout-s', '1']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://([\d.]+):(\d+)", server.stdout.readline())
            assert found
            body = f'{{"images": ["{to_data_url(PNG)}"]}}'
            with socket.create_connection((found[1], int(found[2])), timeout=20) as client:
                head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
                client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                time.sleep(1)
                server.send_signal(signal.SIGTERM)
                assert server.wait(20) == -signal.SIGTERM
        finally:
            server.kill()
