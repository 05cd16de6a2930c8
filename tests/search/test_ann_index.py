"""The approximate index: how many partitions a text visits, when it is kept, and its recall."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pytest
from indexes import (
    add_rows,
    build,
    make_database,
    make_embeddings,
    make_text_embeddings,
    save_images,
    save_model,
)

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.search import ann_index, image_index, index_update
from modeling_llm2clip.search.ann_index import (
    find_greatest_cosines,
    measure_ann_recall,
    measure_search,
    needs_training,
    train_ann,
    tune_ann,
)
from modeling_llm2clip.search.image_index import ImageIndex
from modeling_llm2clip.search.index_about import AnnIndex
from modeling_llm2clip.search.index_database import IndexDatabase
from modeling_llm2clip.search.index_update import choose_texts

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[IndexDatabase, np.ndarray]:
    """A database of 3,000 images, of which 30 partitions are made, and queries from elsewhere."""
    monkeypatch.setattr(ann_index, "_ROWS_PER_PARTITION", 100)
    queries = make_text_embeddings(20)
    return make_database(tmp_path / "index", make_embeddings(3000)), queries


def train(database: IndexDatabase, queries: np.ndarray, **options: object) -> ann_index.AnnIndex:
    settings = {"always": True, "report": lambda _: None, **options}
    return train_ann(database, queries, **settings)  # type: ignore[arg-type]


@pytest.mark.slow
def test_as_few_partitions_are_visited_as_find_enough_by_exact_cosines(
    made: tuple[IndexDatabase, np.ndarray],
) -> None:
    database, queries = made
    ann = train(database, queries)
    assert ann.num_partitions == 30 and ann.num_rows == 3000
    greatest = find_greatest_cosines(queries, [make_embeddings(3000)], top_k=10)

    def measure(nprobes: int) -> float:
        tried = dataclasses.replace(ann, nprobes=nprobes)
        return measure_ann_recall(measure_search(database, queries, ann=tried)[0], greatest)

    assert measure(ann.nprobes) == pytest.approx(ann.recall_at_10, abs=1e-3)
    assert ann.recall_at_10 >= 0.97
    assert all(measure(n) < 0.97 for n in ann_index._list_nprobes(30) if n < ann.nprobes)
    rows = {row["path"]: row["cosine"] for row in database.search(queries[0], top_k=10, ann=ann)}
    exact = database.search(queries[0], top_k=3000)
    expected = {row["path"]: row["cosine"] for row in exact if row["path"] in rows}
    assert rows == pytest.approx(expected, abs=1e-6)  # float32, summed in another order


def test_embeddings_of_any_width_get_one(tmp_path: Path) -> None:
    database = make_database(tmp_path / "index", make_embeddings(3000, width=12))
    assert train(database, make_text_embeddings(20, width=12)).recall_at_10 >= 0.97


@pytest.mark.slow
def test_filters_keep_the_recall_even_if_what_passes_is_far_from_the_query(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images are sorted by how near they are to the queries; the nearest do not pass."""
    monkeypatch.setattr(ann_index, "_ROWS_PER_PARTITION", 100)
    images, queries = make_embeddings(3000), make_text_embeddings(60)
    queries = queries[np.argsort(-(queries @ queries[0]))][:20]  # about one topic
    images = images[np.argsort(images @ queries.mean(axis=0))]
    database = make_database(tmp_path / "index", images)
    ann = dataclasses.replace(train(database, queries), nprobes=4)  # if four were enough without
    database.write_about(dataclasses.replace(database.about, ann=ann))
    index, where = ImageIndex.open(tmp_path / "index"), "width < 2500"

    def count_visited(ann: AnnIndex) -> int:
        return len(index._database.search(queries[0], top_k=2500, where=where, ann=ann))

    def measure(most_compared: int) -> float:
        monkeypatch.setattr(image_index, "_MOST_COMPARED", most_compared)
        results = index.search(queries, top_k=10, where=where)
        greatest = find_greatest_cosines(queries, [images[:2500]], top_k=10)
        return measure_ann_recall([[c for _, c in result.hits] for result in results], greatest)

    assert measure(2500) == 1  # compared one by one
    assert measure(2499) >= 0.97
    # How many of the nearest four partitions have is luck, since partitions are drawn at random;
    # that they do not have all that pass is not.
    assert count_visited(ann) < 2500 == count_visited(ann.widen())
    searched: list[AnnIndex | None] = []
    real = index._database.search

    def note(*args: Any, ann: AnnIndex | None = None, **options: Any) -> Any:
        searched.append(ann)
        return real(*args, ann=ann, **options)

    monkeypatch.setattr(index._database, "search", note)
    measure(2499)
    index.search(queries[:1], exact=True)
    index.search(queries[:1])
    assert searched == [*[ann.widen()] * 20, None, ann]


