"""The rules of this code base, held by tests: sizes, imports, what is uploaded to the Hub."""

from __future__ import annotations

import ast
import importlib
import os
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path, PurePath

import pytest
from package_sources import PACKAGE, ROOT, read_package
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import modeling_llm2clip
from benchmarks.codebase.code_counts import Source, count_by_folder, find_folder_circles

BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
# Files at the package's root without an underscore are copied beside the weights.
UPLOADED = sorted(path for path in PACKAGE.glob("*.py") if not path.stem.startswith("_"))
# Installed wherever transformers, torch and an image library are, or Python's own.
PRESENT_EVERYWHERE = {
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "PIL",
} | sys.stdlib_module_names

MOST_LINES = 500
MOST_LINES_OF = {"modeling_llm2clip.py": 700}
FEWEST_LINES = 20
SHORTER: set[str] = set()
MOST_FUNCTION_LINES = 60
# Statements (`ast.stmt`) by folder at the last release; packing lines does not change them. A
# folder may grow by HEADROOM until the next release. Beyond that, new code replaces old, or the
# commit raises the budget and says why.
BUDGETS = {
    ".": 2620,  # several vision towers as one, whose configuration is checked
    "building": 1277,  # several vision towers as one, and embedded ones
    "cli": 978,
    "configs": 796,  # what the paper trains with, several towers, embedded-small
    "conversion": 536,
    "data": 4330,
    "demo": 86,
    "doctor": 1068,
    "embedding": 1102,
    "encoding": 971,  # several vision towers, compiled training, bfloat16 on a CPU
    "evaluation": 2640,
    "model_folders": 1517,  # load_heads and save_heads; each tower is compared by itself
    "publishing": 956,
    "recipes": 364,
    "scheduling": 83,
    "search": 1378,
    "serving": 1517,  # images as strings and parts of `input`, Ollama's and immich's routes
    "training": 4340,  # the paper at its own size: gradient caching, crops, own optimizers
}
NUM_FILES = 264
HEADROOM = 1.02
COSTLY = ("torch", "sentence_transformers", "peft", "accelerate", "datasets", "timm")

# Without `__init__.py`, which runs whenever a module below it is imported.
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}

every_uploaded = pytest.mark.parametrize("path", UPLOADED, ids=lambda path: path.name)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def count_docstring_lines(nodes: Iterable[ast.AST]) -> int:
    """Count the lines of the docstrings of modules, classes and functions."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = (
        node.body[0]
        for node in nodes
        if isinstance(node, documented) and ast.get_docstring(node) is not None
    )
    return sum((each.end_lineno or 0) - each.lineno + 1 for each in docstrings)


def run_python(code: str) -> str:
    """Run code in a fresh process at the repository's root; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_package_has_files_to_check() -> None:
    assert {"configuration_llm2clip.py", "modeling_llm2clip.py", "processing_llm2clip.py"} <= {
        path.name for path in UPLOADED
    }


def find_broken_rules(source: Source) -> Iterator[str]:
    """Find what is too long, exceptions that vanish, and what prints without being a command."""
    path = source.path
    num_lines = len(source.text.splitlines()) - count_docstring_lines(source.nodes)
    if num_lines > MOST_LINES_OF.get(path.name, MOST_LINES):
        yield f"{path}: {num_lines} lines"
    may_print = path.name == "__main__.py" or path.parent.name in {"cli", "demo"}
    for node in source.nodes:
        place = f"{path}:{getattr(node, 'lineno', 1)}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or 0) - node.lineno + 1
            if num_lines > MOST_FUNCTION_LINES:
                num_lines -= count_docstring_lines(ast.walk(node))
            if num_lines > MOST_FUNCTION_LINES:
                yield f"{place}: {node.name} has {num_lines} lines"
        elif isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield f"{place}: bare except"
            if all(isinstance(statement, ast.Pass) for statement in node.body):
                yield f"{place}: the exception vanishes"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not may_print:
            if node.func.id == "print":
                yield f"{place}: only commands print"


def test_every_file_keeps_the_rules() -> None:
    broken = [rule for source in read_package().values() for rule in find_broken_rules(source)]
    assert broken == []


