"""Badges are true, and with a repository named, notebooks open in Colab and install themselves."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from modeling_llm2clip.model_folders import model_card

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
URL = "https://github.com/somebody/their-copy"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    file = ROOT / ".ci" / "write_badges.py"
    spec = importlib.util.spec_from_file_location("write_badges", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_the_badges_of_setup_cfg_and_any_repository(
    script: ModuleType,
) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert script.render_readme(text, script.read_repository()) == text
    assert script.read_repository() == model_card.ADDRESS
    with pytest.raises(ValueError, match="no '<!-- badges -->'"):
        script.render_readme("# A title", None)


def test_service_badges_need_a_repository(script: ModuleType) -> None:
    without, badges = "\n".join(script.list_badges(None)), "\n".join(script.list_badges(URL))
    assert "github.com" not in without and "colab" not in without
    assert "license: Apache-2.0](https://img.shields.io/badge/license-Apache--2.0-blue)" in without
    assert f"]({URL}/actions/workflows/ci.yml)" in badges
    link = "colab.research.google.com/github/somebody/their-copy/blob/main/examples/01_load"
    assert link in badges and without in badges


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_match_the_scripts_output(path: Path, script: ModuleType) -> None:
    notebook = nbformat.read(path, as_version=4)
    again = copy.deepcopy(notebook)
    script.open_in_colab(again, path.name, script.read_repository())
    assert again == notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_with_a_repository_a_notebook_opens_in_colab_and_installs_the_package(
    path: Path, script: ModuleType
) -> None:
    notebook = nbformat.read(path, as_version=4)
    before = copy.deepcopy(notebook)
    script.open_in_colab(notebook, path.name, URL)
    nbformat.validate(notebook)
    assert f"/blob/main/examples/{path.name})" in notebook.cells[0].source.splitlines()[0]
    install = notebook.cells[1].source
    assert URL in install
    # All that the first cell asks a reader to install.
    said = re.search(r"`pip install -e ([^`]+)`", before.cells[0].source)
    assert said is not None
    for word in shlex.split(said[1]):
        assert json.dumps(word.replace(".[", "./llm2clip[")) in install
    place = Path.cwd()
    exec(compile(install, path.name, "exec"), {})  # the package is there, so nothing happens
    assert Path.cwd() == place
    numbers = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))
    # Written twice it is the same, and it can be taken away.
    once = copy.deepcopy(notebook)
    script.open_in_colab(notebook, path.name, URL)
    assert notebook == once
    script.open_in_colab(notebook, path.name, None)
    assert notebook == before
