"""Notebooks run from top to bottom on a tiny model, and their outputs on the demo's are stored."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import nbformat
import pytest
from machine_paths import MACHINE_PATH
from nbclient import NotebookClient
from tiny_folders import export_tiny_model

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))

ON_A_MODEL = [path for path in NOTEBOOKS if "LLM2CLIP_MODEL" in path.read_text(encoding="utf-8")]

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 8 and len(ON_A_MODEL) == 7


def list_code(path: Path) -> list[nbformat.NotebookNode]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model, which no test may change; the start of the alignment needs the bias."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    return export_tiny_model(folder, visual_projection_bias=True)


@every_notebook
def test_stored_outputs_are_those_of_one_run_without_an_error_on_no_machine(path: Path) -> None:
    cells = list_code(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        last = ast.parse(cell.source).body[-1]
        shows = isinstance(last, ast.Expr) or "print(" in cell.source or "display(" in cell.source
        assert bool(cell.outputs) == shows, cell.source
        for output in cell.outputs:
            assert output.output_type in {"stream", "display_data", "execute_result"}
            shown = [output.get("text", ""), *map(str, output.get("data", {}).values())]
            assert not [text for text in shown if MACHINE_PATH.search(text)], cell.source


@every_notebook
def test_notebooks_define_nothing(path: Path) -> None:
    lines = [line.lstrip() for cell in list_code(path) for line in cell.source.splitlines()]
    assert not [line for line in lines if line.startswith(("def ", "class ", "%", "!"))]


@pytest.mark.slow
@pytest.mark.parametrize("path", ON_A_MODEL, ids=lambda path: path.name)
def test_a_missing_model_says_what_to_run(
    path: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = next(c.source for c in list_code(path) if "find_demo_model" in c.source)
    for missing in ("", str(tmp_path / "model")):
        monkeypatch.setenv("LLM2CLIP_MODEL", missing)
        with pytest.raises(FileNotFoundError, match="Run `llm2clip demo` at the root"):
            exec(compile(first, path.name, "exec"), {})
    monkeypatch.setenv("LLM2CLIP_MODEL", str(model))
    exec(compile(first, path.name, "exec"), {})


@pytest.mark.slow
@every_notebook
def test_notebooks_run(
    path: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM2CLIP_MODEL", str(model))
    monkeypatch.setenv("LLM2CLIP_STEPS", "4")
    monkeypatch.delenv("LLM2CLIP_IMAGES", raising=False)
    # The kernel is another process: it must find this package, installed or not.
    search_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", search_path.rstrip(os.pathsep))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )  # fmt: skip
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    if path.name.startswith("07"):  # as many as were asked for, whatever the model finds
        assert "12 photographs\n" in [output.get("text") for c in code for output in c.outputs]
    images = [output for cell in code for output in cell.outputs if "image/" in str(output)]
    shows = any("display(" in cell.source for cell in code)
    assert bool(images) == shows
