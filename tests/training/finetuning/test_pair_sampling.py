"""Text pairs: tables, batches without false negatives, text counts, groups, hard negatives."""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch.utils.data import ConcatDataset
from tuning import RECORDS

from modeling_llm2clip._extras import MissingExtraError
from modeling_llm2clip.configs.finetune_config import FinetuneConfig
from modeling_llm2clip.data.captions.caption_groups import CaptionGroup, group_captions
from modeling_llm2clip.data.captions.text_pairs import TextPair
from modeling_llm2clip.data.records.record_columns import hash_text
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.encoding.tokenized_texts import TokenizedTexts
from modeling_llm2clip.evaluation.tasks.retrieval import measure_caption_retrieval
from modeling_llm2clip.training.finetuning import finetune_data, nearest_groups, pair_sampling
from modeling_llm2clip.training.finetuning.finetune_data import (
    FinetuneData,
    count_truncated,
    prepare_data,
)
from modeling_llm2clip.training.finetuning.nearest_groups import find_nearest_groups
from modeling_llm2clip.training.finetuning.pair_sampling import (
    MappedColumn,
    NoDuplicateGroupsBatchSampler,
    WeightedBatchSampler,
    count_table_batches,
    open_table,
    write_caption_pairs,
    write_text_pairs,
)


@pytest.fixture
def make_table(tmp_path):
    """Make a table of caption pairs of some images, or of text pairs."""
    numbers = iter(range(1000))

    def make(num_groups: int = 10, *, shared: str | None = None, pairs=()):
        file = tmp_path / f"table-{next(numbers)}"
        if not pairs:
            write_caption_pairs(group_captions(RECORDS[:num_groups]), file, seed=0)
        if shared:
            rows = list(open_table(file))
            pairs = [
                TextPair(str(r["group"]), r["anchor"], shared if n % 4 == 0 else r["positive"])
                for n, r in enumerate(rows)
            ]
        if pairs:
            write_text_pairs(pairs, file)
        return open_table(file)

    return make


def pair_captions(tmp_path: Path, *groups: tuple[str, ...], **options):
    records = [CaptionedImage(None, str(n), str(n), texts) for n, texts in enumerate(groups)]
    write_caption_pairs(group_captions(records), tmp_path / "pairs", seed=0, **options)
    return list(open_table(tmp_path / "pairs"))


def test_pairs_come_from_pythons_shuffle_of_each_group(tmp_path):
    """Recorded runs were trained on these pairs."""
    groups = [tuple(f"{n} {view}" for view in range(2 + n % 4)) for n in range(9)]
    wanted, generator = [], random.Random(0)
    for number, texts in [*enumerate(groups)] * 2:
        order = [*texts]
        generator.shuffle(order)
        if len(order) % 2:
            order.append(order[generator.randrange(len(order) - 1)])
        wanted += [(number, *pair) for pair in zip(order[::2], order[1::2], strict=True)]
    rows = pair_captions(tmp_path, *groups, num_pairings=2)
    assert [(row["group"], row["anchor"], row["positive"]) for row in rows] == wanted
    for row in rows:
        assert row["anchor_key"] == hash_text(row["anchor"])
        assert row["positive_key"] == hash_text(row["positive"])


def test_a_pair_with_a_left_out_text_in_any_column_is_excluded(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_sampling, "_PAIRS_AT_ONCE", 3)
    kept = TextPair("q", "q", "p", ("n",))
    pairs = [
        kept,
        TextPair("a dog", "a dog", "p", ("n",)),
        TextPair("q", "q", "another", ("n",)),
        TextPair("q", "q", "p", ("a dog",)),
        kept,
    ]
    left_out = np.sort([hash_text(text) for text in ("a dog", "another")])
    assert write_text_pairs(pairs, tmp_path / "pairs", left_out=left_out) == (2, 3)
    for row in open_table(tmp_path / "pairs"):
        assert (row["anchor"], row["positive"], row["negative_1"]) == ("q", "p", "n")
        assert row["group"] == row["anchor_key"] == hash_text("q")


def test_a_mapped_column_reads_the_right_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_sampling, "_PAIRS_AT_ONCE", 4)
    pairs = [TextPair(f"q{n}", f"q{n}", f"p{n}") for n in range(18)]
    write_text_pairs(pairs, tmp_path / "pairs")
    table = open_table(tmp_path / "pairs")
    rows = np.random.default_rng(0).integers(0, 18, 50)
    found = MappedColumn(table, "positive_key").read(rows)
    assert found.tolist() == [hash_text(f"p{row}") for row in rows]


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("epoch", [0, 1])
def test_no_global_batch_repeats_an_image_or_a_text(make_table, num_processes, epoch):
    table = make_table(shared="the same words")
    sampler = NoDuplicateGroupsBatchSampler(table, 3, drop_last=True, seed=1)
    sampler.num_processes, sampler.window_size = num_processes, 3 * num_processes
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) == len(table) // (3 * num_processes) * num_processes
    for start in range(0, len(batches), num_processes):
        rows = [row for batch in batches[start : start + num_processes] for row in batch]
        assert len({table[row]["group"] for row in rows}) == len(rows)
        texts = [text for row in rows for text in (table[row]["anchor"], table[row]["positive"])]
        assert len(set(texts)) == len(texts)


