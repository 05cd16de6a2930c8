"""Ranks in both directions equal those of the whole score matrix, however they are computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import TIE_TOLERANCE, TileShape, rank_retrieval

SMALL_TILES = TileShape(7, 3)


def make_embeddings():
    """Twenty-three images of three or four captions each, with equal embeddings among them."""
    generator = torch.Generator().manual_seed(5)
    image_of_text = torch.arange(80) % 23
    images = torch.randint(-2, 3, (23, 8), generator=generator).float()
    texts = images[image_of_text] + torch.randint(-2, 3, (80, 8), generator=generator).float()
    return images, texts, Correspondence.from_image_of_text(image_of_text, 23)


def list_ranks(ranking):
    sides = (ranking.i2t, ranking.t2i)
    return [ranks for side in sides for ranks in (side.best_ranks, side.positive_ranks)]


def rank_whole_matrix(scores, positive):
    """For each row: ranks of its positives, best first; negatives that tie come first."""
    ranks = []
    for row, is_positive in zip(scores.tolist(), positive.tolist(), strict=True):
        pairs = list(zip(row, is_positive, strict=True))
        right = sorted((score for score, wanted in pairs if wanted), reverse=True)
        wrong = [score for score, wanted in pairs if not wanted]
        ranks.append(
            [
                place + sum(score >= best - TIE_TOLERANCE for score in wrong)
                for place, best in enumerate(right, start=1)
            ]
        )
    return ranks


def require_ranks(images, texts, correspondence, **options):
    unit_images, unit_texts = (F.normalize(side.double(), dim=-1) for side in (images, texts))
    scores = unit_images @ unit_texts.T
    positive = torch.zeros(scores.shape, dtype=torch.bool)
    positive[correspondence.image_of_pair, correspondence.text_of_pair] = True
    ranking = rank_retrieval(images, texts, correspondence, all_positives=True, **options)
    best_alone = rank_retrieval(images, texts, correspondence, **options)
    for side, alone, wanted in (
        (ranking.i2t, best_alone.i2t, rank_whole_matrix(scores, positive)),
        (ranking.t2i, best_alone.t2i, rank_whole_matrix(scores.T, positive.T)),
    ):
        assert side.positive_ranks.tolist() == [rank for ranks in wanted for rank in ranks]
        assert side.num_positives.tolist() == [len(ranks) for ranks in wanted]
        assert side.best_ranks.tolist() == [ranks[0] for ranks in wanted]
        assert torch.equal(alone.best_ranks, side.best_ranks) and alone.positive_ranks is None


@st.composite
def correspondences(draw):
    """Several captions per image and several images per caption."""
    group_ids = st.sampled_from("abcd"[: draw(st.integers(1, 4))])
    image_group_ids, text_group_ids = (
        draw(st.lists(group_ids, min_size=1, max_size=20)) for _ in range(2)
    )
    image_group_ids += sorted(set(text_group_ids) - set(image_group_ids))
    text_group_ids += sorted(set(image_group_ids) - set(text_group_ids))
    return Correspondence.from_group_ids(image_group_ids, text_group_ids)


@settings(deadline=None, max_examples=40)
@given(
    correspondence=correspondences(),
    shape=st.sampled_from([TileShape(1, 1), TileShape(4, 1), TileShape(3, 5), SMALL_TILES, None]),
    highest=st.integers(0, 3),
    seed=st.integers(0, 2**20),
)
def test_ranks_equal_brute_force_with_ties_duplicates_and_tiles_of_any_size(
    correspondence, shape, highest, seed
):
    # Few small integers make equal scores and equal embeddings, up to all of them zero.
    generator = torch.Generator().manual_seed(seed)
    images, texts = (
        torch.randint(-highest, highest + 1, (number, 5), generator=generator).float()
        for number in (correspondence.num_images, correspondence.num_texts)
    )
    require_ranks(images, texts, correspondence, shape=shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_ranks_are_those_of_the_embeddings_in_float64_whatever_they_are_stored_as(dtype):
    # Embeddings in a narrow cone, as untrained towers give: float32 alone would move some ranks.
    generator = torch.Generator().manual_seed(1)
    images = 1 + 0.03 * torch.randn(120, 64, generator=generator)
    image_of_text = torch.arange(300) % 120
    texts = images[image_of_text] + 0.09 * torch.randn(300, 64, generator=generator)
    correspondence = Correspondence.from_image_of_text(image_of_text, 120)
    require_ranks(images.to(dtype), texts.to(dtype), correspondence)


@pytest.mark.parametrize(("below", "rank"), [(-1e-3, 2), (0.0, 2), (5e-7, 2), (2e-6, 1), (1e-3, 1)])
def test_a_wrong_candidate_within_the_tolerance_is_ranked_before_the_right_one(below, rank):
    # 2e-6 is not a tie, though float32 could round it away.
    image = torch.tensor([[1.0, 0.0]])
    cosines = torch.tensor([0.8, 0.8 - below], dtype=torch.float64)
    texts = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    both = torch.cat([image.double(), texts[1:]])
    pairs = Correspondence.from_image_of_text([0, 1], 2)
    ranking = rank_retrieval(both, texts, pairs)
    assert ranking.i2t.best_ranks[0] == rank


@pytest.mark.parametrize("shape", [SMALL_TILES, TileShape(80, 20), None])
def test_equal_embeddings_tie_in_whichever_tiles_they_are(shape):
    # Every text occurs three times, with three images; sums in tiles differ in the last bits.
    generator = torch.Generator().manual_seed(2)
    texts = torch.randn(30, 200, generator=generator).repeat(3, 1)
    images = texts + 0.01 * torch.randn(90, 200, generator=generator)
    correspondence = Correspondence.from_image_of_text(range(90), 90)
    ranking = rank_retrieval(images, texts, correspondence, shape=shape)
    assert ranking.i2t.best_ranks.tolist() == [3] * 90


def test_no_precision_chosen_for_the_program_moves_a_rank():
    images, texts, correspondence = make_embeddings()
    images, texts = images.repeat(1, 64) + 1e-3, texts.repeat(1, 64) - 1e-3

    def rank():
        return list_ranks(rank_retrieval(images, texts, correspondence, all_positives=True))

    expected = rank()
    for dtype in (torch.float16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert all(map(torch.equal, rank(), expected))
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, rank(), expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, t: (i[:, :2], t), r"text_embeds are .*same width as the other"),
        (lambda i, t: (i, t / torch.tensor([[1], [0], [1.0]])), r"text_embeds row 1 has a NaN"),
        (lambda i, t: (i * torch.tensor([[1.0], [torch.nan]]), t), r"image_embeds row 1 has a NaN"),
        (lambda i, t: (i[:1], t), r"image_embeds are .*one row for each of the 2 im"),
        (lambda i, t: (i, t[0]), r"text_embeds are .*one row for each of the 3 te"),
        (lambda i, t: (i, t.long()), r"torch.int64 \(3, 3\); they must have a float dtype"),
    ],
)
def test_broken_embeddings_are_refused(change, message):
    images, texts = change(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match=message):
        rank_retrieval(images, texts, Correspondence.from_image_of_text([0, 1, 1], 2))


@pytest.mark.gpu
def test_ranks_of_a_gpu_are_those_of_the_cpu():
    images, texts, correspondence = make_embeddings()
    options = {"all_positives": True, "shape": SMALL_TILES}
    found = [
        list_ranks(rank_retrieval(images.to(device), texts.to(device), correspondence, **options))
        for device in ("cpu", "cuda")
    ]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(*found, strict=True))
