"""The files of the package, which each process parses once for all rules about code."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from benchmarks.codebase.code_counts import Source, read_sources

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "modeling_llm2clip"


@cache
def read_package() -> dict[str, Source]:
    """Read all files of the package, by module name."""
    return {source.module: source for source in read_sources(ROOT)}