def test_a_broken_rule_is_found() -> None:
    text = "try:\n    print(1)\nexcept:\n    pass\ndef long():\n" + "    x = 1\n" * 500
    source = Source(PurePath("data/a.py"), text, ast.parse(text))
    assert [rule.partition(": ")[2] for rule in find_broken_rules(source)] == [
        "505 lines", "long has 501 lines", "bare except", "the exception vanishes",
        "only commands print",
    ]  # fmt: skip


def test_every_folder_keeps_its_budget() -> None:
    counts = count_by_folder(list(read_package().values()))
    assert counts.keys() == BUDGETS.keys()
    over = {
        folder: (count["statements"], BUDGETS[folder])
        for folder, count in counts.items()
        if count["statements"] > HEADROOM * BUDGETS[folder]
    }
    assert not over
    assert sum(count["files"] for count in counts.values()) <= HEADROOM * NUM_FILES


def test_no_two_folders_import_each_other() -> None:
    assert find_folder_circles(list(read_package().values())) == []


def test_files_are_not_scraps() -> None:
    shorter = {
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES.values()
        if len(path.read_text(encoding="utf-8").splitlines()) < FEWEST_LINES
    }
    assert shorter == SHORTER


def test_only_a_command_has_the_file_name_of_another_module() -> None:
    """A module of `cli/` is named as what it runs; otherwise a name says which file is meant."""
    folders = defaultdict(list)
    for path in MODULES.values():
        if path.parent != PACKAGE / "cli":
            folders[path.name].append(path.parent.relative_to(PACKAGE).as_posix())
    assert not {name: found for name, found in folders.items() if len(found) > 1}


def test_imports_only_point_down() -> None:
    # The command of import-linter itself, through the interpreter that runs the tests.
    code = "from importlinter.cli import lint_imports_command as command; command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],  # finds setup.cfg by itself
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "KEPT" in done.stdout


def test_no_modules_import_each_other() -> None:
    # Raises a CycleError that names the circle.
    order = list(
        TopologicalSorter(
            {name: read_package()[name].list_imported_modules(MODULES.keys()) for name in MODULES}
        ).static_order()
    )
    assert set(order) == set(MODULES)
    # The imports were read: what is uploaded comes before what is built on it.
    model, folders = "modeling_llm2clip.modeling_llm2clip", "modeling_llm2clip.model_folders."
    assert order.index(model) < order.index(f"{folders}model_loading")


def test_of_the_doctor_others_import_its_entry_points_only() -> None:
    doctor = f"{PACKAGE.name}.doctor"
    imported = {
        found
        for name in MODULES
        if not name.startswith(f"{doctor}.")
        for found in read_package()[name].list_imported()
        if f"{found}.".startswith(f"{doctor}.")
    }
    assert imported == {
        f"{doctor}.check_model.check_model",
        f"{doctor}.server_checks.check_server",
    }


@every_uploaded
def test_what_transformers_copies_is_what_python_imports(path: Path) -> None:
    tree = parse(path)
    relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    for node in relative:
        # `from . import x` is not seen by transformers, and folders are not uploaded.
        assert node.level == 1 and node.module and "." not in node.module, f"line {node.lineno}"
    # transformers finds relative imports with a regular expression, in docstrings too.
    assert set(get_relative_imports(path)) == {node.module for node in relative}
    assert {f"{node.module}.py" for node in relative} <= {other.name for other in UPLOADED}


def find_relative_imports(path: Path) -> set[str]:
    """Return the uploaded modules that a file needs, directly or through others."""
    found, waiting = set(), [path]
    while waiting:
        named = set(get_relative_imports(waiting.pop())) - found
        found |= named
        waiting += [path.parent / f"{name}.py" for name in named]
    return found - {path.stem}


@pytest.mark.parametrize("name", ["configuration", "modeling", "processing"])
def test_a_file_that_configs_name_names_itself_every_file_that_it_needs(name: str) -> None:
    # transformers 5.6 to 5.9 copy from a folder what the named file imports, and go no deeper.
    entry = PACKAGE / f"{name}_llm2clip.py"
    assert set(get_relative_imports(entry)) - {entry.stem} == find_relative_imports(entry)


