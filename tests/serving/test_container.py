"""The container starts the server as the command line does, as a user without rights."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import time
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from served_apps import run_service, send
from shared_models import CAPTIONS, ROUNDING
from tiny_folders import export_tiny_model

from modeling_llm2clip.__main__ import LINE
from modeling_llm2clip.cli.command import parse
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.model_folders.model_loading import load_model

ROOT = Path(__file__).parents[2]
NAME = "llm2clip-of-the-tests"


def read_instructions() -> list[tuple[str, str]]:
    """Read the Dockerfile as pairs of an instruction and its text, without comments."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", "").splitlines()
    pairs = [line.partition(" ") for line in lines if line]
    return [(name, rest.strip()) for name, _, rest in pairs]


def find_all(name: str) -> list[str]:
    return [rest for instruction, rest in read_instructions() if instruction == name]


def read_service() -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Read name, our service and immich's from the example."""
    services = yaml.safe_load((ROOT / "examples" / "immich.yaml").read_text("utf-8"))["services"]
    immich = services.pop("immich-server")
    [(name, service)] = services.items()
    return name, service, immich


def parse_start(options: list[str]) -> dict[str, Any]:
    """Parse the container's command as the command line does; returns the arguments of `serve`."""
    start: list[str] = json.loads(find_all("ENTRYPOINT")[-1])
    program, *words = [*start, *options]
    assert program == "llm2clip"
    call = parse(LINE, words)
    return signature(call.func).bind(*call.args, **call.keywords).arguments


def test_the_copied_files_are_there_and_enough_to_build_the_package() -> None:
    copied = [word for rest in find_all("COPY") for word in shlex.split(rest)[:-1]]
    assert copied and all((ROOT / path).exists() for path in copied)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    needed = {"setup.cfg", "pyproject.toml", setup["metadata"]["license_files"]}
    needed.add(setup["metadata"]["long_description"].removeprefix("file: "))
    folders = dict(re.findall(r"(\S+) = (\S+)", setup["options"]["package_dir"]))
    for package in setup["options"]["packages"].split():
        needed.add(folders.get(package, package.partition(".")[0]))
    assert needed == set(copied)
    [extras] = re.findall(r"\.whl\)\[(.+?)\]", " ".join(find_all("RUN")))
    assert set(extras.split(",")) <= set(setup["options.extras_require"])


@pytest.mark.parametrize("options", ["of the image", "of the example"])
def test_the_command_serves_the_volume_on_the_port_that_is_exposed(options: str) -> None:
    words = json.loads(find_all("CMD")[-1])
    if options == "of the example":
        words = read_service()[1]["command"]
    given = parse_start(words)
    assert [given["model"]] == json.loads(find_all("VOLUME")[-1])
    assert given["config"].host == "0.0.0.0" and find_all("EXPOSE") == [str(given["config"].port)]


def test_the_server_does_not_run_as_root() -> None:
    names = [name for name, _ in read_instructions()]
    assert int(find_all("USER")[-1]) > 0
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")


def test_the_health_check_asks_the_route_that_needs_no_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = json.loads(find_all("HEALTHCHECK")[-1].partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    port = find_all("EXPOSE")[-1]
    monkeypatch.setenv("LLM2CLIP_API_KEY", "secret")
    with run_service() as (address, _):
        code = command[2].replace(f"http://127.0.0.1:{port}", address)
        assert code != command[2]
        exec(code, {})
        with pytest.raises(OSError, match="401"):
            exec(code.replace("/health", "/missing"), {})


def test_the_example_gives_immich_the_address_of_the_service() -> None:
    name, service, immich = read_service()
    address = f"http://{name}:{find_all('EXPOSE')[-1]}"
    assert immich["environment"] == {"IMMICH_MACHINE_LEARNING_URL": address}
    [volume] = service["volumes"]
    assert volume.endswith(f":{parse_start(service['command'])['model']}:ro")
    # Docker waits for running requests, which have the time limit of the server.
    limit = parse_start(service["command"])["config"].timeout_s
    assert int(service["stop_grace_period"].removesuffix("s")) > limit


def docker(*words: str) -> str:
    done = subprocess.run(["docker", *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("docker") is None, reason="docker is not installed")
def test_the_container_gives_the_models_embeddings(tmp_path: Path) -> None:
    folder = export_tiny_model(tmp_path / "model")
    docker("build", "--tag", NAME, str(ROOT))
    container = docker("create", "--publish", "127.0.0.1::8000", NAME, "/model", "--no-page")
    try:
        docker("cp", f"{folder}/.", f"{container}:/model")
        docker("start", container)
        deadline = time.monotonic() + 300
        while docker("inspect", "-f", "{{.State.Health.Status}}", container) != "healthy":
            assert time.monotonic() < deadline, docker("logs", container)
            time.sleep(1)
        assert docker("exec", container, "id", "-u") == "1000"
        address = f"http://{docker('port', container, '8000/tcp').splitlines()[0]}"
        status, reply, _ = send(f"{address}/v1/embeddings", {"input": CAPTIONS})
    finally:
        docker("rm", "--force", "--volumes", container)
    assert status == 200
    found = torch.tensor([row["embedding"] for row in reply["data"]])
    model: Any
    model, processor = load_model(folder, device="cpu")
    wanted = encode_texts(model, processor, CAPTIONS)
    assert torch.allclose(found, wanted, atol=ROUNDING)
