"""An index of images: what it finds for sentences, images and embeddings; what it refuses."""

from __future__ import annotations

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest
import torch
from indexes import build, make_embeddings, save_images, save_model
from PIL import Image
from shared_models import ROUNDING, shared_model
from tiny import draw_noise

from modeling_llm2clip import LLM2CLIPProcessor, LLM2CLIPVisionModel
from modeling_llm2clip.search.image_files import list_images
from modeling_llm2clip.search.image_index import ImageIndex

SENTENCES = ["a dog", "two red apples on a wooden table"]

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, ten images, and the index of them, which no test may change."""
    folder = tmp_path_factory.mktemp("place")
    save_images(folder / "images", count=10)
    build(save_model(folder / "model"), folder / "images", folder / "index")
    return folder


@pytest.fixture
def index(place: Path) -> ImageIndex:
    return ImageIndex.open(place / "index", device="cpu")


@pytest.fixture(scope="module")
def wanted(place: Path) -> dict[str, Any]:
    """Paths, and the model's own embeddings of images and sentences."""
    paths = list_images((place / "images").resolve()).readable
    # Of the folder, whose image processor may be another class, with other rounding.
    model, processor = shared_model()[0], LLM2CLIPProcessor.from_pretrained(place / "model")
    with torch.no_grad():
        found = model(**processor(text=SENTENCES, images=[str(path) for path in paths]))
    return {"paths": paths, "images": found.image_embeds, "texts": found.text_embeds}


def require_best(result: Any, cosines: torch.Tensor, paths: list[Path], top_k: int) -> None:
    best = cosines.topk(min(top_k, len(paths)))
    assert [path for path, _ in result.hits] == [paths[row] for row in best.indices]
    assert [cosine for _, cosine in result.hits] == pytest.approx(
        best.values.tolist(), abs=ROUNDING
    )


def test_the_best_images_are_those_of_the_greatest_cosine(
    index: ImageIndex, wanted: dict[str, Any]
) -> None:
    for top_k in (1, 4, 50):
        results = index.search(SENTENCES, top_k=top_k)
        for sentence, result, text in zip(SENTENCES, results, wanted["texts"], strict=True):
            assert result.query == sentence
            require_best(result, wanted["images"] @ text, wanted["paths"], top_k)
    alone = index.search(SENTENCES[0], top_k=4)  # encoded in another batch
    require_best(alone, wanted["images"] @ wanted["texts"][0], wanted["paths"], 4)


def test_a_query_image_finds_itself_whether_it_is_a_path_or_open(
    index: ImageIndex, wanted: dict[str, Any]
) -> None:
    path = wanted["paths"][3]
    with Image.open(path) as opened:
        by_path, by_image = index.search([path, opened], top_k=10)
    assert by_path.hits[0][0] == by_path.query_image == path
    require_best(by_path, wanted["images"] @ wanted["images"][3], wanted["paths"], 10)
    assert by_image.hits == by_path.hits and by_image.query_image is None


def test_several_parts_are_one_query_by_the_mean_of_their_embeddings(
    index: ImageIndex, wanted: dict[str, Any]
) -> None:
    path = wanted["paths"][3]
    (found,) = index.search([[SENTENCES[0], path]], top_k=10)
    mean = torch.nn.functional.normalize(wanted["texts"][0] + wanted["images"][3], dim=0)
    require_best(found, wanted["images"] @ mean, wanted["paths"], 10)
    assert (found.query, found.query_image) == (f"{SENTENCES[0]} + {path}", path)


def test_embeddings_are_queries_of_any_length_and_need_no_model(
    place: Path, wanted: dict[str, Any]
) -> None:
    index = ImageIndex.open(place / "index")
    index._database.about = dataclasses.replace(index.about, model="nowhere/at-all")
    for embeds in (wanted["texts"], (7 * wanted["texts"]).numpy()):
        for result, text in zip(index.search(embeds, top_k=3), wanted["texts"], strict=True):
            require_best(result, wanted["images"] @ text, wanted["paths"], 3)


def test_a_sentence_does_not_load_the_vision_tower(
    index: ImageIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLM2CLIPVisionModel, "from_pretrained", None)
    assert index.search("a dog").hits


