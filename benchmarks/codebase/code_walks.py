"""Counts the functions and files of the package that one thing passes on its way.

    python -m benchmarks.codebase.code_walks
    python -m benchmarks.codebase.code_walks --checkout CHECKOUT --list caption

Four ways are walked with a tiny model: a caption from `extract` to its row of the store, an image
from `index` to its row of the table, a text from POST /v1/embeddings to the answer, and a pair from
`align` to an optimizer step. Each is walked twice, since the first time also imports and fills
caches; the calls of the second time are traced (`sys.setprofile`, in all threads). Loading a model
is another way: what `from_pretrained` and the folders of loading call does not count. Nor do
generated methods, lambdas and comprehensions.
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
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = "modeling_llm2clip"
_LOADING = ("model_folders", "building")
_Function = tuple[str, str, int]


class CallTracer:
    """Collects the functions of the package that are called, without those of loading.

    Args:
        package: folder of the package.
    """

    def __init__(self, package: Path) -> None:
        self.functions: set[_Function] = set()
        self._package = f"{package}{os.sep}"
        self._state = threading.local()

    @contextmanager
    def trace(self) -> Iterator[None]:
        """Trace this thread and those that start meanwhile."""
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return"):
            return
        code, state = frame.f_code, self._state
        inside = getattr(state, "loading", None)
        if inside is not None:
            if event == "return" and frame is inside:
                state.loading = None
        elif event == "call":
            if self._is_loading(code):
                state.loading = frame
            elif code.co_filename.startswith(self._package) and not code.co_name.startswith("<"):
                file = code.co_filename.removeprefix(self._package)
                self.functions.add((file, code.co_name, code.co_firstlineno))

    def _is_loading(self, code: CodeType) -> bool:
        if code.co_name == "from_pretrained":
            return True
        file = code.co_filename.removeprefix(self._package)
        return file != code.co_filename and Path(file).parts[0] in _LOADING


def main() -> None:
    """Walk all ways of one checkout and print the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkout", type=Path, default=_ROOT, help="what to measure")
    parser.add_argument("--list", choices=WALKS, help="print the functions of one way instead")
    options = parser.parse_args()
    if options.list:
        for file, name, line in sorted(walk(options.checkout, options.list)):
            print(f"{file}:{line} {name}")
        return
    print(json.dumps(measure_walks(options.checkout), indent=2))


def measure_walks(checkout: Path) -> dict[str, dict[str, int]]:
    """Count functions and files of every way.

    Args:
        checkout: root of the checkout, with its `tests/helpers`.

    Returns:
        `functions` and `files` by the name of the way.
    """
    counts = {}
    for name in WALKS:
        functions = walk(checkout, name)
        counts[name] = {
            "functions": len(functions),
            "files": len({file for file, *_ in functions}),
        }
    return counts


def walk(checkout: Path, name: str) -> set[_Function]:
    """Walk one way in a process of its own, which imports the package of the checkout.

    Args:
        checkout: root of the checkout.
        name: one of `WALKS`.

    Returns:
        File below the package, name and first line of each function.

    Raises:
        subprocess.CalledProcessError: the way cannot be walked in this checkout.
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
    return {(file, function, line) for file, function, line in json.loads(done.stdout)}


def walk_here(checkout: str, name: str) -> None:
    """Walk one way in this process and print its functions as JSON.

    Args:
        checkout: root of the checkout that is on the path.
        name: one of `WALKS`.
    """
    tracer = CallTracer(Path(checkout) / _PACKAGE)
    printed = os.dup(1)
    os.dup2(2, 1)  # what commands print is not a result
    WALKS[name](tracer)
    os.write(printed, json.dumps(sorted(tracer.functions)).encode())


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

    threading.setprofile(_when_asked(tracer))  # threads that compute start with the service
    with ExitStack() as stack:
        service = stack.enter_context(open_service())
        client = stack.enter_context(TestClient(create_app(service)))

        def ask(name: str, _: Path) -> None:
            body = {"model": "tiny", "input": f"a dog {name}"}
            client.post("/v1/embeddings", json=body).raise_for_status()

        _walk_twice(tracer, ask)
        threading.setprofile(None)


def _walk_pair(tracer: CallTracer) -> None:
    from aligning import prepare

    prepared = prepare(Path("prepared"))
    _walk_twice(tracer, lambda name, _: prepared.align_stored(Path(name), max_steps=2))


_IS_ASKED = threading.Event()


def _when_asked(tracer: CallTracer) -> Callable[[FrameType, str, Any], None]:
    """A profile for threads that live longer than what is traced."""

    def see(frame: FrameType, event: str, argument: Any) -> None:
        if _IS_ASKED.is_set():
            tracer._see(frame, event, argument)

    return see


def _walk_twice(tracer: CallTracer, run: Callable[[str, Path], object]) -> None:
    run("first", _write_data("first"))
    data = _write_data("second")
    _IS_ASKED.set()
    with tracer.trace():
        run("second", data)
    _IS_ASKED.clear()


def _write_data(name: str) -> Path:
    """A folder with one captioned image, which is another for each name."""
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