@pytest.mark.parametrize(
    ("query_ms", "min_recall", "reason"),
    [(1.0, 0.9, None), (9.0, 0.9, "slower than exact search"), (1.0, 1.1, "recall below 1.1")],
)
@pytest.mark.slow
def test_it_is_kept_if_it_finds_enough_and_is_faster(
    made: tuple[IndexDatabase, np.ndarray], monkeypatch: pytest.MonkeyPatch,
    query_ms: float, min_recall: float, reason: str | None,
) -> None:  # fmt: skip
    """With times that are given: how long a query takes here decides nothing."""
    measure = ann_index.measure_search

    def measure_here(*args: Any, ann: Any) -> Any:
        return measure(*args, ann=ann)[0], 5.0 if ann is None else query_ms

    monkeypatch.setattr(ann_index, "measure_search", measure_here)
    monkeypatch.setattr(ann_index, "MIN_RECALL", min_recall)
    database, queries = made
    lines: list[str] = []
    ann = train(database, queries, always=False, report=lines.append)
    assert ann.is_used == (reason is None)
    assert (
        bool(lancedb.connect(database.location).open_table("images").list_indices()) == ann.is_used
    )
    assert f"recall@10 {ann.recall_at_10:.3f} on 20 texts" in lines[-1]
    assert reason is None or f"Not kept: {reason}" in lines[-1]


def test_tuning_again_measures_anew_and_visits_as_many_partitions_as_are_needed(
    made: tuple[IndexDatabase, np.ndarray],
) -> None:
    database, queries = made
    ann = dataclasses.replace(train(database, queries), nprobes=1, recall_at_10=1.0)
    greatest = find_greatest_cosines(queries, [make_embeddings(3000)], top_k=10)
    tuned = tune_ann(database, ann, queries)
    cosines, _ = measure_search(database, queries, ann=tuned)
    assert tuned.recall_at_10 == pytest.approx(measure_ann_recall(cosines, greatest), abs=1e-3)
    assert tuned.recall_at_10 >= 0.97


def test_new_and_replaced_images_are_found_and_many_of_them_ask_for_training(
    made: tuple[IndexDatabase, np.ndarray],
) -> None:
    """LanceDB merges rows into a quantized index and optimizes it, in any order."""
    database, queries = made
    ann = train(database, queries)
    database.write_about(dataclasses.replace(database.about, ann=ann))
    assert not needs_training(database)
    for first in (3000, 2990):  # all new, then half of them replaced; where the queries are
        add_rows(database, make_text_embeddings(20, seed=first), first=first)
        for step in ("before they are in the index", "after"):
            rows = database.search(queries[0], top_k=5, ann=ann)
            assert all(int(row["path"][:6]) >= 2990 for row in rows), (first, step)
            assert database.count() == 3020
            database.optimize()
    assert not needs_training(database)
    add_rows(database, make_embeddings(800, seed=4), first=3020)
    assert needs_training(database)


