"""Writes the badges of the README, and of the notebooks what opens them in Colab, and the address
of the package that model cards name.

    python .ci/write_badges.py

Badges say what setup.cfg says. `repo_url` of mkdocs.yml names the repository on GitHub; without it
there is no badge of a service, because its link would lead nowhere, and no Colab. Run the script
again after either file has changed.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path
from typing import Any

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "modeling_llm2clip" / "model_folders" / "model_card.py"
PAPER = "2411.04997"
_ADDRESS = re.compile(r"^(ADDRESS: .* = ).*", re.MULTILINE)
_BADGES = re.compile(r"(<!-- badges -->\n)(.*?)(<!-- /badges -->)", re.DOTALL)
_INSTALL_TAG = "install"
_BADGE_LINE = re.compile(r"^\[!\[Open in Colab\].*\n\n", re.MULTILINE)
_NEEDS = re.compile(r'pip install -e "\.\[([\w,]+)\]"([^`]*)`')
_INSTALL = """# Only where the package is missing, as on Colab: a few minutes.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("modeling_llm2clip") is None:
    subprocess.run(["git", "clone", "--depth", "1", "{url}", "llm2clip"], check=True)
    install = [sys.executable, "-m", "pip", "install", "-q", {needs}]
    subprocess.run(install, check=True)
    importlib.invalidate_caches()
    subprocess.run([sys.executable, "-m", "modeling_llm2clip", "demo"], cwd="llm2clip", check=True)
    os.chdir("llm2clip/examples")"""


def main() -> None:
    """Write the README, the address on model cards, and every notebook."""
    url = read_repository()
    address = rf"\g<1>{json.dumps(url) if url else None}"
    CARDS.write_text(_ADDRESS.sub(address, CARDS.read_text("utf-8")), "utf-8")
    readme = ROOT / "README.md"
    readme.write_text(render_readme(readme.read_text("utf-8"), url), "utf-8")
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        open_in_colab(notebook, path.name, url)
        nbformat.write(notebook, path)


def read_repository() -> str | None:
    """Return the address of the repository, if mkdocs.yml states one.

    Raises:
        ValueError: It is not on GitHub, from which Colab opens notebooks.
    """
    url = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8")).get("repo_url")
    if url is not None and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise ValueError(f"repo_url of mkdocs.yml is {url!r}; give https://github.com/OWNER/NAME.")
    return url


def render_readme(text: str, url: str | None) -> str:
    """Return the README with its badges written anew.

    Raises:
        ValueError: It has no place for badges.
    """
    if not _BADGES.search(text):
        raise ValueError("README.md has no '<!-- badges -->' with a '<!-- /badges -->' below.")
    badges = "\n".join(list_badges(url))
    return _BADGES.sub(lambda match: f"{match[1]}{badges}\n{match[3]}", text)


def list_badges(url: str | None) -> list[str]:
    """Return the badges of the README in Markdown."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    license_name = setup["metadata"]["license"]
    versions = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    badges = [
        _draw("license", license_name, "blue", "LICENSE"),
        _draw("python", f"{versions[0]} to {versions[-1]}", "blue", "docs/installation.md"),
        _draw("arXiv", PAPER, "b31b1b", f"https://arxiv.org/abs/{PAPER}"),
    ]
    if url is not None:
        workflow = f"{url}/actions/workflows/ci.yml"
        badges.append(f"[![CI]({workflow}/badge.svg)]({workflow})")
        badges.append(draw_colab(url, "01_load_and_search.ipynb"))
    return badges


def draw_colab(url: str, name: str) -> str:
    """Return the badge that opens a notebook of `examples/` in Colab."""
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    place = url.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{place}/blob/main/examples/{name}"
    return f"[![Open in Colab]({image})]({link})"


def open_in_colab(notebook: Any, name: str, url: str | None) -> None:
    """Give a notebook the badge and the cell that installs the package, or take them away."""
    cells = [c for c in notebook.cells if _INSTALL_TAG not in c.metadata.get("tags", [])]
    cells[0].source = _BADGE_LINE.sub("", cells[0].source)
    if url is not None:
        cells[0].source = f"{draw_colab(url, name)}\n\n{cells[0].source}"
        cell = nbformat.v4.new_code_cell(
            _INSTALL.format(url=url, needs=read_needs(cells[0].source)),
            metadata={"tags": [_INSTALL_TAG]},
            id="install",
        )
        cells.insert(1, cell)
    # The cell that installs shows nothing, so that the outputs of the others stay true.
    for number, cell in enumerate((c for c in cells if c.cell_type == "code"), 1):
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    notebook.cells = cells


def read_needs(introduction: str) -> str:
    """Return what a notebook installs, as strings of Python, as its first cell names it."""
    found = _NEEDS.search(" ".join(introduction.split()))
    if found is None:
        raise ValueError(f'The first cell names no `pip install -e ".[…]"`: {introduction[:80]}')
    return ", ".join(map(json.dumps, [f"./llm2clip[{found[1]}]", *shlex.split(found[2])]))


def _draw(label: str, value: str, color: str, link: str) -> str:
    shown = "-".join(text.replace("-", "--").replace(" ", "_") for text in (label, value))
    return f"[![{label}: {value}](https://img.shields.io/badge/{shown}-{color})]({link})"


if __name__ == "__main__":
    main()
