"""Counts the code that a reader of the package has to read, from its sources alone.

    python -m benchmarks.codebase.code_counts
    python -m benchmarks.codebase.code_counts --checkout CHECKOUT --by folder

A line of code proper holds something other than a comment or a docstring; the strings under the
fields of options are docstrings. A definition is a function or class of a module; it is used once
if its name is read in one place besides imports. Folder circles are pairs of folders that share a
parent and import each other, lazily or not.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import tokenize
from collections import Counter, defaultdict
from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = "modeling_llm2clip"
_LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Source:
    """One file of the package.

    Attributes:
        path: Below the package.
        text: Content.
        tree: Syntax tree.
    """

    path: PurePath
    text: str
    tree: ast.Module

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Every node of the syntax tree, as `ast.walk` yields them."""
        return list(ast.walk(self.tree))

    def list_docstring_lines(self) -> set[int]:
        """List the numbers of the lines of docstrings."""
        return {line for node in self.nodes for line in _docstring_lines(node)}

    def count_lines(self) -> tuple[int, int]:
        """Lines of code proper, and lines of docstrings."""
        docstrings = self.list_docstring_lines()
        used = {
            line
            for token in tokenize.generate_tokens(io.StringIO(self.text).readline)
            if token.type not in _LAYOUT
            for line in range(token.start[0], token.end[0] + 1)
        }
        return len(used - docstrings), len(docstrings)

    def count_statements(self) -> int:
        """Statements of the syntax tree (`ast.stmt`), which no packing of lines changes."""
        return sum(isinstance(node, ast.stmt) for node in self.nodes)

    def list_imported(self) -> set[str]:
        """List what the file imports, by absolute names: `a.b.c` for `from a.b import c`.

        Imports for type checkers and those inside functions count too.
        """
        package = [_PACKAGE, *self.path.parts[:-1]]
        names: set[str] = set()
        for node in self.nodes:
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parent = package[: len(package) - node.level + 1] if node.level else []
                source = [*parent, *([node.module] if node.module else [])]
                names.update(".".join([*source, alias.name]) for alias in node.names)
        return names

    def list_imported_modules(self, modules: Set[str]) -> set[str]:
        """List which of some modules the file imports, or imports something from."""
        imported = self.list_imported()
        return (imported | {name.rpartition(".")[0] for name in imported}) & modules

    @property
    def module(self) -> str:
        """Dotted name."""
        return ".".join([_PACKAGE, *self.path.with_suffix("").parts])


def main() -> None:
    """Print the counts of one checkout as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkout", type=Path, default=_ROOT, help="checkout to count")
    parser.add_argument("--by", choices=["all", "folder"], default="all")
    options = parser.parse_args()
    sources = read_sources(options.checkout)
    counts = count_sources(sources) if options.by == "all" else count_by_folder(sources)
    print(json.dumps(counts, indent=2))


def read_sources(checkout: Path) -> list[Source]:
    """Read every file of the package.

    Args:
        checkout: Root of the checkout; the package is a folder in it.

    Returns:
        The files, sorted by path.
    """
    package = checkout / _PACKAGE
    paths = sorted(package.rglob("*.py"))
    texts = {path: path.read_text("utf-8") for path in paths}
    return [
        Source(path.relative_to(package), text, ast.parse(text)) for path, text in texts.items()
    ]


def count_sources(sources: list[Source]) -> dict[str, Any]:
    """Count lines, files, uses and circles.

    Args:
        sources: All files of the package.

    Returns:
        JSON fields by name.
    """
    lines = [source.count_lines() for source in sources]
    roots = [source for source in sources if len(source.path.parts) == 1]
    uses = _count_uses(sources)
    importers = _count_importers(sources)
    return {
        "statements": sum(source.count_statements() for source in sources),
        "code_lines": sum(code for code, _ in lines),
        "docstring_lines": sum(docstring for _, docstring in lines),
        "files": len(sources),
        "modules_with_one_importer": sum(count == 1 for count in importers.values()),
        "definitions": len(uses),
        "definitions_used_once": sum(count == 1 for count in uses.values()),
        "folder_circles": find_folder_circles(sources),
        "uploaded_files": sum(not source.path.name.startswith("_") for source in roots),
        "root_modules": sum(not source.path.name.startswith("__") for source in roots),
    }


def count_by_folder(sources: list[Source]) -> dict[str, dict[str, int]]:
    """Count the lines and files of each folder at the top of the package.

    Args:
        sources: All files of the package.

    Returns:
        `statements`, `docstring_lines` and `files` by folder; the root's own files are `.`.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for source in sources:
        folder = source.path.parts[0] if len(source.path.parts) > 1 else "."
        counts[folder].update(
            statements=source.count_statements(),
            docstring_lines=len(source.list_docstring_lines()),
            files=1,
        )
    return {folder: dict(count) for folder, count in sorted(counts.items())}


def find_folder_circles(sources: list[Source]) -> list[list[str]]:
    """Find pairs of folders with one parent that import each other.

    Args:
        sources: All files of the package.

    Returns:
        The pairs, as paths below the package.
    """
    modules = {source.module: source.path for source in sources}
    arrows = set()
    for source in sources:
        for name in source.list_imported_modules(modules.keys()):
            arrows.add(_diverge(source.path.parent, modules[name].parent))
    pairs = {tuple(sorted(map(str, arrow))) for arrow in arrows if arrow and arrow[::-1] in arrows}
    return [list(pair) for pair in sorted(pairs)]


def _diverge(importing: PurePath, imported: PurePath) -> tuple[PurePath, PurePath] | None:
    """The two folders with one parent in which the paths part, if neither holds the other."""
    pairs = zip(importing.parts, imported.parts, strict=False)
    for depth, (ours, theirs) in enumerate(pairs):
        if ours != theirs:
            common = PurePath(*importing.parts[:depth])
            return common / ours, common / theirs
    return None


def _count_importers(sources: list[Source]) -> Counter[str]:
    modules = {source.module for source in sources}
    return Counter(
        name
        for source in sources
        for name in source.list_imported_modules(modules) - {source.module}
    )


def _count_uses(sources: list[Source]) -> dict[tuple[str, str], int]:
    """Reads of every definition, by module and name; equal names share their reads."""
    read: Counter[str] = Counter()
    for source in sources:
        for node in source.nodes:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                read[node.id] += 1
            elif isinstance(node, ast.Attribute):
                read[node.attr] += 1
    return {
        (source.module, statement.name): read[statement.name]
        for source in sources
        for statement in source.tree.body
        if isinstance(statement, _DEFINITIONS)
    }


def _docstring_lines(node: ast.AST) -> range:
    """Lines of a statement that is a string alone."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        if isinstance(node.value.value, str):
            assert node.end_lineno is not None
            return range(node.lineno, node.end_lineno + 1)
    return range(0)


if __name__ == "__main__":
    main()