@pytest.mark.slow
def test_a_command_that_asks_for_it_gets_it_measured_with_texts(tmp_path: Path) -> None:
    model, images = save_model(tmp_path / "model"), save_images(tmp_path / "images", count=6)
    index, report = build(model, images, tmp_path / "index", ann="always")
    assert "recall@10 1.000 on 200 texts" in report
    assert index.about.ann is not None and index.about.ann.is_used
    opened = ImageIndex.open(tmp_path / "index")
    assert opened.search(["a dog"]) == opened.search(["a dog"], exact=True)
    assert len(opened.search("a dog", top_k=6).hits) == 6
    (images / "1.png").unlink()
    assert (
        "recall@10 1.000 on 200 texts" in build(model, images, tmp_path / "index", ann="always")[1]
    )
    assert "recall" not in build(model, images, tmp_path / "index", ann="always")[1]  # unchanged
    index, report = build(model, images, tmp_path / "index")
    assert index.about.ann is None and "dropped the approximate index" in report  # six are too few
    assert build(model, images, tmp_path / "never", ann="never")[0].about.ann is None


def test_from_enough_images_on_one_is_built_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = save_model(tmp_path / "model"), save_images(tmp_path / "images", count=6)
    monkeypatch.setattr(index_update, "FEWEST_ROWS", 6)
    monkeypatch.setattr(index_update, "_NUM_QUERIES", 20)
    index, report = build(model, images, tmp_path / "index")
    assert index.about.ann is not None and "Approximate index:" in report
    assert "Approximate" not in build(model, images, tmp_path / "index")[1]  # nor tried each time
    (tmp_path / "labels.txt").write_text("a dog\n")
    words = [str(model), str(images), "--labels", str(tmp_path / "labels.txt")]
    assert main(["tag", *words, "--index", str(tmp_path / "index")]) == 0
    assert ImageIndex.open(tmp_path / "index").about.ann is not None


def test_one_that_misses_too_much_after_an_update_is_trained_again_or_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = save_model(tmp_path / "model"), save_images(tmp_path / "images", count=6)
    build(model, images, tmp_path / "index", ann="always")
    monkeypatch.setattr(index_update, "FEWEST_ROWS", 2)
    monkeypatch.setattr(index_update, "_NUM_QUERIES", 20)
    for module in (ann_index, index_update):
        monkeypatch.setattr(module, "MIN_RECALL", 1.1)
    (images / "1.png").unlink()
    index, report = build(model, images, tmp_path / "index")
    assert index.about.ann is not None and not index.about.ann.is_used
    assert "Not kept: recall below 1.1" in report


def test_recall_is_the_share_of_the_nearest_that_is_found() -> None:
    greatest = np.array([[0.9, 0.8], [0.5, 0.5]])
    assert measure_ann_recall([[0.9, 0.8], [0.5, 0.5]], greatest) == 1
    assert measure_ann_recall([[0.9, 0.7], [0.5, 0.4]], greatest) == 0.5
    assert measure_ann_recall([[0.8], []], greatest) == 0.25
    # An image of an equal cosine is as good as another, and counts once.
    assert measure_ann_recall([[0.9, 0.8, 0.8], [0.5, 0.5, 0.5]], greatest) == 1


def test_the_greatest_cosines_are_those_of_all_embeddings_sorted() -> None:
    images, queries = make_embeddings(40), make_embeddings(3, seed=1)
    expected = -np.sort(-(queries @ images.T), axis=1)
    for parts, top_k in ((1, 1), (1, 50), (7, 10), (40, 1), (40, 50)):
        greatest = find_greatest_cosines(queries, np.array_split(images, parts), top_k=top_k)
        assert greatest == pytest.approx(expected[:, :top_k], abs=1e-6)  # float32, in other blocks


def test_texts_that_measure_recall_are_different_english_captions() -> None:
    texts = choose_texts(200)
    assert len(set(texts)) == 200 and texts == choose_texts(200)
    assert "ein" not in {word for text in texts for word in text.split()}
