"""Processes that are killed while they write a folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITER = """
import sys, time
from pathlib import Path
from modeling_llm2clip.data.atomic_files import atomic_folder

with atomic_folder(Path(sys.argv[1])) as unfinished:
    (unfinished / "model.safetensors").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(600)
"""


@contextmanager
def living_writer(folder: Path) -> Iterator[Path]:
    """Yield the hidden folder of a process that is writing `folder`; kill it at the end."""
    before = set(folder.parent.glob(".*"))
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None and process.stdout.readline() == "writing\n"
            (hidden,) = set(folder.parent.glob(".*")) - before
            yield hidden
        finally:
            process.kill()


def leave_unfinished(folder: Path) -> Path:
    """Kill a process that writes `folder`; returns the hidden folder that it left."""
    with living_writer(folder) as hidden:
        pass
    assert (hidden / folder.name / "model.safetensors").is_file()
    return hidden
