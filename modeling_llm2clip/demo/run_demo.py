"""Runs the demo: the whole method on the package's own towers and images, then a search."""

from __future__ import annotations

import json
import platform
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .._environment import list_versions
from ..building.pretrained_towers import fetch_embedded
from ..configs.align_config import AlignConfig
from ..configs.build_config import EMBEDDED, EMBEDDED_SMALL
from ..configs.train_config import TrainConfig
from ..data.atomic_files import require_new_folder
from ..data.records.record_loading import find_example_data, load_records
from ..data.records.records import CaptionedImage
from ..data.records.splits import choose_test_rows, split_records
from ..data.store.embedding_store import EmbeddingStore
from ..encoding.encode import encode_images, encode_texts, project_stored
from ..evaluation.datasets.caption_readers import EMOJI_SEED, NUM_TEST_GROUPS
from ..evaluation.results import read_evaluation_results
from ..model_folders.model_loading import load_model
from ..modeling_llm2clip import LLM2CLIPModel
from ..recipes.recipe_plan import RecipePaths
from ..recipes.train import train
from ..search.search_results import (
    SearchResult,
    rank_images,
    write_results_page,
    write_results_sheet,
)

SENTENCES = (
    "a slice of pizza",
    "a red flower",
    "an airplane in the sky",
    "a violin",
    "a smiling face",
    "a cup of hot coffee",
    "a cat",
    "a house with a garden",
)


def split_emoji(seed: int) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """Split the embedded emoji into training records and one record per held-out emoji.

    Warns if the test part differs from the evaluation dataset `emoji`.
    """
    if seed != EMOJI_SEED:
        warnings.warn(
            f"Seed {seed} trains on emoji in the evaluation dataset `emoji`, which is the test "
            f"split of seed {EMOJI_SEED}. Do not evaluate this model on it.",
            stacklevel=2,
        )
    records = [r for r in load_records(find_example_data() / "emoji") if r.lang == "en"]
    train, held_out = split_records(records, test_size=NUM_TEST_GROUPS, seed=seed)
    rows = choose_test_rows(held_out, {record.group_id for record in held_out})
    test = [replace(held_out[row], captions=held_out[row].captions[:1]) for row in rows]
    return [replace(record, captions=_list_texts(record)) for record in train], test


def _list_texts(record: CaptionedImage) -> tuple[str, ...]:
    """Return the captions and, as another text, the first caption followed by the keywords."""
    named = f"{record.captions[0]}: {', '.join(record.keywords)}"
    return (*record.captions, named) if record.keywords else record.captions


def make_demo_config(
    output: Path, *, max_steps: int | None = None, seed: int = 0, device: str = "auto"
) -> TrainConfig:
    """Return the demo's recipe: the smallest embedded towers, with a fine-tuned LLM."""
    return TrainConfig(
        vision_model=EMBEDDED_SMALL,
        text_model=EMBEDDED,
        data=EMBEDDED,
        output=output,
        finetune=None,
        # The demo already holds out emoji to test the model, so alignment holds out no others.
        align=AlignConfig(max_steps=max_steps, held_out_ratio=0, image_noise=0, caption_noise=0),
        device=device,
        seed=seed,
    )


def run_demo(config: TrainConfig, *, report: Callable[[str], object] = print) -> dict[str, Any]:
    """Train on most of the embedded emoji, test on the held-out emoji, and search all images."""
    require_new_folder(config.output, is_renamed=False)
    train_records, test_records = split_emoji(config.seed)
    fetch_embedded(config.vision_model, config.text_model, config.build)  # not timed
    started = time.monotonic()
    folder = train(config, records=(train_records, test_records), report=report)
    scores = _read_scores(RecipePaths(config.output).evaluation)
    others = [*test_records, *load_records(find_example_data() / "photographs")]
    _show(_search_images(folder, config, train_records, others), config.output, scores)
    written = {
        "seconds_after_download": round(time.monotonic() - started, 1),
        "peak_rss_gb": _measure_peak_memory(),
        **scores,
        "seed": config.seed,
        "num_images": len(train_records),
        "num_held_out": len(test_records),
        "versions": list_versions(),
    }
    file = config.output / "report.json"
    file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return written


def _read_scores(folder: Path) -> dict[str, float]:
    (result,) = read_evaluation_results(folder)
    t2i, i2t = result.scores["t2i"], result.scores["i2t"]
    return {
        "unseen_t2i_r1": t2i["hit_rate_at_1"],
        "unseen_t2i_r10": t2i["hit_rate_at_10"],
        "unseen_i2t_r1": i2t["hit_rate_at_1"],
        "chance_r1": 1 / result.counts["images"],
    }


@torch.inference_mode()
def _search_images(
    folder: Path, config: TrainConfig, stored: list[CaptionedImage], others: list[CaptionedImage]
) -> list[SearchResult]:
    """Encode the images that are not stored, and search these and one stored image per group."""
    model, processor = load_model(folder, device=config.device)
    assert isinstance(model, LLM2CLIPModel)  # `train` exports nothing else
    store = EmbeddingStore.open(RecipePaths(config.output).images)
    rows = list({record.group_id: row for row, record in enumerate(stored)}.values())
    vision_embeds = store.read([int(store.rows_of(row)[0]) for row in rows]).float()
    paths = [record.path for record in others]
    encoded = encode_images(model, processor, paths, project=False)
    image_embeds = project_stored(model, torch.cat([vision_embeds, encoded]), "image")
    cosines = encode_texts(model, processor, SENTENCES) @ image_embeds.T
    return rank_images(SENTENCES, cosines, [*(stored[row].path for row in rows), *paths])


def _show(results: list[SearchResult], output: Path, scores: dict[str, float]) -> None:
    write_results_sheet(results, output / "search.png")
    note = (
        f"R@1 on unseen images: text to image {scores['unseen_t2i_r1']:.1%}, image to text "
        f"{scores['unseen_i2t_r1']:.1%}, chance {scores['chance_r1']:.1%}. The number "
        "under an image is its cosine with the sentence."
    )
    write_results_page(
        results, output / "search.html", title="LLM2CLIP: images by sentence", note=note
    )


def _measure_peak_memory() -> float:
    """Return the sum of this process's peak memory and its largest child's, in 10^9 bytes."""
    kilobyte = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes
    usages = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return round(sum(resource.getrusage(u).ru_maxrss * kilobyte for u in usages) / 1e9, 2)
