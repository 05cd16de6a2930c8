"""What the workflows call: the files that they name exist, and the documents name the same."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def read(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


def list_targets() -> set[str]:
    """Return the targets of the Makefile."""
    return set(re.findall(r"^([a-z][a-z-]*):", read("Makefile"), re.MULTILINE))


def test_tests_that_run_with_the_lowest_versions_exist() -> None:
    named = re.findall(r"(?<![\w/])tests/[\w/*.-]+", read(".ci/run"))
    assert len(named) > 10
    assert [path for path in named if not list(ROOT.glob(path))] == []


def test_every_make_command_of_the_workflows_is_a_target() -> None:
    texts = [read(".ci/run"), *(p.read_text("utf-8") for p in (ROOT / ".github").rglob("*.yml"))]
    called = re.findall(r"(?:run_step \S+|run:) make ([a-z-]+)", "".join(texts))
    assert called
    assert set(called) <= list_targets()


def test_contributing_describes_every_target() -> None:
    described = set(re.findall(r"`make ([a-z-]+)`", read("CONTRIBUTING.md")))
    assert described == list_targets() - {"install"}
