"""Notebooks run from top to bottom on a tiny model, and are stored without outputs."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tiny_folders import export_tiny_model

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@every_notebook
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert not [cell.source for cell in code if cell.outputs or cell.execution_count]


@every_notebook
def test_notebooks_define_nothing(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        lines = cell.source.splitlines() if cell.cell_type == "code" else []
        assert not [
            line for line in lines if line.lstrip().startswith(("def ", "class ", "%", "!"))
        ]


@pytest.mark.slow
@every_notebook
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The start of the alignment needs the bias.
    model = export_tiny_model(tmp_path / "model", visual_projection_bias=True)
    monkeypatch.setenv("LLM2CLIP_MODEL", str(model))
    monkeypatch.setenv("LLM2CLIP_STEPS", "4")
    monkeypatch.delenv("LLM2CLIP_PICTURES", raising=False)
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
    pictures = [output for cell in code for output in cell.outputs if "image/png" in str(output)]
    shows = any("display(" in cell.source for cell in code)
    assert bool(pictures) == shows