@every_uploaded
def test_uploaded_files_need_only_what_every_user_has(path: Path) -> None:
    # get_imports leaves out imports in `try`, so our own reading of the tree is added.
    absolute = {
        name.split(".")[0]
        for node in ast.walk(parse(path))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
    }
    assert set(get_imports(path)) | absolute <= PRESENT_EVERYWHERE


def test_importing_the_package_costs_no_heavy_import() -> None:
    added = run_python(
        "import sys, transformers; before = set(sys.modules); import modeling_llm2clip\n"
        f"print([n for n in {COSTLY} if n in sys.modules and n not in before])"
    )
    assert added == "[]"


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    for name, home in modeling_llm2clip._HOME.items():
        value = getattr(modeling_llm2clip, name)
        assert value.__doc__ and value.__name__ == name and name in dir(modeling_llm2clip), name
        assert value.__module__ == f"modeling_llm2clip.{home}", name


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known() -> None:
    with pytest.raises(AttributeError, match=r"LLM2CLIPModle.*'LLM2CLIPModel'"):
        _ = modeling_llm2clip.LLM2CLIPModle


FIRST_IMPORTS = (
    "from modeling_llm2clip import LLM2CLIPModel",
    "import modeling_llm2clip; from transformers import AutoProcessor",
    "from modeling_llm2clip import LLM2CLIPConfig",
    "from modeling_llm2clip import LLM2CLIPProcessor",
    "import modeling_llm2clip.building.build_model",
    "import modeling_llm2clip.base_llm2clip",
    "import modeling_llm2clip.embedding.extract",
    "import modeling_llm2clip.model_folders.model_loading",
    "from transformers import AutoModel; import modeling_llm2clip",
)
# Each order needs a fresh process; forks of one that has these libraries already save seconds.
TRY_EACH_FIRST_IMPORT = """
import os, sys
import huggingface_hub, PIL.Image, safetensors.torch, tokenizers, torch, torchvision
for number, first in enumerate(FIRST_IMPORTS):
    child = os.fork()
    if child == 0:
        exec(first)
        import modeling_llm2clip as ours
        from transformers import AutoModel, AutoModelForTextEncoding
        from transformers import AutoModelForZeroShotImageClassification as ZeroShot
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
        key = ours.LLM2CLIPConfig
        known = (
            CONFIG_MAPPING["llm2clip"] is key,
            AutoModel._model_mapping[key][0] is ours.LLM2CLIPModel,
            ZeroShot._model_mapping[key] is ours.LLM2CLIPModel,
            AutoModelForTextEncoding._model_mapping[key] is ours.LLM2CLIPTextModel,
            PROCESSOR_MAPPING[key] is ours.LLM2CLIPProcessor,
        )
        print(number, *known, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_auto_classes_know_the_package_whatever_is_imported_first() -> None:
    printed = run_python(f"FIRST_IMPORTS = {FIRST_IMPORTS}\n{TRY_EACH_FIRST_IMPORT}")
    assert printed.splitlines() == [
        f"{number} True True True True True" for number in range(len(FIRST_IMPORTS))
    ]


def test_every_module_can_be_imported() -> None:
    for name in MODULES.keys() - {f"{PACKAGE.name}.__main__"}:
        importlib.import_module(name)


@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_tests_cannot_reach_the_network(method: str) -> None:
    # 192.0.2.1 is reserved for documents (RFC 5737) and is nobody's address.
    with socket.socket() as client, pytest.raises(OSError, match="must not use the network"):
        getattr(client, method)(("192.0.2.1", 80))
    with pytest.raises(OSError, match="must not use the network"):
        socket.create_connection(("example.org", 80))


@pytest.mark.slow
def test_benchmarks_import_what_is_there() -> None:
    """Also what they import only once they run."""
    scripts = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in BENCHMARKS]
    names = [
        (node.module, alias.name)
        for path in BENCHMARKS
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        and node.module.partition(".")[0] in ("modeling_llm2clip", "benchmarks")
        for alias in node.names
    ]  # fmt: skip
    assert names
    code = f"""
from importlib import import_module
for name in {scripts!r}:
    import_module(name)
for module, name in {sorted(set(names))!r}:
    if not hasattr(import_module(module), name):
        import_module(f"{{module}}.{{name}}")
print("all there")
"""
    assert run_python(code) == "all there"
