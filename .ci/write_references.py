"""Writes docs/reference/cli.md and docs/reference/api.md, before the site is built.

The first has the help texts of `llm2clip`, the second names everything that the package exports.

python .ci/write_references.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import griffe

import modeling_llm2clip

_ROOT = Path(__file__).resolve().parent.parent
_PAGES = _ROOT / "docs" / "reference"
_CLI_INTRODUCTION = """# Command line

Generated from `llm2clip --help` and the help of each command. `python -m modeling_llm2clip` is the
same program.

| exit code | meaning |
| --- | --- |
| 0 | success |
| 1 | `doctor` found a check that fails |
| 2 | an error, or an invalid command line |
| 130, 143 | stopped by Ctrl-C or SIGTERM |
"""
_API_INTRODUCTION = """# Python API

Everything on this page can be imported from `modeling_llm2clip`. Deeper paths are private by
convention and may move.

```python
import modeling_llm2clip as llm2clip
```
"""
# Headings, by the folder in which a thing is defined; others follow under their folder's name.
_HEADINGS = {
    "": "Model",
    "data": "Data",
    "building": "Build",
    "model_folders": "Load",
    "encoding": "Encode",
    "search": "Search",
    "serving": "Serve",
    "training": "Train",
    "evaluation": "Evaluate",
    "doctor": "Check",
    "conversion": "Convert",
    "publishing": "Publish",
    "configs": "Configs",
}


def main() -> None:
    """Write both pages."""
    _PAGES.mkdir(exist_ok=True)
    (_PAGES / "cli.md").write_text(write_cli_page(), encoding="utf-8")
    (_PAGES / "api.md").write_text(write_api_page(), encoding="utf-8")


def write_cli_page() -> str:
    """Return the help of every command."""
    overview = read_help()
    sections = [_CLI_INTRODUCTION, _fence(overview)]
    commands = find_commands(overview)
    if not commands:
        raise RuntimeError(f"No command is listed in `llm2clip --help`:\n{overview}")
    for command in commands:
        sections += [f"## llm2clip {command}\n", _fence(read_help(command))]
    return "\n".join(sections)


def write_api_page() -> str:
    """Return a page that has mkdocstrings describe each exported name, by folder."""
    package = griffe.load(
        "modeling_llm2clip", search_paths=[str(_ROOT)], try_relative_path=False,
        allow_inspection=False,
    )  # fmt: skip
    by_heading = defaultdict(list)
    for name in modeling_llm2clip.__all__:
        target = package.members[name].target_path.split(".")  # package, folder, module, name
        folder = target[1] if len(target) > 3 else ""
        by_heading[_HEADINGS.get(folder, folder.capitalize())].append(name)
    ordered = sorted(by_heading, key=[*_HEADINGS.values(), *by_heading].index)
    sections = [_API_INTRODUCTION]
    for heading in ordered:
        names = (f"::: modeling_llm2clip.{name}\n" for name in sorted(by_heading[heading]))
        sections += [f"## {heading}\n", *names]
    return "\n".join(sections)


def read_help(*command: str) -> str:
    """Return what `llm2clip COMMAND --help` prints, without colors, 100 characters wide."""
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "modeling_llm2clip", *command, "--help"],
        cwd=_ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip() + "\n"


def find_commands(overview: str) -> list[str]:
    """List the commands in the order of `llm2clip --help`: every module of `cli/` that it names."""
    folder = _ROOT / "modeling_llm2clip" / "cli"
    modules = {path.stem.replace("_", "-") for path in folder.glob("*.py")}
    words = re.findall(r"^\s+([a-z][a-z-]*)\s{2,}\S", overview, re.MULTILINE)
    return [word for word in dict.fromkeys(words) if word in modules]


def _fence(text: str) -> str:
    return f"```text\n{text}```\n"


if __name__ == "__main__":
    main()