def test_threads_that_search_at_once_find_what_one_finds(
    index: ImageIndex,
) -> None:
    alone = [index.search(text, top_k=3) for text in SENTENCES]
    queries = SENTENCES * 10
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: index.search(text, top_k=3), queries))
    assert found == alone * 10


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("path LIKE 'below/%' AND height > 45", 2),
        ("modified > date '2020-01-01' AND taken IS NULL", 10),
        ("bytes < 0", 0),
    ],
)
def test_a_filter_is_sql_over_the_columns(index: ImageIndex, where: str, count: int) -> None:
    assert index.count(where) == count
    (result,) = index.search(["a dog"], top_k=20, where=where)
    assert len(result.hits) == count == len(result.columns)
    everything = index.search("a dog", top_k=20)
    kept = {path for path, _ in result.hits}
    assert list(result.hits) == [hit for hit in everything.hits if hit[0] in kept]
    assert all(set(row) == set(index.columns) for row in result.columns)


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ([], "nothing to search for"),
        (["  "], "has a blank sentence"),
        ([3], r"number 1 is \['int'\]"),
        ([[]], "number 1 is empty"),
        ([Path("nowhere.png")], "nowhere.png: no such image"),
        (np.ones((2, 3)), r"shape \(2, 3\)\. Pass \(queries, "),
        (np.ones(8), "Pass \\(queries"),
        (np.diag([0, np.nan, *[1] * 30]), r"\[0, 1\] are zero, NaN or infinite"),
    ],
)
def test_a_query_that_is_none_is_refused(index: ImageIndex, query: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        index.search(query)
    with pytest.raises(ValueError, match="top_k=0 must be at least 1"):
        index.search("a dog", top_k=0)


def test_an_index_lists_its_model_images_columns_and_embeddings(
    index: ImageIndex, wanted: dict[str, Any], place: Path
) -> None:
    assert index.model == str((place / "model").resolve())
    assert len(index) == 10
    assert index.columns["taken"] == "timestamp[us]"
    rows = {
        path: embed
        for paths, embeds in index.iterate_embeddings()
        for path, embed in zip(paths, embeds, strict=True)
    }
    assert set(rows) == set(wanted["paths"])
    for path, embed in zip(wanted["paths"], wanted["images"].numpy(), strict=True):
        assert rows[path] == pytest.approx(embed, abs=ROUNDING)


def test_another_model_is_refused_by_name_and_a_copy_is_not(place: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", vision="vit")
    with pytest.raises(
        ValueError,
        match=rf"for the model .*model, and the embeddings of {other} differ: .*image architect",
    ):
        ImageIndex.open(place / "index", model=other)
    copy = shutil.copytree(place / "model", tmp_path / "copy")
    assert ImageIndex.open(place / "index", model=copy).search("a dog").hits


def test_a_model_that_changed_where_it_is_is_refused(place: Path, tmp_path: Path) -> None:
    model = shutil.copytree(place / "model", tmp_path / "model")
    build(model, place / "images", tmp_path / "index")
    config = model / "config.json"
    config.write_text(config.read_text().replace('"vision_pooling"', '"vision_pooling" '))
    assert ImageIndex.open(tmp_path / "index").search("a dog").hits  # written anew, and the same
    shutil.rmtree(model)
    save_model(model, llm="qwen3")
    with pytest.raises(ValueError, match=r"embeddings of .* differ: .*text architecture"):
        ImageIndex.open(tmp_path / "index").search("a dog")
    shutil.rmtree(model)
    with pytest.raises(ValueError, match=r"which can no longer be loaded.*--model"):
        ImageIndex.open(tmp_path / "index").search("a dog")


def test_a_moved_folder_is_found_where_it_is_said_to_be(place: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(place / "images", tmp_path / "copied"))
    hits = ImageIndex.open(place / "index", image_dir=copied).search("a dog").hits
    assert all(path.is_relative_to(copied) and path.exists() for path, _ in hits)
    with pytest.raises(ValueError, match="no such folder"):
        ImageIndex.open(place / "index", image_dir=tmp_path / "nowhere")


def test_what_is_not_an_index_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept embeddings")
    (tmp_path / "empty").mkdir()
    lancedb.connect(tmp_path / "foreign").create_table("about", pa.table({"a": [1]}))
    lancedb.connect(tmp_path / "images").create_table("images", pa.table({"a": [1]}))
    for name, error in {
        "nowhere": "no such database. Create one with: llm2clip index",
        "file": "is not an index",
        "empty": "is not an index",
        "foreign": "is not an index",
        "images": "is not an index",
    }.items():
        with pytest.raises(ValueError, match=error):
            ImageIndex.open(tmp_path / name)
    assert not (tmp_path / "nowhere").exists()
    for name in ("file", "foreign", "images"):  # nor is it written to
        with pytest.raises(ValueError, match=r"is not an index|has a table"):
            build(place / "model", place / "images", tmp_path / name)
    with pytest.raises(ValueError, match="is not an index"):
        build(place / "model", place / "images", place / "model")


def test_another_version_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modeling_llm2clip.search.index_about.FORMAT_VERSION", 7)
    build(place / "model", place / "images", tmp_path / "index")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format_version 7, but this package reads 1"):
        ImageIndex.open(tmp_path / "index")


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("*/_versions/*", "emptied"), ("*/_versions/*", "removed"),
        ("images.lance/data/*", "removed"), ("images.lance/data/*", "rubbish"),
        ("about.lance/data/*", "emptied"), ("about.lance/data/*", "rubbish"),
    ],
)  # fmt: skip
def test_a_damaged_database_is_an_error_that_says_so(
    place: Path, tmp_path: Path, what: str, how: str
) -> None:
    folder = Path(shutil.copytree(place / "index", tmp_path / "index"))
    width = ImageIndex.open(folder).about.width
    files = [path for path in folder.glob(what) if path.is_file()]
    assert files
    for file in files:
        if how == "removed":
            file.unlink()
        else:
            file.write_bytes(b"" if how == "emptied" else b"rubbish" * 100)
    with pytest.raises(ValueError, match=r"index (cannot be|is damaged|is not an index)"):
        ImageIndex.open(folder).search(make_embeddings(1, width=width))


def test_an_index_without_images_says_so(place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place / "index", tmp_path / "index"))
    index = ImageIndex.open(folder)
    index._database.remove(
        [row for names, _ in index._database.iterate_embeddings() for row in names]
    )
    with pytest.raises(ValueError, match=r"holds no images\. Add a folder with"):
        ImageIndex.open(folder).search("a dog")


def test_a_draw_is_decided_by_the_path(place: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in "cab":
        draw_noise().save(tmp_path / "images" / f"{name}.png")
    index, _ = build(place / "model", tmp_path / "images", tmp_path / "index")
    assert [path.stem for path, _ in index.search("a dog").hits] == ["a", "b", "c"]
