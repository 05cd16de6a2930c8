"""The command converts from folders and the Hub, or names what is wrong and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from converting import LLM, LLM2VEC, read_checkpoint, save_checkpoint
from hub_server import HubFile, HubServer
from transformers import AutoModel

ROOT = Path(__file__).parents[2]
FLAGS = ["--source-format", "eva02", "--text-model", str(LLM), "--max-text-length", "200"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
def test_a_conversion_killed_in_its_weights_leaves_nothing_that_loads(tmp_path) -> None:
    source = save_checkpoint("eva02", tmp_path / "source")
    command = [sys.executable, "-m", "modeling_llm2clip", "convert", str(source)]
    with subprocess.Popen(
        [*command, str(tmp_path / "model"), *FLAGS], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob(".model-*/model/*")) and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "model").exists()
    (left,) = tmp_path.glob(".model-*/model")
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(left)


def publish(hub: HubServer, name: str, folder: Path) -> str:
    """Put a folder on the test Hub; returns its revision."""
    files = {path.name: HubFile(path.read_bytes()) for path in folder.iterdir() if path.is_file()}
    return hub.create_repository(name).add_commit("main", "first", files)


@pytest.mark.slow
def test_the_command_takes_hub_ids_and_uploads_the_result(tmp_path: Path) -> None:
    save_checkpoint("eva02", tmp_path / "checkpoint")
    state = {
        **read_checkpoint("eva02"),
        "visual.head.bias": read_checkpoint("eva02")["logit_scale"],
    }
    with HubServer() as hub:
        first = publish(hub, "official/eva02", tmp_path / "checkpoint")
        save_checkpoint("eva02", tmp_path / "checkpoint", state)  # a later one, which is broken
        files = {"epoch_3.pt": HubFile((tmp_path / "checkpoint" / "epoch_3.pt").read_bytes())}
        hub.repositories["official/eva02"].add_commit("main", "second", files)
        llm = publish(hub, "official/llama", LLM)
        lora = publish(hub, "official/lora", LLM2VEC / "llama_lora")
        hub.repositories["official/lora"].add_commit("main", "later, and empty", {})
        command = [
            sys.executable, "-m", "modeling_llm2clip", "convert", f"official/eva02@{first}",
            str(tmp_path / "model"), "--source-format", "eva02", "--file", "epoch_3.pt",
            "--text-model", f"official/llama@{llm}", "--llm-lora", f"official/lora@{lora}",
            "--max-text-length", "200", "--license", "mit",
        ]  # fmt: skip
        push = [*command[:3], "push", str(tmp_path / "model"), "me/model"]
        for words, shown in ((command, "All checks passed"), (push, "Published ")):
            done = subprocess.run(
                words, cwd=ROOT, env=hub.environment(tmp_path / "cache"), capture_output=True,
                text=True, check=False, timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            assert shown in done.stdout
        repository = hub.repositories["me/model"]
        uploaded = repository.commits[repository.find()]
    assert {"model.safetensors", "config.json", "modeling_llm2clip.py"} <= set(uploaded)
    assert repository.private
    record = json.loads(uploaded["conversion.json"].content)
    assert record["checkpoint"] == {"name": "official/eva02", "revision": first}
    (merged,) = record["llm"]["loras"]
    assert merged.pop("share_changed_by_merging") > 0.5
    assert merged == {"name": "official/lora", "revision": lora}
    assert record["llm"]["revision"] == llm
    assert "# me/model\n" in uploaded["README.md"].content.decode()
