"""An open index whose database another process replaces, retrains or removes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from indexes import ANN, add_rows, make_database, make_embeddings

from modeling_llm2clip.search.image_index import ImageIndex
from modeling_llm2clip.search.index_about import EVERY_IMAGE, IndexUnavailableError
from modeling_llm2clip.search.index_database import IndexDatabase

IMAGES = make_embeddings(20)


@pytest.fixture(autouse=True)
def seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_llm2clip.search.index_database._SEEN_AFTER_S", 0)


def make(path: Path, *, model: str = "made", seed: int = 0) -> IndexDatabase:
    """A database of 20 images, said to be of a model."""
    database = make_database(path, make_embeddings(20, seed=seed))
    about = dataclasses.replace(database.about, model=model, fingerprint={"text weights": model})
    database.write_about(about)
    return database


def find_best(index: ImageIndex, embedding: np.ndarray) -> str:
    return index.search(embedding[None], top_k=1)[0].hits[0][0].name


def replace(path: Path, new: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(new, path)


def test_an_index_of_another_model_is_refused_until_the_right_one_is_back(tmp_path: Path) -> None:
    for name, model, seed in (("db", "a", 0), ("of-b", "b", 1), ("of-a", "a", 2)):
        make(tmp_path / name, model=model, seed=seed)
    index = ImageIndex.open(tmp_path / "db")
    assert find_best(index, IMAGES[3]) == "000003.png"
    replace(tmp_path / "db", tmp_path / "of-b")
    for search in (lambda: find_best(index, IMAGES[3]), lambda: len(index), index.count):
        with pytest.raises(
            IndexUnavailableError,
            match=r"for the model a, but was since replaced by one for b, .*text weights: 'b'",
        ):
            search()
    replace(tmp_path / "db", tmp_path / "of-a")
    assert find_best(index, make_embeddings(20, seed=2)[7]) == "000007.png"


@pytest.mark.parametrize("model", ["made", "b"])
def test_an_index_that_is_replaced_between_count_and_search(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "db")
    add_rows(IndexDatabase(tmp_path / "db"), make_embeddings(5, seed=4), first=20)
    make(tmp_path / "new", model=model, seed=1)
    index = ImageIndex.open(tmp_path / "db")
    if model == "made":  # else the model is compared at each search
        monkeypatch.setattr("modeling_llm2clip.search.index_database._SEEN_AFTER_S", 3600)
    search = index._database.search

    def replace_first(*args: object, **options: object) -> object:
        replace(tmp_path / "db", tmp_path / "new")
        return search(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(index._database, "search", replace_first)
    if model == "made":
        assert find_best(index, make_embeddings(20, seed=1)[5]) == "000005.png"
    else:
        with pytest.raises(IndexUnavailableError, match="replaced by one for b"):
            find_best(index, IMAGES[3])


def test_a_removed_index_is_refused_by_name_and_found_again(tmp_path: Path) -> None:
    make(tmp_path / "db")
    index = ImageIndex.open(tmp_path / "db")
    shutil.move(tmp_path / "db", tmp_path / "moved")
    for where in (None, "width > 3"):
        with pytest.raises(IndexUnavailableError, match="db: no such database"):
            index.search(IMAGES[:1], where=where)
    shutil.move(tmp_path / "moved", tmp_path / "db")
    assert find_best(index, IMAGES[3]) == "000003.png"


def test_between_two_looks_missing_files_ask_for_another_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("db", "new"):
        make(tmp_path / name)
    add_rows(IndexDatabase(tmp_path / "new"), make_embeddings(5, seed=4), first=20)
    index = ImageIndex.open(tmp_path / "db")
    monkeypatch.setattr("modeling_llm2clip.search.index_database._SEEN_AFTER_S", 3600)
    replace(tmp_path / "db", tmp_path / "new")
    assert find_best(index, make_embeddings(5, seed=4)[1]) == "000021.png"
    shutil.rmtree(tmp_path / "db")
    with pytest.raises(IndexUnavailableError, match="db: no such database"):
        find_best(index, IMAGES[3])


def test_how_the_approximate_index_is_searched_is_read_anew(tmp_path: Path) -> None:
    writer = make(tmp_path / "db")
    index = ImageIndex.open(tmp_path / "db")
    for nprobes in (2, 7):
        writer.write_about(
            dataclasses.replace(writer.about, ann=dataclasses.replace(ANN, nprobes=nprobes))
        )
        find_best(index, IMAGES[3])
        assert index.about.ann is not None and index.about.ann.nprobes == nprobes


@pytest.mark.parametrize(("more_before", "more_after"), [(0, 0), (0, 3), (1, 1), (3, 0), (3, 1)])
def test_a_rebuilt_index_is_searched_whatever_its_version(
    more_before: int, more_after: int, tmp_path: Path
) -> None:
    """Each commit makes a version; a new database counts from the start again."""

    def rebuild(commits: int, *, seed: int) -> int:
        shutil.rmtree(tmp_path / "db", ignore_errors=True)
        database = make(tmp_path / "db", seed=seed)
        for number in range(commits):
            add_rows(database, make_embeddings(1, seed=100 + number), first=20 + number)
        return 20 + commits

    rebuild(more_before, seed=0)
    index = ImageIndex.open(tmp_path / "db")
    assert find_best(index, IMAGES[3]) == "000003.png"
    num_images = rebuild(more_after, seed=1)
    assert index.count(EVERY_IMAGE) == len(index) == index.count("bytes = 9") == num_images
    assert find_best(index, make_embeddings(20, seed=1)[5]) == "000005.png"
    assert len(index.search(IMAGES[:1], top_k=99, where="width >= 0")[0].hits) == num_images
    assert sum(len(paths) for paths, _ in index.iterate_embeddings()) == num_images


def test_missing_files_are_not_blamed_on_a_filter_and_are_not_healthy(tmp_path: Path) -> None:
    make(tmp_path / "db")
    index = ImageIndex.open(tmp_path / "db")
    files = list((tmp_path / "db" / "images.lance" / "data").iterdir())
    for file in files:
        file.rename(tmp_path / file.name)
    for read in (
        lambda: index.count(EVERY_IMAGE),
        lambda: index.count("width > 3"),
        lambda: index.search(IMAGES[:1]),
        lambda: index.search(IMAGES[:1], where="width > 3"),
    ):
        with pytest.raises(IndexUnavailableError, match=r"db cannot be read: .*If it is damaged"):
            read()
    for file in files:
        (tmp_path / file.name).rename(file)
    assert index.count(EVERY_IMAGE) == 20 and find_best(index, IMAGES[3]) == "000003.png"
    with pytest.raises(ValueError, match="width = 'a'") as raised:
        index.count("width = 'a'")
    assert not isinstance(raised.value, IndexUnavailableError)


def test_images_are_found_in_the_folder_that_the_index_says_now(tmp_path: Path) -> None:
    make(tmp_path / "db")
    index = ImageIndex.open(tmp_path / "db")
    (tmp_path / "here").mkdir()
    moved = ImageIndex.open(tmp_path / "db", image_dir=tmp_path / "here")
    database = IndexDatabase(tmp_path / "db")
    database.write_about(dataclasses.replace(database.about, image_dir="/moved"))
    for opened, folder in ((index, Path("/moved")), (moved, tmp_path / "here")):
        (hit, _) = opened.search(IMAGES[3:4], top_k=1)[0].hits[0]
        assert hit == folder / "000003.png"
        assert next(opened.iterate_embeddings())[0][0].parent == folder
