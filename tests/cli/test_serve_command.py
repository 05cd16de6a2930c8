"""`llm2clip serve` as a process: it answers, lets requests finish, and names what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served_apps import MIXED_TEXTS
from tiny_folders import export_tiny_model

from modeling_llm2clip import encode_texts, load_model
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.serving.app import bind_socket


@contextmanager
def serve(model: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "modeling_llm2clip", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--device", "cpu", *flags], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"Serving model on (http://127\.0\.0\.1:\d+) \(web page\); .*\n", line)
        assert found, line
        yield found[1], process
    finally:
        process.kill()
        process.wait()


def write_request(body: Any) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_sigterm_lets_the_requests_in_work_finish(tmp_path: Path) -> None:
    model = export_tiny_model(tmp_path / "model")
    texts = [f"{MIXED_TEXTS[2]} {number}" for number in range(2000)]
    with serve(model) as (url, process):
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=60) as client:
            client.sendall(write_request({"input": texts}))
            while read_pending(url) == 0:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            with client.makefile("rb") as file:
                assert file.readline().split()[1] == b"200"
                while line := file.readline().strip():
                    name, _, value = line.partition(b":")
                    if name.lower() == b"content-length":
                        size = int(value)
                answer = json.loads(file.read(size))
        # The signal ends the process as any does that has no handler, after all is done.
        assert process.wait(30) == -signal.SIGTERM
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), timeout=5)
    rows = np.array([row["embedding"] for row in answer["data"]])
    expected = encode_texts(*load_model(model, device="cpu"), texts).numpy()
    np.testing.assert_allclose(rows, expected, atol=1e-5)  # sums in another order


def read_pending(url: str) -> int:
    with urllib.request.urlopen(f"{url}/health") as response:
        return int(json.load(response)["num_pending"])


def test_an_address_in_use_is_named_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llm2clip"}')  # and nothing to load
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tmp_path), "--port", port]) == 2
    error = capsys.readouterr().err
    assert f"port={port}" in error and "Cannot listen on" in error


def test_a_socket_that_is_bound_refuses_until_the_server_runs() -> None:
    with bind_socket(ServeConfig(port=0)) as bound, pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname())
