"""Measures the code base: its size and layout, its start-up time, and its tests.

    python benchmarks/code_size.py --label after --run-tests

Any checkout of this package is measured alike, whatever its layout: sources are read without
importing them. Times are medians over fresh processes; the first process warms the file cache and
does not count. `--label before` measured the commit that the redesign started from, in a checkout
of its own (`--checkout`).
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from provenance import describe_processor

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = "modeling_llm2clip"
_LONG_FUNCTION = 40
_LONG_FILE = 500
_SHORT_FILE = 25
_IMPORT = f"""
import time
started = time.perf_counter()
import {_PACKAGE}
print(time.perf_counter() - started)
"""
# A flag opens its own entry of a help text, perhaps after a short form or inside a drawn box.
_FLAG = re.compile(r"^[\s│*]*(?:-\w,?\s+)?(--(?:\[no-\])?[a-z][\w-]*)")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> None:
    """Measure one checkout, print the entry, and write it beside the other one."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkout", type=Path, default=_ROOT, help="what to measure")
    parser.add_argument("--label", choices=["before", "after"], required=True)
    parser.add_argument("--runs", type=int, default=5, help="processes for each time")
    tests = parser.add_mutually_exclusive_group()
    tests.add_argument("--run-tests", action="store_true", help="time `pytest -q`")
    tests.add_argument("--test-seconds", type=float, help="a time measured before")
    parser.add_argument(
        "--output", type=Path, default=_ROOT / "benchmarks" / "results" / "code_size.json"
    )
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    entry = {
        "command": _describe_command(options.checkout),
        "commit": _read_commit(checkout),
        "hardware": f"{describe_processor()}, {os.cpu_count()} CPUs",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "pytest")},
        },
        **measure_sources(checkout),
        **measure_start(checkout, options.runs),
        **measure_flags(checkout),
        **measure_tests(checkout, run=options.run_tests, seconds=options.test_seconds),
    }
    recorded = json.loads(options.output.read_text("utf-8")) if options.output.is_file() else {}
    recorded[options.label] = entry
    options.output.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(entry, indent=2))


def measure_sources(checkout: Path) -> dict[str, Any]:
    """Count lines, files, functions, repeated file names and import circles.

    Lines of a file are all of its lines; lines of a function leave out its docstring.

    Args:
        checkout: root of the checkout; the package is a folder in it.

    Returns:
        JSON fields; paths are relative to the package.
    """
    package = checkout / _PACKAGE
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(package.rglob("*.py"))}
    lines = {path: _count_lines(path) for path in trees}
    inits = [path for path in trees if path.name == "__init__.py"]
    modules = [path for path in trees if path.name != "__init__.py"]
    by_name = defaultdict(list)
    for path in modules:
        by_name[path.name].append(_relative(path, package))
    functions = {
        f"{_relative(path, package)}:{node.name}": num_lines
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, _FUNCTIONS)
        and (num_lines := _count_function_lines(node)) > _LONG_FUNCTION
    }
    tests = sorted((checkout / "tests").rglob("*.py"))
    return {
        "package_lines": sum(lines.values()),
        "package_files": len(modules),
        "init_files": len(inits),
        "init_lines": sum(lines[path] for path in inits),
        "test_lines": sum(map(_count_lines, tests)),
        "test_files": len(tests),
        "readme_lines": _count_lines(checkout / "README.md"),
        f"functions_over_{_LONG_FUNCTION}_lines": len(functions),
        "longest_functions": dict(sorted(functions.items(), key=lambda item: -item[1])[:5]),
        f"files_over_{_LONG_FILE}_lines": {
            _relative(path, package): lines[path] for path in modules if lines[path] > _LONG_FILE
        },
        f"files_under_{_SHORT_FILE}_lines": {
            _relative(path, package): lines[path] for path in modules if lines[path] < _SHORT_FILE
        },
        "repeated_file_names": {name: paths for name, paths in by_name.items() if len(paths) > 1},
        "import_circles": find_import_circles(trees, package),
    }


def find_import_circles(trees: dict[Path, ast.Module], package: Path) -> list[list[str]]:
    """Find groups of modules that import each other, lazy imports included.

    Args:
        trees: syntax tree of every file of the package.
        package: folder of the package.

    Returns:
        Each group of two or more modules that can reach each other, sorted. A package's own
        `__init__` is left out: importing any module below it runs it.
    """
    names = {_module_name(path, package): path for path in trees if path.name != "__init__.py"}
    imports = {
        name: {other for other in _find_imports(trees[path], name) if other in names} - {name}
        for name, path in names.items()
    }
    reached = {name: _find_reachable(name, imports) for name in imports}
    circles = {
        tuple(sorted({name} | {other for other in reached[name] if name in reached[other]}))
        for name in imports
        if name in reached[name]
    }
    return [list(circle) for circle in sorted(circles)]


def measure_start(checkout: Path, runs: int) -> dict[str, Any]:
    """Time `import modeling_llm2clip` and `llm2clip --help` in fresh processes.

    Args:
        checkout: root of the checkout.
        runs: processes for each of the two.

    Returns:
        Medians in seconds. The import is timed inside the process, the command from outside.
    """
    imported, helped = [], []
    for _ in range(runs + 1):
        imported.append(float(_run_python(checkout, "-c", _IMPORT).stdout))
        started = time.perf_counter()
        _run_python(checkout, "-m", _PACKAGE, "--help")
        helped.append(time.perf_counter() - started)
    return {
        "import_seconds": round(statistics.median(imported[1:]), 3),
        "help_seconds": round(statistics.median(helped[1:]), 3),
        "runs": runs,
    }


