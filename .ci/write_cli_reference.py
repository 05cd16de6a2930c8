"""Writes docs/reference/cli.md from the help texts of `llm2clip`, before the site is built.

python .ci/write_cli_reference.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PAGE = _ROOT / "docs" / "reference" / "cli.md"
_INTRODUCTION = """# Command line

Generated from `llm2clip --help` and the help of each command. `python -m modeling_llm2clip` is the
same program.

| exit code | meaning |
| --- | --- |
| 0 | success |
| 1 | `doctor` found a check that fails |
| 2 | an error, or a wrong command line |
| 130, 143 | stopped by Ctrl-C or SIGTERM |
"""


def main() -> None:
    """Write the page."""
    overview = read_help()
    sections = [_INTRODUCTION, _fence(overview)]
    commands = find_commands(overview)
    if not commands:
        raise RuntimeError(f"No command is listed in `llm2clip --help`:\n{overview}")
    for command in commands:
        sections += [f"## llm2clip {command}\n", _fence(read_help(command))]
    _PAGE.write_text("\n".join(sections), encoding="utf-8")


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
