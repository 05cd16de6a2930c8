"""Sources on a Hub are downloaded at their revision, converted, and the result uploaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from converting import LLM, LLM2VEC, read_checkpoint, save_checkpoint
from hub_server import HubFile, HubServer

ROOT = Path(__file__).parents[2]


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
            sys.executable, "-m", "modeling_llm2clip", "convert", "official/eva02",
            str(tmp_path / "model"), "--source-format", "eva02", "--file", "epoch_3.pt",
            "--revision", first, "--text-model", "official/llama",
            "--llm-lora", f"official/lora@{lora}",
            "--head-width", "12", "--rope-reference-size", "4", "--max-text-length", "200",
            "--license", "mit",
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
