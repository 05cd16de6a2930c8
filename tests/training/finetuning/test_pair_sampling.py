"""Batches of stage 1: no false negatives, and hard ones where they are asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.data import ConcatDataset
from tuning import GROUPS

from modeling_llm2clip.data.caption_groups import CaptionGroup, TextPair, sample_pairs
from modeling_llm2clip.evaluation.tasks.caption_retrieval import measure_caption_retrieval
from modeling_llm2clip.training.finetuning import hard_batches
from modeling_llm2clip.training.finetuning.pair_sampling import (
    NoDuplicateGroupsBatchSampler,
    WeightedBatchSampler,
    count_steps,
    make_pair_table,
)


def make_table(num_groups: int = 10, *, shared: str | None = None):
    pairs = sample_pairs(GROUPS[:num_groups], seed=0)
    if shared:
        pairs = [replace(p, positive=shared) if n % 4 == 0 else p for n, p in enumerate(pairs)]
    return make_pair_table(pairs)


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("epoch", [0, 1])
def test_no_batch_of_all_processes_repeats_an_image_or_a_text(num_processes, epoch):
    table = make_table(shared="the same words")
    sampler = NoDuplicateGroupsBatchSampler(table, 3, drop_last=True, seed=1)
    sampler.num_processes, sampler.window_size = num_processes, 3 * num_processes
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) == len(table) // (3 * num_processes) * num_processes
    for start in range(0, len(batches), num_processes):
        rows = [row for batch in batches[start : start + num_processes] for row in batch]
        assert len({table[row]["group_id"] for row in rows}) == len(rows)
        texts = [text for row in rows for text in (table[row]["anchor"], table[row]["positive"])]
        assert len(set(texts)) == len(texts)


def test_epochs_differ_and_repeat_with_the_seed():
    def sample(epoch):
        sampler = NoDuplicateGroupsBatchSampler(make_table(), 5, drop_last=True, seed=3)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_hard_batches_bring_near_images_together_and_each_pair_once_an_epoch():
    table = make_table(12)  # two or three pairs of each image
    group_ids = table["group_id"][:]
    names = list(dict.fromkeys(group_ids))
    near = {name: names[n // 3 * 3 : n // 3 * 3 + 3] for n, name in enumerate(names)}
    near = {name: [other for other in all_ if other != name] for name, all_ in near.items()}
    sampler = NoDuplicateGroupsBatchSampler(
        table, 6, drop_last=True, seed=2, nearest=near, num_hard_negatives=2
    )
    batches = list(sampler)
    rows = [row for batch in batches for row in batch]
    assert len(rows) == len(set(rows)) == len(table)

    def count_met(batches):
        return sum(
            any(group_ids[other] in near[group_ids[row]] for other in batch)
            for batch in batches
            for row in batch
        )

    by_chance = count_met(NoDuplicateGroupsBatchSampler(table, 6, drop_last=True, seed=2))
    assert count_met(batches) > 0.9 * len(rows) > by_chance


def test_the_nearest_rows_are_those_of_the_whole_matrix_of_cosines(monkeypatch):
    monkeypatch.setattr(hard_batches, "_ROWS_PER_TILE", 3)
    embeddings = torch.randn(8, 5)
    cosines = torch.cosine_similarity(embeddings[:, None], embeddings[None], dim=-1)
    cosines.fill_diagonal_(-2)
    assert torch.equal(
        hard_batches.find_nearest_groups(embeddings, 4), cosines.topk(4, dim=1).indices
    )


def test_an_images_embedding_is_the_mean_of_its_captions_unit_embeddings():
    embeddings = {"a": [3.0, 0], "b": [0, 0.5], "c": [-2.0, 0], "d": [-1.0, 0]}
    encode = lambda texts: torch.tensor([embeddings[text] for text in texts])  # noqa: E731
    groups = [CaptionGroup("x", ("a", "b")), CaptionGroup("y", ("c", "d", "d"))]
    found = hard_batches.encode_groups(encode, groups)
    assert torch.equal(found, torch.tensor([[0.5, 0.5], [-1.0, 0.0]]))


def test_texts_that_can_fill_no_batch_are_refused_and_not_searched_forever():
    pairs = [TextPair(f"q{n}", f"q{n}", "the same positive") for n in range(9)]
    sampler = NoDuplicateGroupsBatchSampler(make_pair_table(pairs), 2, drop_last=True)
    with pytest.raises(ValueError, match="only 1 rows fit"):
        next(iter(sampler))


def test_a_run_of_several_epochs_mixes_tables_by_weight():
    tables = [make_table(8), make_pair_table([TextPair(f"q{n}", f"q{n}", f"p{n}") for n in "abcd"])]
    samplers = [NoDuplicateGroupsBatchSampler(table, 2, drop_last=True) for table in tables]
    weights = [1.0, 0.25]
    assert count_steps([24, 4], weights, 2) == [12, 3]
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
