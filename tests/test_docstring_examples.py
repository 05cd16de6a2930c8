"""The examples in the docstrings of the public API run as they stand, in a folder like a reader's.

An example that needs the Hub, hours or real weights is not run. It still has to call what the
package exports, with arguments that exist.
"""

from __future__ import annotations

import ast
import builtins
import doctest
import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import draw_noise
from tiny_folders import export_tiny_model

import modeling_llm2clip as llm2clip

PUBLIC: dict[str, Any] = {name: getattr(llm2clip, name) for name in llm2clip.__all__}
CAPTIONS = ["Two dogs on a beach.", "Dogs play in the sand."]


@cache
def list_examples() -> dict[str, doctest.DocTest]:
    """Return the examples of every public name and of the methods of public classes."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for name, documented in PUBLIC.items():
        for test in finder.find(documented, name, globs={}, module=False):
            if test.examples:
                found[test.name] = test
    return found


every_example = pytest.mark.parametrize("name", list_examples())


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples name: models, an image, captioned images and their caption store."""
    folder = tmp_path_factory.mktemp("reader")
    export_tiny_model(folder / "llm2clip-demo" / "model")
    (folder / "my-model").symlink_to(folder / "llm2clip-demo" / "model")
    draw_noise().save(folder / "dog.png")
    images = folder / "my-images"
    images.mkdir()
    lines = [{"image": "beach.jpg", "captions": CAPTIONS}]
    lines += [
        {"image": f"{n}.jpg", "captions": [f"Photograph {n}.", f"The {n}th of them."]}
        for n in range(1, 20)
    ]
    for number, line in enumerate(lines):
        Image.new("RGB", (48, 40), (12 * number, 90, 255 - 12 * number)).save(
            images / str(line["image"])
        )
    text = "\n".join(json.dumps(line) for line in lines)
    (images / "captions.jsonl").write_text(text, encoding="utf-8")
    records = llm2clip.load_records(images)
    llm2clip.extract(folder / "my-model", records, folder / "captions", modality="text")
    return folder


@pytest.mark.usefixtures("own_cache")
@every_example
def test_the_example_runs(
    name: str, reader_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in reader_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    test = list_examples()[name]
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    test.globs = dict(PUBLIC)
    failed, _ = runner.run(test, out=report.append, clear_globs=False)
    assert failed == 0, "".join(report)


@every_example
def test_the_example_calls_public_names_as_they_are_defined(name: str) -> None:
    known = {*PUBLIC, *dir(builtins), "datasets"}
    for example in list_examples()[name].examples:
        nodes = list(ast.walk(ast.parse(example.source)))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        known |= {alias.asname or alias.name for node in imports for alias in node.names}
        assert {node.id for node in names} <= known
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                require_fitting_arguments(node.func.id, node)


def require_fitting_arguments(name: str, call: ast.Call) -> None:
    """Raise TypeError if a public function or class does not take these arguments."""
    if name in PUBLIC:
        keywords = {str(keyword.arg): keyword.value for keyword in call.keywords}
        inspect.signature(PUBLIC[name]).bind(*call.args, **keywords)


def test_every_public_function_has_an_example() -> None:
    functions = {name for name, found in PUBLIC.items() if inspect.isfunction(found)}
    assert functions - set(list_examples()) == set()