def measure_flags(checkout: Path) -> dict[str, Any]:
    """Count the flags of every command, and those whose help shows a default.

    Args:
        checkout: root of the checkout; commands are found by the names of its modules.

    Returns:
        `commands` with the number of their flags, the sum, distinct names, and how many show a
        default.

    Raises:
        RuntimeError: no command prints a help text.
    """
    helps = {name: text for name in _guess_commands(checkout) if (text := _help(checkout, name))}
    if not helps:
        raise RuntimeError(f"No command of {checkout} prints a help text.")
    flags = {name: _read_flags(text) for name, text in helps.items()}
    defaults = [
        bool(re.search(r"\bdefault\b", text)) for f in flags.values() for text in f.values()
    ]
    return {
        "commands": {name: len(found) for name, found in sorted(flags.items())},
        "num_flags": len(defaults),
        "num_distinct_flags": len({flag for found in flags.values() for flag in found}),
        "num_flags_with_default": sum(defaults),
    }


def measure_tests(checkout: Path, *, run: bool, seconds: float | None) -> dict[str, Any]:
    """Count the tests of the checkout and, where asked, time them.

    Args:
        checkout: root of the checkout.
        run: whether to run `pytest -q`.
        seconds: time that was measured before, recorded as it is.

    Returns:
        `num_tests` without slow and GPU tests, `num_tests_deselected`, and the test time.

    Raises:
        RuntimeError: the tests fail, or pytest collects none.
    """
    listed = _run_python(checkout, "-m", "pytest", "--collect-only", "-q", *_no_cache()).stdout
    counts = re.search(r"(\d+)(?:/\d+)? tests collected(?: \((\d+) deselected\))?", listed)
    if counts is None:
        raise RuntimeError(f"pytest collected nothing in {checkout}: {listed[-500:]}")
    result: dict[str, Any] = {
        "num_tests": int(counts[1]),
        "num_tests_deselected": int(counts[2] or 0),
        "test_command": "pytest -q",
        "test_seconds": seconds,
    }
    if run:
        started = time.perf_counter()
        done = _run_python(checkout, "-m", "pytest", "-q", *_no_cache(), check=False)
        result["test_seconds"] = round(time.perf_counter() - started, 1)
        result["test_summary"] = done.stdout.strip().splitlines()[-1]
        if done.returncode:
            raise RuntimeError(f"The tests of {checkout} fail: {result['test_summary']}")
    return result


def _run_python(
    checkout: Path, *command: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "", "COLUMNS": "120", "NO_COLOR": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *command], cwd=checkout, env=environment,
        capture_output=True, text=True, check=check,
    )  # fmt: skip


def _read_commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _describe_command(checkout: Path) -> str:
    """The command line, with a word in place of a path that other machines do not have."""
    words = ["CHECKOUT" if word == str(checkout) else word for word in sys.argv[1:]]
    return " ".join(["python", "benchmarks/code_size.py", *words])


def _no_cache() -> list[str]:
    return ["-p", "no:cacheprovider"]


def _count_lines(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


def _relative(path: Path, package: Path) -> str:
    return path.relative_to(package).as_posix()


def _count_function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring and those of the functions inside it."""
    assert node.end_lineno is not None
    total = node.end_lineno - node.lineno + 1
    for inner in ast.walk(node):
        if isinstance(inner, (*_FUNCTIONS, ast.ClassDef)) and ast.get_docstring(inner) is not None:
            docstring = inner.body[0]
            assert docstring.end_lineno is not None
            total -= docstring.end_lineno - docstring.lineno + 1
    return total


def _module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _find_imports(tree: ast.Module, name: str) -> Iterator[str]:
    """Yield the modules that a module may import, `from a import b` as both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = name.split(".")[: -node.level] if node.level else []
            source = ".".join([*parent, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _find_reachable(start: str, imports: dict[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = list(imports[start])
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting.extend(imports[name])
    return reached


def _guess_commands(checkout: Path) -> Iterable[str]:
    folders = (checkout / _PACKAGE / name for name in ("cli", "commands"))
    modules = (path for folder in folders for path in folder.glob("*.py"))
    return sorted(path.stem.replace("_", "-") for path in modules if path.stem != "__init__")


def _help(checkout: Path, command: str) -> str | None:
    """Help text of a command, or None where a module is a helper."""
    done = _run_python(checkout, "-m", _PACKAGE, command, "--help", check=False)
    return done.stdout if done.returncode == 0 else None


def _read_flags(text: str) -> dict[str, str]:
    """Help of each flag but `--help` and `--version`, under the first of its names."""
    found: dict[str, str] = {}
    flag = ""
    # The usage line of argparse repeats every flag; entries begin after the first blank line.
    for line in text.partition("\n\n")[2].splitlines():
        opened = _FLAG.match(line)
        flag = opened[1] if opened else flag if line.strip() else ""
        if flag:
            found[flag] = f"{found.get(flag, '')} {line.strip()}"
    return {flag: help_ for flag, help_ in found.items() if flag not in ("--help", "--version")}


if __name__ == "__main__":
    main()
