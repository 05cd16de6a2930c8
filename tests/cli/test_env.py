"""`llm2clip env`: what an issue needs."""

from __future__ import annotations

import platform

import pytest
import torch

from modeling_llm2clip.__main__ import main


def test_it_prints_versions_and_hardware_as_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("- ") for line in lines)
    shown = dict(line[2:].split(": ", 1) for line in lines)
    assert shown["Python"] == platform.python_version()
    # The part after "+" names a build, which the metadata of some wheels leave out.
    assert shown["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert shown["flash_attention_2"] in ("installed", "not installed")
    assert {"transformers", "Platform", "Commit", "CPU", "GPU", "Device (auto)"} <= set(shown)
