"""Optional packages: each is in the extra that a command names, and named before any work."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from modeling_llm2clip import _extras
from modeling_llm2clip.__main__ import LINE
from modeling_llm2clip._extras import MissingExtraError, Need, require

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "modeling_llm2clip"
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
EXTRAS = SETUP["options.extras_require"]
# Distributions that are not called as what they hold is imported.
DISTRIBUTIONS = {"faiss": "faiss-cpu", "open_clip": "open_clip_torch",
                 "prometheus_client": "prometheus-client",
                 "python_multipart": "python-multipart",
                 "sentence_transformers": "sentence-transformers"}  # fmt: skip
# Installed by what `install_requires` names: huggingface_hub has the first three, cyclopts the
# next, transformers the next, pydantic the next three; fastapi the next, onnxscript the last.
INDIRECT = {"fsspec", "httpcore", "httpcore2", "rich", "tokenizers", "annotated_types",
            "pydantic_core", "typing_extensions", "starlette", "onnx_ir"}  # fmt: skip
REQUIRED = {"PIL", "accelerate", "cyclopts", "huggingface_hub", "loky",
            "numpy", "pyarrow", "pydantic", "safetensors", "tabulate", "threadpoolctl", "torch",
            "torchvision", "tqdm",
            "transformers", "yaml"}  # fmt: skip
# Extras whose packages a command imports before it looks at what it was given.
ALWAYS_NAMED = {"train": "train", "demo": "demo", "finetune-llm": "train", "serve": "serve"}
ONLY_TESTS = {"test", "all", "docs", "dev"}
# Its packages hold others back.
NOT_IN_ALL = {"s3"}


def all_needs() -> list[Need]:
    values = vars(_extras).values()
    alone = [value for value in values if isinstance(value, Need)]
    together = (_extras.DEMO, _extras.CAPTION_TUNING, _extras.ONNX_EXPORT, _extras.SERVE)
    return [*alone, *(need for needs in together for need in needs)]


def resolve(extra: str) -> set[str]:
    """Names of the distributions of an extra, with those of the extras that it takes over."""
    found: set[str] = set()
    for line in EXTRAS[extra].strip().splitlines():
        if own := re.match(r"modeling_llm2clip\[([\w,-]+)\]", line):
            for other in own[1].split(","):
                found |= resolve(other)
        elif name := re.match(r"[\w.-]+", line):
            found.add(name[0])
    return found


def is_only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def walk(node: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported, and those of its functions if asked for."""
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_only_for_types(child) or (is_function and not into_functions):
            continue
        yield child
        yield from walk(child, into_functions=into_functions)


def find_module(parts: tuple[str, ...]) -> Path | None:
    path = PACKAGE.joinpath(*parts)
    candidates = [path / "__init__.py", *([path.with_suffix(".py")] if parts else [])]
    return next((file for file in candidates if file.is_file()), None)


@cache
def list_imports(file: Path, *, into_functions: bool) -> tuple[set[Path], set[str]]:
    """Our modules that a module imports, and others by the first part of their names."""
    own: set[Path] = set()
    others: set[str] = set()
    folder = file.relative_to(PACKAGE).parts[:-1]
    for node in walk(ast.parse(file.read_text(encoding="utf-8")), into_functions=into_functions):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            others.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1]
            base += tuple(node.module.split(".")) if node.module else ()
            targets = [base, *((*base, alias.name) for alias in node.names)]
            own |= {module for module in map(find_module, targets) if module}
    return own, others - sys.stdlib_module_names


def list_of_command(command: str) -> set[str]:
    """What is imported as soon as a command runs: by its module, and by whatever that imports."""
    start = PACKAGE / "cli" / f"{command.replace('-', '_')}.py"
    waiting, seen, found = [start], {start}, set()
    while waiting:
        file = waiting.pop()
        own, others = list_imports(file, into_functions=file == start)
        found |= others
        waiting += own - seen
        seen |= own
    return found


def test_what_is_missing_is_in_the_extra_that_is_named() -> None:
    for need in all_needs():
        assert DISTRIBUTIONS.get(need.module, need.module) in resolve(need.extra), need


def test_what_a_command_imports_at_once_is_required_or_in_its_extra() -> None:
    for command in (name for name in LINE if not name.startswith("-")):
        extra = ALWAYS_NAMED.get(command)
        optional = list_of_command(command) - REQUIRED - INDIRECT
        there = resolve(extra) if extra else set()
        assert {DISTRIBUTIONS.get(module, module) for module in optional} <= there, command


def test_the_walk_finds_what_is_imported_far_from_the_command() -> None:
    assert {"peft", "datasets", "sentence_transformers"} <= list_of_command("finetune-llm")
    assert "peft" not in list_of_command("align")  # imports it for a LoRA only


