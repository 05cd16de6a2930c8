"""The command refuses by name what it cannot convert or publish, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from converting import (
    LLM,
    save_checkpoint,
)
from transformers import AutoModel

from modeling_llm2clip.__main__ import main

ROOT = Path(__file__).parents[2]


CONVERT_UNDER_A_LIMIT = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from modeling_llm2clip.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


FLAGS = [
    "--source-format",
    "openai",
    "--text-model",
    str(LLM),
    "--head-width",
    "12",
    "--max-text-length",
    "200",
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of POSIX")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path) -> None:
    source = save_checkpoint("openai", tmp_path / "source")
    done = subprocess.run(
        [sys.executable, "-c", CONVERT_UNDER_A_LIMIT, "convert", str(source),
         str(tmp_path / "model"), *FLAGS],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "model.safetensors could not be written" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def kill_conversion(tmp_path: Path, at: str) -> Path:
    """Kill a conversion once a file of the unfinished folder is there; return that folder."""
    source = save_checkpoint("openai", tmp_path / "source")
    command = [sys.executable, "-m", "modeling_llm2clip", "convert", str(source)]
    with subprocess.Popen(
        [*command, str(tmp_path / "model"), *FLAGS], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob(f".model-*/model/{at}")) and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "model").exists()
    (left,) = tmp_path.glob(".model-*/model")
    return left


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
def test_a_conversion_killed_in_its_weights_leaves_nothing_that_loads(tmp_path) -> None:
    left = kill_conversion(tmp_path, at="*")
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(left)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
def test_a_conversion_killed_before_its_examination_has_no_target(tmp_path) -> None:
    left = kill_conversion(tmp_path, at="config.json")
    assert (left / "config.json").exists()


def test_a_bad_source_is_one_line_and_exit_code_2(tmp_path, capsys) -> None:
    source = save_checkpoint("eva02", tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "model"), *FLAGS]) == 2
    assert "Choose the source format 'eva02'" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "model"), "--source-format", "eva02"]) == 2
    assert "give --text-model" in capsys.readouterr().err


LLM2VEC_FLAGS = [
    "--source-format",
    "llm2vec",
    "--vision-model",
    "no-such-tower",
    "--prompt",
    "llama-3",
]


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--license", "Apache 2"], "--license 'Apache 2': must be an identifier"),
        (["--license", "other"], "needs license_name and license_link"),
    ],
)
@pytest.mark.parametrize("recipe", [FLAGS, LLM2VEC_FLAGS], ids=["checkpoint", "llm2vec"])
def test_a_license_that_is_none_is_refused_before_a_source_is_opened(
    tmp_path, capsys, recipe, flags, match
) -> None:
    # There is no source: whatever opened it would complain of that.
    command = ["convert", str(tmp_path / "no-such.pt"), str(tmp_path / "model"), *recipe, *flags]
    assert main(command) == 2
    assert match in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-text-length", "77"],
        ["--text-pooling", "mean"],
        ["--preprocessing", "half"],
        ["--components", "text"],
        ["--revision", "main"],
        ["--file", "a.pt"],
        ["--max-shard-size", "1MB"],
        ["--text-revision", "main"],
        ["--llm-lora", "a/lora"],
        ["--activation", "gelu"],
        ["--head-width", "64"],
        ["--rope-reference-size", "16"],
    ],
    ids=lambda flags: flags[0],
)
def test_a_flag_that_llm2vec_has_no_use_for_is_named(tmp_path, capsys, flags) -> None:
    command = ["convert", str(LLM), str(tmp_path / "model"), *LLM2VEC_FLAGS, *flags]
    assert main(command) == 2
    assert f"has no use for `{flags[0][2:].replace('-', '_')}`." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "flag"), [("openai-hub", "--head-width"), ("openai", "--rope-reference-size")]
)
def test_a_flag_of_another_recipe_is_named(tmp_path, capsys, recipe, flag) -> None:
    command = ["convert", "no-such.pt", str(tmp_path / "model"), "--source-format", recipe]
    assert main([*command, "--text-model", str(LLM), flag, "8"]) == 2
    assert f"`{flag[2:].replace('-', '_')}` goes with the source formats" in capsys.readouterr().err
