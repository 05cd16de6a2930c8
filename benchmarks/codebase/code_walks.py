"""Counts the functions and files of the package that one thing passes on its way.

    python -m benchmarks.codebase.code_walks
    python -m benchmarks.codebase.code_walks --checkout CHECKOUT --list caption

Four ways are walked with a tiny model: a caption from `extract` to its row of the store, an image
from `index` to its row of the table, a text from POST /v1/embeddings to the answer, and a pair from
the batch of one step of `align` to the end of that step. Each function counts once, in the order of
the first calls. A move is a step of this order into another file; a re-entry is a move into a file
that was visited before.

Left out are:

- loading: `from_pretrained` and the folders `model_folders` and `building`, with everything that
  they call, such as checks of golden embeddings, fingerprints, and the tally of unfamiliar images;
  `left_out` counts these functions;
- the command line and the reading of configs: ways start at Python functions;
- the first time: each way is walked twice, and the second time is traced (`sys.setprofile`, in all
  threads), so imports and functions behind a filled cache do not count;
- the work of `align` before and after a step: checks, plans, held-out images, last fit, writing;
- generated methods, lambdas and comprehensions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = "modeling_llm2clip"
_LOADING = ("model_folders", "building")


class Function(NamedTuple):
    """A function of the package: its file below the package, its name and its first line."""

    file: str
    name: str
    line: int


class CallTracer:
    """Collects the functions of the package that are called, those of loading apart.

    Args:
        package: Folder of the package.
    """

    def __init__(self, package: Path) -> None:
        # Dictionaries, which keep the order of the first calls.
        self.functions: dict[Function, None] = {}
        self.left_out: dict[Function, None] = {}
        self._package = f"{package}{os.sep}"
        self._is_active = False
        self._state = threading.local()
        threading.setprofile(self._see)  # also in threads that outlive the traced call

    def start(self) -> None:
        """Trace from here on, in this thread and in those that this tracer has seen start."""
        self._is_active = True
        sys.setprofile(self._see)

    def stop(self) -> None:
        """Trace no longer."""
        sys.setprofile(None)
        self._is_active = False

    @contextmanager
    def trace(self) -> Iterator[None]:
        """Trace the calls inside."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        if not self._is_active or event not in ("call", "return"):
            return
        code, state = frame.f_code, self._state
        loading = getattr(state, "loading", None)
        if event == "return":
            if frame is loading:
                state.loading = None
            return
        if loading is None and self._is_loading(code):
            state.loading = loading = frame
        if code.co_filename.startswith(self._package) and not code.co_name.startswith("<"):
            file = code.co_filename.removeprefix(self._package)
            functions = self.functions if loading is None else self.left_out
            functions[Function(file, code.co_name, code.co_firstlineno)] = None

    def _is_loading(self, code: CodeType) -> bool:
        if code.co_name == "from_pretrained":
            return True
        file = code.co_filename.removeprefix(self._package)
        return file != code.co_filename and Path(file).parts[0] in _LOADING


