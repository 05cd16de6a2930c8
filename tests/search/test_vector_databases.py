"""The page on vector databases is true: each finds in the files what brute force finds."""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_folders import export_tiny_model

import modeling_llm2clip as llm2clip
from modeling_llm2clip.__main__ import main

PAGE = Path(__file__).parents[2] / "docs" / "vector-databases.md"
SLOW = ("LanceDB", "Qdrant", "Chroma")  # their imports take seconds
PACKAGES = {
    "FAISS": "faiss",
    "LanceDB": "lancedb",
    "Qdrant": "qdrant_client",
    "Chroma": "chromadb",
    "DuckDB": "duckdb",
}


def find_block(heading: str, language: str) -> str:
    """The first block in a language below a heading."""
    section = re.split(rf"^#+ {heading}$", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1]
    match = re.search(rf"^```{language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert match, f"no block of {language} below {heading!r}"
    return match[1]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder, in which the page's first commands were run."""
    folder = tmp_path_factory.mktemp("reader")
    export_tiny_model(folder / "aligned" / "model")
    images = folder / "my-images"
    images.mkdir()
    lines = []
    for number in range(40):
        color = (number * 6, 255 - number, number * 7 % 256)
        Image.new("RGB", (32, 32), color).save(images / f"{number}.png")
        lines.append({"image": f"{number}.png", "captions": [f"number {number} in one color"]})
    text = "\n".join(map(json.dumps, lines))
    (images / "captions.jsonl").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in find_block("Vector databases", "bash").splitlines():
            assert main([*shlex.split(command)[1:], "--rows-per-shard", "16"]) == 0
    return folder


@pytest.fixture(scope="module")
def loaded(reader: Path) -> dict[str, Any]:
    """The names of the block that all others need."""
    namespace: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(reader)
        exec(compile(find_block("Load them", "python"), PAGE.name, "exec"), namespace)
    return namespace


@pytest.mark.parametrize(
    "database",
    ["FAISS", "DuckDB", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_every_database_finds_what_brute_force_finds(
    database: str,
    reader: Path,
    loaded: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if find_spec(PACKAGES[database]) is None:
        pytest.skip(f"needs {PACKAGES[database]}")
    (tmp_path / "image-embeddings").symlink_to(reader / "image-embeddings")
    monkeypatch.chdir(tmp_path)
    namespace = dict(loaded)
    exec(compile(find_block(database, "python"), f"{PAGE.name}, {database}", "exec"), namespace)
    cosines = namespace["embeddings"] @ namespace["query"][0]
    found = [cosines[namespace["names"].index(name)] for name in namespace["found"]]
    # Compared by cosine, because two images may be equally near; float32 in another order.
    np.testing.assert_allclose(found, np.sort(cosines)[::-1][:5], atol=1e-6)
    assert len(set(namespace["found"])) == 5


def test_an_index_goes_to_faiss_with_its_paths(
    reader: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faiss = pytest.importorskip("faiss")
    monkeypatch.chdir(reader)
    assert main(["index", "aligned/model", "my-images", "my-index", "--device", "cpu"]) == 0
    page = PAGE.with_name("encode-and-search.md").read_text("utf-8")
    [block] = [
        text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "faiss" in text
    ]
    namespace: dict[str, Any] = {"llm2clip": llm2clip}
    exec(compile(block, "encode-and-search.md", "exec"), namespace)
    for path, embeddings in namespace["index"].iterate_embeddings():
        _, rows = faiss.read_index("my-images.faiss").search(embeddings, 1)
        assert [namespace["paths"][row] for row in rows[:, 0]] == path


def test_the_page_loads_every_database_in_five_lines_and_searches_it_in_two() -> None:
    headings = re.findall(r"^### (.+)$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert headings == [*PACKAGES, "Milvus", "pgvector"]
    for heading in headings:
        lines = find_block(heading, "python").splitlines()
        lines = [line for line in lines if line and "import" not in line]
        num_loading = next(n for n, line in enumerate(lines) if re.search(r"nearest|query", line))
        assert num_loading <= 5, heading
        assert len(lines) - num_loading <= (5 if heading == "DuckDB" else 2), heading