def test_every_optional_import_can_be_named() -> None:
    named = {need.module for need in all_needs()}
    named |= {"mteb"}  # of a module that only mteb's users import
    named |= {"pillow_heif"}  # without it HEIC is skipped, and the count says what to install
    for file in PACKAGE.rglob("*.py"):
        others = list_imports(file, into_functions=True)[1]
        assert others - {"modeling_llm2clip"} <= REQUIRED | INDIRECT | named, file


def test_all_has_every_extra_and_training_what_the_demos_model_needs() -> None:
    others = EXTRAS.keys() - ONLY_TESTS - NOT_IN_ALL
    rest = set().union(*(resolve(extra) for extra in others))
    assert rest <= resolve("all") <= resolve("test")
    assert "timm" in resolve("train")


# Blocks packages as if they were not installed, runs commands, prints what came of each.
RUN_BLOCKED = """
import contextlib, io, json, sys
runs = json.loads(sys.stdin.read())
blocked = set()
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from modeling_llm2clip.__main__ import main
for modules, words in runs:
    blocked.clear()
    blocked.update(modules)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main(words)
    costly = [name for name in ("torch", "transformers", "PIL") if name in sys.modules]
    print(json.dumps([code, errors.getvalue(), costly]))
"""
# Packages that are not there, a command, the extra that it names.
BLOCKED_RUNS = [
    (["timm"], "demo", "demo"),
    (["gguf", "peft"], "demo", "demo"),
    (["peft"], "finetune-llm PLAIN DATA new", "train"),
    (["datasets"], "finetune-llm PLAIN DATA new", "train"),
    (["sentence_transformers"], "finetune-llm PLAIN DATA new", "train"),
    (["peft"], "align PLAIN DATA new --vision-training lora", "train"),
    (["peft"], "align PLAIN DATA new --text-training lora", "train"),
    (["gguf"], "build PLAIN gone.gguf new --prompt none", "gguf"),
    (["peft"], "build PLAIN gone new --prompt none --lora gone", "train"),
    (["gguf"], "build gone gone.gguf new --prompt none", "gguf"),
    (["timm"], "convert gone new --source-format eva02 --text-model gone", "timm"),
    (["timm"], "convert gone new --source-format siglip2 --text-model gone", "timm"),
    (["timm"], "train RECIPE", "demo"),
    (["lancedb"], "index PLAIN DATA new", "search"),
    (["lancedb"], "search DATA sentence", "search"),
    (["lancedb"], "tag PLAIN DATA --labels gone --index new", "search"),
    (["ray"], "embed PLAIN DATA new --modality image --engine ray", "ray"),
    (["fastapi"], "serve PLAIN", "serve"),
    (["gradio"], "serve PLAIN", "serve"),
    (["lancedb"], "serve PLAIN --index DATA", "search"),
    (["open_clip"], "evaluate PLAIN --datasets emoji --tasks retrieval length", "baselines"),
]


def write_half_models(folder: Path) -> dict[str, str]:
    """Folders with the one file that says what they need, and nothing to work with."""
    for name in ("PLAIN", "DATA"):
        (folder / name).mkdir()
    config = {"model_type": "llm2clip", "vision_config": {"model_type": "clip_vision_model"}}
    (folder / "PLAIN" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    recipe = "vision_model: embedded\ntext_model: embedded\noutput: new\ndata: DATA\n"
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    places = {"PLAIN": "PLAIN", "DATA": "DATA", "RECIPE": "recipe.yaml"}
    return {name: str(folder / place) for name, place in places.items()}


def test_every_command_names_its_extra_before_it_does_anything(tmp_path: Path) -> None:
    places = write_half_models(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    runs = []
    for modules, line, _ in BLOCKED_RUNS:
        for name, place in places.items():
            line = re.sub(rf"\b{name}\b", place, line)
        runs.append([modules, line.split()])
    done = subprocess.run(
        [sys.executable, "-c", RUN_BLOCKED], cwd=tmp_path, input=json.dumps(runs),
        capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) == len(BLOCKED_RUNS)
    for (modules, line, extra), (code, message, costly) in zip(BLOCKED_RUNS, outcomes, strict=True):
        assert code == 2, line
        assert message.startswith(f"llm2clip {line.split()[0]}: not installed: "), (line, message)
        assert all(f"{module} (" in message for module in modules), (line, message)
        assert f'pip install "modeling_llm2clip[{extra}]"' in message, (line, message)
        # Their imports take the seconds, and nothing is read or computed without them.
        assert costly == [], line
    assert sorted(tmp_path.rglob("*")) == before


def test_several_missing_packages_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("timm", "lancedb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"timm \(.*; lancedb \(.*\[search,timm\]"):
        require(_extras.TIMM_TOWER, _extras.LANCEDB)


def test_a_folder_that_is_called_like_a_package_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match="no_such_package"):
        require(Need("no_such_package", "train", "is a folder of data"))