def main() -> None:
    """Walk all ways of one checkout and print the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkout", type=Path, default=_ROOT, help="checkout to measure")
    parser.add_argument("--list", choices=WALKS, help="print the functions of one way instead")
    options = parser.parse_args()
    if options.list:
        for function in walk(options.checkout, options.list)[0]:
            print(f"{function.file}:{function.line} {function.name}")
        return
    print(json.dumps(measure_walks(options.checkout), indent=2))


def measure_walks(checkout: Path) -> dict[str, dict[str, int]]:
    """Count functions, files, moves and re-entries of every way.

    Args:
        checkout: Root of the checkout, with its `tests/helpers`.

    Returns:
        `functions`, `files`, `moves`, `re_entries` and `left_out` by the name of the way.
    """
    counts = {}
    for name in WALKS:
        functions, left_out = walk(checkout, name)
        counts[name] = {**count_moves(functions), "left_out": len(left_out)}
    return counts


def count_moves(functions: list[Function]) -> dict[str, int]:
    """Count the functions of a way, their files, and how often the way changes between files.

    Args:
        functions: In the order of their first calls.
    """
    files = [function.file for function in functions]
    moves = sum(file != before for before, file in pairwise(files))
    num_files = len(set(files))
    # Every file but the first one is entered once for the first time.
    re_entries = moves - max(num_files - 1, 0)
    return {"functions": len(files), "files": num_files, "moves": moves, "re_entries": re_entries}


def walk(checkout: Path, name: str) -> tuple[list[Function], list[Function]]:
    """Walk one way in a process of its own, which imports the package of the checkout.

    Args:
        checkout: Root of the checkout.
        name: One of `WALKS`.

    Returns:
        The functions of the way in the order of their first calls, and those of loading.

    Raises:
        subprocess.CalledProcessError: The way cannot be walked in this checkout.
    """
    checkout = checkout.resolve()
    code = f"import code_walks; code_walks.walk_here({str(checkout)!r}, {name!r})"
    paths = [checkout, checkout / "tests" / "helpers", Path(__file__).parent]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, stdout=subprocess.PIPE,
            text=True, check=True,
        )  # fmt: skip
    functions, left_out = json.loads(done.stdout)
    return [Function(*each) for each in functions], [Function(*each) for each in left_out]


def walk_here(checkout: str, name: str) -> None:
    """Walk one way in this process and print its functions as JSON.

    Args:
        checkout: Root of the checkout that is on the path.
        name: One of `WALKS`.
    """
    tracer = CallTracer(Path(checkout) / _PACKAGE)
    printed = os.dup(1)
    os.dup2(2, 1)  # standard output has the result alone
    WALKS[name](tracer)
    os.write(printed, json.dumps([[*tracer.functions], [*tracer.left_out]]).encode())


def _walk_caption(tracer: CallTracer) -> None:
    from modeling_llm2clip.configs.encoding_config import ExtractConfig

    model = _save_model()
    config = ExtractConfig(device="cpu", show_progress=False)

    def extract_one(name: str, _: Path) -> None:
        from modeling_llm2clip import extract, load_records

        extract(model, load_records(f"data-{name}"), f"store-{name}", config, modality="text")

    _walk_twice(tracer, extract_one)


def _walk_image(tracer: CallTracer) -> None:
    from modeling_llm2clip.configs.encoding_config import IndexConfig
    from modeling_llm2clip.search.image_index import ImageIndex

    model = _save_model()
    config = IndexConfig(show_progress=False, device="cpu")
    _walk_twice(
        tracer,
        lambda name, data: ImageIndex.build(
            model, data, Path(f"index-{name}"), config, report=lambda _: None
        ),
    )


def _walk_request(tracer: CallTracer) -> None:
    from fastapi.testclient import TestClient
    from served_apps import open_service

    from modeling_llm2clip.serving.app import create_app

    with ExitStack() as stack:
        service = stack.enter_context(open_service())
        client = stack.enter_context(TestClient(create_app(service)))

        def ask(name: str, _: Path) -> None:
            body = {"model": "tiny", "input": f"a dog {name}"}
            client.post("/v1/embeddings", json=body).raise_for_status()

        _walk_twice(tracer, ask)


def _walk_pair(tracer: CallTracer) -> None:
    from aligning import prepare
    from transformers.trainer_callback import DefaultFlowCallback

    original = DefaultFlowCallback.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """Trace from the end of the second step to the end of the third."""
        if state.global_step == 2:
            tracer.start()
        elif state.global_step == 3:
            tracer.stop()
        return original(self, args, state, control, **more)

    DefaultFlowCallback.on_step_end = on_step_end
    # Nothing is logged, saved or held out between these steps.
    prepare(Path("prepared")).align_stored(
        Path("aligned"), max_steps=4, logging_steps=100, save_steps=100, held_out_ratio=0.0
    )


def _walk_twice(tracer: CallTracer, run: Callable[[str, Path], object]) -> None:
    run("first", _write_data("first"))
    data = _write_data("second")
    with tracer.trace():
        run("second", data)


def _write_data(name: str) -> Path:
    """Write captioned images; the second dataset has one more, so that nothing of it is cached."""
    from aligning import write_data

    return write_data(Path(f"data-{name}"), count=1 if name == "first" else 2)


def _save_model() -> Path:
    from tiny import tiny_model

    model, processor = tiny_model("clip", "llama")
    model.save_pretrained("model")
    processor.save_pretrained("model")
    return Path("model")


WALKS: dict[str, Callable[[CallTracer], None]] = {
    "caption": _walk_caption,
    "image": _walk_image,
    "request": _walk_request,
    "pair": _walk_pair,
}


if __name__ == "__main__":
    main()
