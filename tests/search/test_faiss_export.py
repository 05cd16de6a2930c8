"""What FAISS gets: the same images under the same paths, found by the same queries."""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np
import pytest
from indexes import (
    build,
    make_database,
    make_embeddings,
    make_text_embeddings,
    save_images,
    save_model,
)

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.search import faiss_export
from modeling_llm2clip.search.faiss_export import export_faiss

pytestmark = pytest.mark.usefixtures("own_cache")


def test_faiss_finds_what_the_index_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = save_model(tmp_path / "model"), save_images(tmp_path / "images", count=6)
    file = tmp_path / "new" / "images.faiss"
    words = ["index", str(model), str(images), str(tmp_path / "index"), "--faiss", str(file)]
    assert main(words) == 0
    shown = capsys.readouterr().err
    assert str(file) in shown and "6 images in" in shown
    index, _ = build(model, images, tmp_path / "index")
    written = json.loads((tmp_path / "new" / "images.faiss.json").read_text(encoding="utf-8"))
    assert written["model"] == index.model
    queries = make_text_embeddings(3, width=index.about.width)
    cosines, ids = faiss.read_index(str(file)).search(queries, 4)
    for result, row, numbers in zip(index.search(queries, top_k=4), cosines, ids, strict=True):
        assert [str(path) for path, _ in result.hits] == [written["paths"][n] for n in numbers]
        assert [cosine for _, cosine in result.hits] == pytest.approx(row, abs=1e-5)
    assert main(words) == 2
    assert "images.faiss exists. Name a new file" in capsys.readouterr().err


def test_many_images_get_partitions_and_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss_export, "FEWEST_ROWS", 2000)
    images = make_embeddings(2500)
    database = make_database(tmp_path / "index", images)
    paths = json.loads(export_faiss(database, tmp_path, tmp_path / "file").read_text())["paths"]
    assert len(paths) == len(set(paths)) == 2500
    index = faiss.read_index(str(tmp_path / "file"))
    assert index.ntotal == 2500 and index.nlist == 50 and index.nprobe == 6
    queries = make_embeddings(20, seed=5)
    found = index.search(queries, 1)[1][:, 0]
    wanted = np.argmax(queries @ images.T, axis=1)
    hits = [int(Path(paths[n]).stem) == w for n, w in zip(found, wanted, strict=True)]
    assert np.mean(hits) > 0.8  # an eighth of the partitions, half precision


def test_an_empty_index_is_not_exported(tmp_path: Path) -> None:
    database = make_database(tmp_path / "index", make_embeddings(1))
    database.remove(["000000.png"])
    with pytest.raises(ValueError, match="holds no image"):
        export_faiss(database, tmp_path, tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]
