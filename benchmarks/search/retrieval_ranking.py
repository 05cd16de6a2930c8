"""Time and memory of exact ranks in both directions, against the bare products of the same tiles.

    python -m benchmarks.search.retrieval_ranking

Embeddings are random: each image's texts are its own embedding plus noise, so that about half of
the queries find their positive first. Where the noise drowns the images ("unrelated"), positives
are anywhere, which is the worst case: every tile has something before every positive.

Both computations alternate in one process, so that a load on the machine meets them alike; the
ratio is that of neighbors. The bare products are `torch.mm` of the tiles of `TILE_OF_CPU`
into one piece of memory, in float32, with nothing normalized, compared or kept; ranks are computed
in float64. Resident memory is the process's highest so far: Python, torch, all embeddings and
everything computed. `llm2clip evaluate` ranks all positives; `large` is what hit rates alone would
take.

The small case is also ranked by the whole score matrix in float64 and in float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shared.provenance import describe_run, read_peak_bytes, write_result
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import (
    TIE_TOLERANCE,
    TILE_OF_CPU,
    RetrievalRanks,
    rank_retrieval,
)
from modeling_llm2clip.evaluation.metrics.scores import summarize

_RELATED_NOISE = 12.0
_UNRELATED_NOISE = 1e4
_ROWS_AT_A_TIME = 1000


def main() -> None:
    """Measure all cases, print them, and write the result."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        **describe_run("torch", threads=arguments.threads),
        "width": arguments.width,
        "repeats": arguments.repeats,
    }
    fifth = arguments.images // 5, arguments.texts // 5
    # The largest first: the highest resident memory of the process so far is then theirs.
    for name, all_positives in (("large", False), ("all_positives", True)):
        result[name] = _measure(
            arguments, arguments.images, arguments.texts, all_positives=all_positives
        )
        result[name]["highest_resident_mb"] = round(read_peak_bytes() / 1e6)
    result["unrelated"] = _measure(arguments, *fifth, noise=_UNRELATED_NOISE)
    result["all_positives_small"] = _measure(arguments, *fifth, all_positives=True)
    result["small"] = _compare_with_whole_matrix(arguments, *(n // 10 for n in fifth))
    write_result(arguments.output, result)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=int, default=25_000)
    parser.add_argument("--texts", type=int, default=125_000)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs of each case")
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "retrieval_ranking.json")
    return parser.parse_args()


def _make_embeddings(
    num_images: int, num_texts: int, width: int, noise: float
) -> tuple[Tensor, Tensor, Correspondence]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_images, width, generator=generator)
    image_of_text = torch.arange(num_texts) % num_images
    texts = torch.empty(num_texts, width)
    for part, rows in zip(
        texts.split(_ROWS_AT_A_TIME), image_of_text.split(_ROWS_AT_A_TIME), strict=True
    ):
        torch.randn(part.shape, generator=generator, out=part)
        part.mul_(noise).add_(images[rows])
    return images, texts, Correspondence.from_image_of_text(image_of_text, num_images)


def _measure(
    arguments: argparse.Namespace,
    num_images: int,
    num_texts: int,
    *,
    noise: float = _RELATED_NOISE,
    all_positives: bool = False,
) -> dict[str, Any]:
    """Alternate bare products and ranks."""
    images, texts, correspondence = _make_embeddings(num_images, num_texts, arguments.width, noise)
    rankings: list[RetrievalRanks] = []

    def rank() -> None:
        rankings[:] = [rank_retrieval(images, texts, correspondence, all_positives=all_positives)]

    _multiply(images[:4096], texts[:4096])  # threads and memory warm up
    pairs = [
        (_time(lambda: _multiply(images, texts)), _time(rank)) for _ in range(arguments.repeats)
    ]
    ratios = [ranked / bare for bare, ranked in pairs]
    return {
        "images": num_images,
        "texts": num_texts,
        "i2t": _round(summarize(rankings[0].i2t)),
        "t2i": _round(summarize(rankings[0].t2i)),
        "bare_products_s": [round(bare, 2) for bare, _ in pairs],
        "ranks_s": [round(ranked, 2) for _, ranked in pairs],
        "ratios": [round(ratio, 3) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 3),
    }


def _multiply(images: Tensor, texts: Tensor) -> None:
    """Compute the same tiles and nothing else."""
    shape = TILE_OF_CPU
    memory = torch.empty(shape.images * shape.texts)
    for image_rows in images.split(shape.images):
        for text_rows in texts.split(shape.texts):
            size = len(image_rows), len(text_rows)
            torch.mm(image_rows, text_rows.T, out=memory[: size[0] * size[1]].view(size))


def _compare_with_whole_matrix(
    arguments: argparse.Namespace, num_images: int, num_texts: int
) -> dict[str, Any]:
    """Count the queries whose rank is another one in the whole matrix."""
    differing = {}
    for name, noise in (("related", _RELATED_NOISE), ("unrelated", _UNRELATED_NOISE)):
        images, texts, correspondence = _make_embeddings(
            num_images, num_texts, arguments.width, noise
        )
        ranking = rank_retrieval(images, texts, correspondence)
        for dtype in (torch.float64, torch.float32):
            scores = F.normalize(images.to(dtype)) @ F.normalize(texts.to(dtype)).T
            positive = torch.zeros(scores.shape, dtype=torch.bool)
            positive[correspondence.image_of_pair, correspondence.text_of_pair] = True
            differing[f"{name}_{str(dtype).removeprefix('torch.')}"] = sum(
                int((side.best_ranks != _rank_rows(rows, is_positive)).sum())
                for side, rows, is_positive in (
                    (ranking.i2t, scores, positive),
                    (ranking.t2i, scores.T, positive.T),
                )
            )
    return {
        "images": num_images,
        "texts": num_texts,
        "queries_ranked_differently_by_the_whole_matrix": differing,
    }


def _rank_rows(scores: Tensor, positive: Tensor) -> Tensor:
    best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
    return 1 + ((scores >= best - TIE_TOLERANCE) & ~positive).sum(dim=1)


def _time(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _round(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in scores.items()}


if __name__ == "__main__":
    main()