def test_epochs_differ_and_repeat_with_the_seed(make_table):
    def sample(epoch):
        sampler = NoDuplicateGroupsBatchSampler(make_table(), 5, drop_last=True, seed=3)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_hard_batches_combine_near_images_and_use_each_pair_once_per_epoch(make_table):
    table = make_table(12)  # three pairs of each image
    group_of_row = table["group"][:]
    near = np.array([[m for m in range(n // 3 * 3, n // 3 * 3 + 3) if m != n] for n in range(12)])
    sampler = NoDuplicateGroupsBatchSampler(
        table, 6, drop_last=True, seed=2, nearest=near, num_hard_negatives=2
    )
    batches = list(sampler)
    rows = [row for batch in batches for row in batch]
    assert len(rows) == len(set(rows)) == len(table)

    def count_met(batches):
        return sum(
            any(group_of_row[other] in near[group_of_row[row]] for other in batch)
            for batch in batches
            for row in batch
        )

    by_chance = count_met(NoDuplicateGroupsBatchSampler(table, 6, drop_last=True, seed=2))
    assert count_met(batches) > 0.9 * len(rows) > by_chance


def test_texts_that_cannot_fill_a_batch_are_refused_instead_of_searching_forever(make_table):
    pairs = [TextPair(f"q{n}", f"q{n}", "the same positive") for n in range(9)]
    sampler = NoDuplicateGroupsBatchSampler(make_table(pairs=pairs), 2, drop_last=True)
    with pytest.raises(ValueError, match="at most 1 row could"):
        next(iter(sampler))


def test_a_run_of_several_epochs_mixes_tables_by_weight(make_table):
    others = [TextPair(f"q{n}", f"q{n}", f"p{n}") for n in "abcd"]
    tables = [make_table(8), make_table(pairs=others)]
    samplers = [NoDuplicateGroupsBatchSampler(table, 2, drop_last=True) for table in tables]
    weights = [1.0, 0.25]
    assert count_table_batches([24, 4], weights, 2) == [12, 3]
    sampler = WeightedBatchSampler(
        ConcatDataset(tables), samplers, weights=weights, num_steps=30, seed=5
    )
    batches = list(sampler)
    assert len(batches) == len(sampler) == 30
    for epoch in (batches[:15], batches[15:]):
        assert sum(row >= 24 for batch in epoch for row in batch) == 6
    assert batches[:15] != batches[15:]


def test_caption_retrieval_counts_first_captions_that_find_their_second():
    embeddings = {"a": [1.0, 0], "a2": [1.0, 0.1], "b": [0.0, 1], "b2": [1.0, 0.05]}
    groups = [CaptionGroup("a", ("a", "a2")), CaptionGroup("b", ("b", "b2"))]
    # "a" is nearer to "b2" than to "a2"; "b" is nearest to "a2": neither finds its own.
    encode = lambda texts: torch.tensor([embeddings[text] for text in texts])  # noqa: E731
    assert measure_caption_retrieval(encode, groups) == 0.0
    embeddings["b2"] = [0.1, 1.0]
    assert measure_caption_retrieval(encode, groups) == 1.0


def make_data(folder: Path) -> FinetuneData:
    """Make groups of texts of all lengths, some of them shared by several groups."""
    generator = random.Random(0)
    words = ["a", "dog", "möwe", "and", "12345", "unbelievably", "犬", "z" * 30]
    texts = [" ".join(generator.choices(words, k=generator.randint(1, 60))) for _ in range(150)]
    records = [
        CaptionedImage(None, str(n), str(n), tuple(generator.sample(texts, 3))) for n in range(80)
    ]
    config = FinetuneConfig(per_device_train_batch_size=4, num_held_out=4, num_pairings=2)
    return prepare_data(group_captions(records), config, folder)


def test_truncated_texts_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_data, "_ROWS_AT_ONCE", 7)
    data = make_data(tmp_path)
    _, processor = tiny_model(max_text_length=64)
    texts = list(data.iterate_texts())
    assert Counter(texts) == Counter(
        text
        for captions in (*data.iterate_groups(), *(group.captions for group in data.held_out))
        for text in captions
    )
    num_truncated = TokenizedTexts(processor, texts).num_truncated
    assert 0 < num_truncated < len(texts)
    assert count_truncated(processor, data) == {
        "num_texts": len(texts), "num_truncated": num_truncated,
    }  # fmt: skip


def test_groups_have_each_training_caption_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_data, "_ROWS_AT_ONCE", 3)
    data = make_data(tmp_path)
    found = list(data.iterate_groups())
    assert len(found) == data.num_trained == data.counts["num_trained"]
    of_group: list[set[str]] = [set() for _ in found]
    for row in data.tables["captions"]:
        of_group[row["group"]] |= {row["anchor"], row["positive"]}
    assert [set(captions) for captions in found] == of_group
    assert all(len(set(captions)) == len(captions) for captions in found)


def make_embeddings(number: int, dim: int = 16) -> np.ndarray:
    """Make clustered embeddings of different lengths, like those of captions."""
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(number // 50, dim))
    found = centers[generator.integers(0, len(centers), number)]
    return (found + 0.5 * generator.normal(size=found.shape)).astype(np.float32)


def compare_all(embeddings: np.ndarray, top_k: int) -> np.ndarray:
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -2)
    return np.argsort(-cosines, axis=1)[:, :top_k]


@pytest.mark.parametrize("is_resident", [None, True])  # True: a GPU has room for all of them
@pytest.mark.parametrize("top_k", [1, 4, 7])
def test_the_exact_search_equals_the_full_cosine_matrix(monkeypatch, top_k, is_resident):
    monkeypatch.setattr(nearest_groups, "EXACT_UP_TO", 100 if is_resident else 300)
    monkeypatch.setattr(nearest_groups, "_ROWS_PER_TILE", 30)
    monkeypatch.setattr(nearest_groups, "_ROWS_AT_ONCE", 70)
    embeddings = make_embeddings(300, 16).astype(np.float16)
    found, report = find_nearest_groups(embeddings, top_k, is_resident=is_resident)
    assert found.tolist() == compare_all(embeddings.astype(np.float32), top_k).tolist()
    assert report == {"method": "exact"}
    if not is_resident:  # a memory-mapped store is read-only
        stored = embeddings.astype(np.float32)
        stored.setflags(write=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert find_nearest_groups(stored, top_k)[0].tolist() == found.tolist()


@pytest.mark.parametrize("dim", [16, 129])
def test_the_approximate_search_has_the_reported_recall(monkeypatch, dim):
    pytest.importorskip("faiss")
    monkeypatch.setattr(nearest_groups, "EXACT_UP_TO", 1000)
    monkeypatch.setattr(nearest_groups, "_ROWS_AT_ONCE", 700)
    embeddings = make_embeddings(3000, dim)
    found, report = find_nearest_groups(embeddings.astype(np.float16), 6)
    wanted = compare_all(embeddings, 6)
    hits = (found[:, :, None] == wanted[:, None]).any(axis=2).mean()
    assert report["recall"] > 0.9
    # The report is for a sample of 1,000 rows with 6 each, with a standard error below 0.01.
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


def test_many_groups_without_faiss_are_refused_naming_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    nearest_groups.require_search(nearest_groups.EXACT_UP_TO)
    with pytest.raises(MissingExtraError, match=r"faiss .*modeling_llm2clip\[ann\]"):
        nearest_groups.require_search(nearest_groups.EXACT_UP_TO + 1)


def test_an_images_embedding_is_the_mean_of_its_captions_unit_embeddings():
    embeddings = {"a": [3.0, 0], "b": [0, 0.5], "c": [-2.0, 0], "d": [-1.0, 0]}
    encode = lambda texts: torch.tensor([embeddings[text] for text in texts])  # noqa: E731
    found = nearest_groups.encode_groups(encode, [["a", "b"], ["c", "d", "d"]])
    assert torch.equal(found, torch.tensor([[0.5, 0.5], [-1.0, 0.0]]))


def test_the_nearest_groups_by_caption_embeddings_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(nearest_groups, "_GROUPS_AT_ONCE", 4)
    embeddings = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    encode = lambda texts: embeddings[[int(text) for text in texts]]  # noqa: E731
    groups = [[str(3 * n), str(3 * n + 1), str(3 * n + 2)] for n in range(10)]
    file = tmp_path / "nearest.npy"
    report = nearest_groups.write_nearest_groups(encode, iter(groups), 10, 4, file)
    wanted = compare_all(nearest_groups.encode_groups(encode, groups).numpy(), 4)
    assert np.load(file, mmap_mode="r").tolist() == wanted.tolist()
    assert report == {"method": "exact"} and list(tmp_path.iterdir()) == [Path(file)]
