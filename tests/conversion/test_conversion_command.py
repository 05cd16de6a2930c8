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

from modeling_llm2clip.__main__ import main

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--source-format", "openai", "--text-model", str(LLM), "--head-width", "12",
    "--max-text-length", "200",
]  # fmt: skip
LLM2VEC_FLAGS = [
    "--source-format", "llm2vec", "--vision-model", "no-such-tower", "--prompt", "llama-3",
]  # fmt: skip
# What LLM2Vec has no use for, with a value.
OTHER_FLAGS = {
    "--max-text-length": "77", "--text-pooling": "mean", "--preprocessing": "half",
    "--components": "text", "--revision": "main", "--file": "a.pt", "--max-shard-size": "1MB",
    "--text-revision": "main", "--llm-lora": "a/lora", "--activation": "gelu",
    "--head-width": "64", "--rope-reference-size": "16",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
def test_a_conversion_killed_in_its_weights_leaves_nothing_that_loads(tmp_path) -> None:
    source = save_checkpoint("openai", tmp_path / "source")
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


def test_a_bad_source_is_one_line_and_exit_code_2(tmp_path, capsys) -> None:
    source = save_checkpoint("eva02", tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "model"), *FLAGS]) == 2
    assert "Choose the source format 'eva02'" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "model"), "--source-format", "eva02"]) == 2
    assert "give --text-model" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [FLAGS, LLM2VEC_FLAGS], ids=["checkpoint", "llm2vec"])
def test_a_license_that_is_none_is_refused_before_a_source_is_opened(
    tmp_path, capsys, flags
) -> None:
    # There is no source: whatever opened it would complain of that.
    command = ["convert", str(tmp_path / "no-such.pt"), str(tmp_path / "model"), *flags]
    for name, error in (
        ("Apache 2", "--license 'Apache 2': must be an identifier"),
        ("other", "needs license_name and license_link"),
    ):
        assert main([*command, "--license", name]) == 2
        assert error in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_flag_that_llm2vec_has_no_use_for_is_named(tmp_path, capsys) -> None:
    for flag, value in OTHER_FLAGS.items():
        command = ["convert", str(LLM), str(tmp_path / "model"), *LLM2VEC_FLAGS, flag, value]
        assert main(command) == 2
        assert f"has no use for `{flag[2:].replace('-', '_')}`." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "flag"), [("openai-hub", "--head-width"), ("openai", "--rope-reference-size")]
)
def test_a_flag_of_another_recipe_is_named(tmp_path, capsys, recipe, flag) -> None:
    command = ["convert", "no-such.pt", str(tmp_path / "model"), "--source-format", recipe]
    assert main([*command, "--text-model", str(LLM), flag, "8"]) == 2
    assert f"`{flag[2:].replace('-', '_')}` goes with the source formats" in capsys.readouterr().err


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
