"""Hard negatives: exact search, approximate search, and the embeddings of groups."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_llm2clip._extras import MissingExtraError
from modeling_llm2clip.training.finetuning import nearest_groups
from modeling_llm2clip.training.finetuning.nearest_groups import find_nearest_groups


def make_embeddings(number: int, dim: int = 16) -> np.ndarray:
    """Embeddings around some centers, as those of captions are, of any length."""
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(number // 50, dim))
    found = centers[generator.integers(0, len(centers), number)]
    return (found + 0.5 * generator.normal(size=found.shape)).astype(np.float32)


def compare_all(embeddings: np.ndarray, top_k: int) -> np.ndarray:
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -2)
    return np.argsort(-cosines, axis=1)[:, :top_k]


@pytest.mark.parametrize("top_k", [1, 4, 7])
def test_the_nearest_rows_are_those_of_the_whole_matrix_of_cosines(monkeypatch, top_k):
    monkeypatch.setattr(nearest_groups, "_ROWS_PER_TILE", 3)
    monkeypatch.setattr(nearest_groups, "_ROWS_AT_ONCE", 5)
    embeddings = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)
    found, report = find_nearest_groups(embeddings, top_k)
    assert found.tolist() == compare_all(embeddings, top_k).tolist()
    assert report == {"method": "exact"}


@pytest.mark.parametrize(
    ("dim", "codes"),
    [(16, "SQ8"), pytest.param(128, "PQ32x4fs,Refine(SQ8)", marks=pytest.mark.slow), (129, "SQ8")],
)
def test_the_approximate_search_has_the_recall_that_it_reports(monkeypatch, dim, codes):
    pytest.importorskip("faiss")
    monkeypatch.setattr(nearest_groups, "EXACT_UP_TO", 1000)
    monkeypatch.setattr(nearest_groups, "_ROWS_AT_ONCE", 700)
    embeddings = make_embeddings(3000, dim)
    found, report = find_nearest_groups(embeddings.astype(np.float16), 6)
    wanted = compare_all(embeddings, 6)
    hits = (found[:, :, None] == wanted[:, None]).any(axis=2).mean()
    assert report["method"] == f"faiss IVF,{codes}"
    assert report["recall"] >= nearest_groups.WANTED_RECALL
    # The share of a sample of 1,000 rows of 6 each: its standard error is below 0.01.
    assert hits == pytest.approx(report["recall"], abs=0.03)
    assert report["clusters_searched"] < report["clusters"]
    rows = np.arange(3000)[:, None]
    assert not (found == rows).any() and found.min() >= 0 and found.max() < 3000
    assert all(len(set(row)) == 6 for row in found.tolist())


def test_equal_embeddings_find_each_other_and_never_themselves(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(nearest_groups, "EXACT_UP_TO", 100)
    found, _ = find_nearest_groups(np.ones((500, 4), np.float32), 3)
    assert not (found == np.arange(500)[:, None]).any()
    assert found.min() >= 0 and found.max() < 500


def test_many_groups_without_faiss_are_refused_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    nearest_groups.require_search(nearest_groups.EXACT_UP_TO)
    with pytest.raises(MissingExtraError, match=r"faiss .*modeling_llm2clip\[ann\]"):
        nearest_groups.require_search(nearest_groups.EXACT_UP_TO + 1)


def test_an_images_embedding_is_the_mean_of_its_captions_unit_embeddings():
    embeddings = {"a": [3.0, 0], "b": [0, 0.5], "c": [-2.0, 0], "d": [-1.0, 0]}
    encode = lambda texts: torch.tensor([embeddings[text] for text in texts])  # noqa: E731
    found = nearest_groups.encode_groups(encode, [["a", "b"], ["c", "d", "d"]])
    assert torch.equal(found, torch.tensor([[0.5, 0.5], [-1.0, 0.0]]))


def test_written_groups_are_those_nearest_in_embeddings_of_their_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(nearest_groups, "_GROUPS_AT_ONCE", 4)
    embeddings = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    encode = lambda texts: embeddings[[int(text) for text in texts]]  # noqa: E731
    groups = [[str(3 * n), str(3 * n + 1), str(3 * n + 2)] for n in range(10)]
    file = tmp_path / "nearest.npy"
    report = nearest_groups.write_nearest_groups(encode, iter(groups), 10, 4, file)
    wanted = compare_all(nearest_groups.encode_groups(encode, groups).numpy(), 4)
    assert np.load(file, mmap_mode="r").tolist() == wanted.tolist()
    assert report == {"method": "exact"} and list(tmp_path.iterdir()) == [Path(file)]
