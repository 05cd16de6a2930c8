"""What two processes rank for the tests of the metrics; each is a fresh interpreter."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import RetrievalRanks, rank_retrieval

SMALL_TILES_MB = 0.02


def make_embeddings() -> tuple[Tensor, Tensor, Correspondence]:
    """Twenty-three images of three or four captions each, with equal embeddings among them."""
    generator = torch.Generator().manual_seed(5)
    image_of_text = torch.arange(80) % 23
    images = torch.randint(-2, 3, (23, 8), generator=generator).float()
    texts = images[image_of_text] + torch.randint(-2, 3, (80, 8), generator=generator).float()
    return images, texts, Correspondence.from_image_of_text(image_of_text, 23)


def list_ranks(ranking: RetrievalRanks) -> list[Tensor]:
    sides = (ranking.i2t, ranking.t2i)
    return [ranks for side in sides for ranks in (side.best_ranks, side.positive_ranks)]


def work(rank: int, port: int, folder: Path) -> None:
    """Run in a process of its own: ranks, and what other embeddings are told, into `rank.pt`."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    images, texts, correspondence = make_embeddings()
    arguments = {"max_memory_mb": SMALL_TILES_MB, "over_processes": True}
    ranking = rank_retrieval(images, texts, correspondence, all_positives=True, **arguments)
    error = ""
    try:
        rank_retrieval(images + rank, texts, correspondence, **arguments)
    except ValueError as raised:
        error = str(raised)
    torch.save({"ranks": list_ranks(ranking), "error": error}, folder / f"{rank}.pt")
    dist.destroy_process_group()
