"""The site: every page is reachable, every link resolves, every block is true."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
GENERATED = {"reference/cli.md"}  # by .ci/write_cli_reference.py
PAGES = sorted(
    path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).as_posix() not in GENERATED
)
# Folders and files that a reader makes or downloads, and Hub ids.
MADE_BY_READERS = (
    "aligned", "captions", "images", "llm2clip-demo", "model", "my-images", "my-model", "runs",
    "tuned", "text-only", "to-publish", "tower", "caption", "image", "val", "<name>", "site",
    "microsoft", "meta-llama", "openai", "facebook", "HuggingFaceTB",
)  # fmt: skip
_BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<note>[^>]*) -->\n *)?```(?P<language>\w+)\n(?P<body>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)

every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix()
)


def find_blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Return note and text of each fenced block in a language; the note is a comment above it."""
    found = []
    for match in _BLOCK.finditer(page.read_text("utf-8")):
        if match["language"] == language:
            indent = len(match["indent"])
            lines = [line[indent:] for line in match["body"].splitlines()]
            found.append((match["note"] or "", "\n".join(lines) + "\n"))
    return found


def list_nav(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    if isinstance(entries, dict):
        return [page for inner in entries.values() for page in list_nav(inner)]
    return [page for inner in entries for page in list_nav(inner)]


def read_prose(page: Path) -> str:
    return _BLOCK.sub("", page.read_text("utf-8"))


def slugify(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown's `toc` makes it."""
    text = re.sub(r"[^\w\s-]", "", heading).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


def list_anchors(page: Path) -> set[str]:
    return {slugify(line) for line in re.findall(r"^#+ (.+)$", read_prose(page), re.MULTILINE)}


def test_every_page_is_in_the_navigation() -> None:
    pages = {path.relative_to(DOCS).as_posix() for path in PAGES}
    assert sorted(list_nav(CONFIG["nav"])) == sorted(pages | GENERATED)


@every_page
def test_every_link_leads_to_a_page_and_a_heading(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", read_prose(page)):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        if target.relative_to(DOCS).as_posix() in GENERATED:
            continue
        if not target.is_file() or (anchor and anchor not in list_anchors(target)):
            broken.append(link)
    assert broken == []


@every_page
def test_every_path_between_backticks_exists(page: Path) -> None:
    quoted = re.findall(r"`([\w.<>-]+(?:/[\w.<>*-]*)+)`", read_prose(page))
    outside = [path for path in quoted if path.split("/")[0] not in MADE_BY_READERS]
    assert [path for path in outside if not list(ROOT.glob(path.rstrip("/")))] == []


@every_page
def test_json_and_yaml_blocks_parse(page: Path) -> None:
    for _, text in find_blocks(page, "json"):
        for line in text.splitlines():
            json.loads(line)
    for _, text in find_blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(text), dict)


@every_page
def test_python_blocks_compile(page: Path) -> None:
    for number, (_, text) in enumerate(find_blocks(page, "python"), 1):
        compile(text, f"{page.name}, block {number}", "exec")


@pytest.mark.slow
def test_the_site_builds_with_strict() -> None:
    zensical = shutil.which("zensical", path=str(Path(sys.executable).parent))
    if zensical is None:
        pytest.skip('needs pip install -e ".[docs]"')
    done = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "griffe:" not in done.stdout + done.stderr
