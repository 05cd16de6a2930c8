"""Runs the notebooks from top to bottom and stores their outputs in place.

    python examples/run_notebooks.py            # all of them
    python examples/run_notebooks.py 02 04      # those whose names begin so

They run on the model that `llm2clip demo` writes at the root of the repository. Variables such as
`LLM2CLIP_MODEL` are ignored, so that the stored outputs are those of the defaults. A notebook that
fails, or prints a path of this machine, stays as it was.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parent
_SECONDS_PER_CELL = 600


def main() -> int:
    """Run the chosen notebooks and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", help="beginnings of file names; default: all")
    names = tuple(parser.parse_args().names) or ("",)
    chosen = [file for file in sorted(EXAMPLES.glob("*.ipynb")) if file.name.startswith(names)]
    if not chosen:
        parser.error(f"no notebook in {EXAMPLES} begins with {names}")
    for name in [name for name in os.environ if name.startswith("LLM2CLIP_")]:
        del os.environ[name]
    for file in chosen:
        started = time.monotonic()
        print(f"{file.name} …", end=" ", flush=True)
        notebook = nbformat.read(file, as_version=4)
        run(notebook)
        require_no_machine_path(notebook)
        nbformat.write(notebook, file)
        print(f"{time.monotonic() - started:.0f} s", flush=True)
    return 0


def run(notebook: Any) -> None:
    """Run a notebook and keep its outputs, without progress bars and timings."""
    metadata = dict(notebook.metadata)
    NotebookClient(
        notebook,
        timeout=_SECONDS_PER_CELL,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(EXAMPLES)}},
    ).execute()
    notebook.metadata = nbformat.from_dict(metadata)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _join_stdout(
                [output for output in cell.outputs if output.get("name") != "stderr"]
            )


def require_no_machine_path(notebook: Any) -> None:
    """Raise ValueError when an output holds a path that is there on this machine alone."""
    places = {str(EXAMPLES.parent), str(Path.home()), tempfile.gettempdir(), sys.prefix}
    for number, cell in enumerate(notebook.cells):
        shown = str(cell.get("outputs", ""))
        if shown_paths := [place for place in places if len(place) > 1 and place in shown]:
            raise ValueError(
                f"Cell {number} shows {shown_paths}. Print a name, not a path:\n{shown}"
            )


def _join_stdout(outputs: list[Any]) -> list[Any]:
    joined: list[Any] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


if __name__ == "__main__":
    sys.exit(main())
