"""The application under Ray Serve: its options, and two replicas on a local cluster."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fastapi.testclient import TestClient
from served_apps import MIXED_TEXTS, send
from shared_models import ROUNDING
from tiny_folders import export_tiny_model

from modeling_llm2clip import encode_texts, load_model
from modeling_llm2clip.serving.ray_serve import build

pytest.importorskip("ray.serve")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # else it writes a token into the home folder
    "PYTHONPATH": str(ROOT),
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model is missing"),
        ({"model": "m", "port": "1"}, "Ray's proxies do the listening"),
        ({"model": "m", "replicas": "2"}, "replicas is not an option"),
        ({"model": "m", "max_replicas": "many"}, "max_replicas='many': Input should be"),
        ({"model": "m", "min_replicas": "3"}, "min_replicas=3 exceeds max_replicas=2"),
        ({"model": "m", "max_image_mb": "50"}, "exceeds max_request_mb"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(options)


def test_options_of_the_command_line_are_strings() -> None:
    options = {"model": "123", "min_replicas": "2", "max_replicas": "4", "num_cpus": "0.5",
               "image_urls": "true"}  # fmt: skip
    deployment = build(options)._bound_deployment
    assert deployment._deployment_config.autoscaling_config.min_replicas == 2
    assert deployment.ray_actor_options == {"num_cpus": 0.5, "num_gpus": 0}


@pytest.mark.filterwarnings("ignore:coroutine .*__del__")  # which Ray awaits
def test_a_replica_computes_in_the_precision_of_its_options(tmp_path: Path) -> None:
    model = export_tiny_model(tmp_path / "model")
    rows = {}
    for precision in ("float32", "bfloat16"):
        options = {"model": str(model), "device": "cpu", "precision": precision}
        replica_class = build(options)._bound_deployment.func_or_class
        replica = replica_class.__new__(replica_class)
        asyncio.run(replica.__init__())  # as a replica does, and without a cluster
        with TestClient(replica.app) as client:
            answer = client.post("/v1/embeddings", json={"input": "a dog"}).json()
        rows[precision] = torch.tensor(answer["data"][0]["embedding"])
        loaded = load_model(model, device="cpu", precision=precision)
        expected = encode_texts(*loaded, ["a dog"])[0]
        torch.testing.assert_close(rows[precision], expected, rtol=0, atol=ROUNDING)
    # Eight bits round by more than sums in another order do.
    assert (rows["float32"] - rows["bfloat16"]).abs().max() > 10 * ROUNDING


@contextmanager
def run_cluster(file: Path, url: str) -> Iterator[None]:
    """`serve run FILE`, which starts a cluster of this machine, until all replicas answer."""
    command = [str(Path(sys.executable).with_name("serve")), "run", str(file)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 600
        while not is_up(url):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=20) as response:
            return bool(json.load(response)["status"] == "ok")
    except OSError:  # nobody listens yet, or no replica is ready
        return False


@pytest.mark.slow
@pytest.mark.usefixtures("only_cluster")
def test_two_replicas_answer_as_the_model_does(tmp_path: Path) -> None:
    model = export_tiny_model(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    options = {
        "model": str(model), "min_replicas": 2, "max_replicas": 2, "num_cpus": 0.5, "device": "cpu",
    }  # fmt: skip
    content = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "llm2clip",
                "import_path": "modeling_llm2clip.serving.ray_serve:build",
                "args": options,
            }
        ],
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    url = f"http://127.0.0.1:{port}"
    texts = MIXED_TEXTS * 8
    with run_cluster(tmp_path / "serve.yaml", url):
        wait_for_two(url, that_worked=False)
        with ThreadPoolExecutor(16) as pool:
            bodies = [{"input": text} for text in texts]
            sent = list(pool.map(partial(send, f"{url}/v1/embeddings"), bodies))
        wait_for_two(url, that_worked=True)
        status, refusal, _ = send(f"{url}/v1/embeddings", {"input": ""})
        assert status == 400 and "at least 1 character" in refusal["error"]["message"]
    rows = np.array([answer["data"][0]["embedding"] for _, answer, _ in sent])
    expected = encode_texts(*load_model(model, device="cpu"), texts).numpy()
    np.testing.assert_allclose(rows, expected, atol=ROUNDING)


def wait_for_two(url: str, *, that_worked: bool) -> None:
    """Ask until two replicas have answered; their counters began at different times."""
    seen: set[str] = set()
    deadline = time.monotonic() + 120
    while len(seen) < 2:
        assert time.monotonic() < deadline, seen
        with urllib.request.urlopen(f"{url}/metrics", timeout=20) as response:
            lines = response.read().decode().splitlines()
        values = dict(line.split() for line in lines if line.startswith("llm2clip_tokens"))
        if not that_worked or float(values["llm2clip_tokens_total"]) > 0:
            seen.add(values["llm2clip_tokens_created"])
