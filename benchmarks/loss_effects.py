"""R@1 of the losses of `align` beside the plain one, at several sizes of embeddings and of data.

    python benchmarks/loss_effects.py emoji=FOLDER openclipart=FOLDER photographs=FOLDER --work WORK

The datasets, as the README describes them, become one; their English captions are used. In each
split 300 of the things shown are set aside, and every loss is trained on the same others: those of
`SIZES` with and without STRUCTURE, and all of them with the rest. Embeddings are cut to each of
`DIMS`. The demo's towers run once: `--work` keeps the model and the stores, so that a second call
trains at once. What is measured is written after each run.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from first_run import read_lines
from provenance import describe_run
from training_set_size import (
    MOST_TEST_IMAGES,
    Dataset,
    build_untrained,
    read_first,
    score,
    split_things,
    train,
)

from modeling_llm2clip import AlignConfig, BuildConfig
from modeling_llm2clip.training.run_folder import read_results

DIMS = (768, 256, 64)
SIZES = (500, 1_000, 3_000)
NUM_IMAGES = max(SIZES) + MOST_TEST_IMAGES
PLAIN = "contrastive"
# With every number of images, and with most of them.
AT_EACH_SIZE: dict[str, Mapping[str, Any]] = {
    PLAIN: {},
    "with STRUCTURE": {"structure_weight": 10.0},
}
AT_LAST_SIZE: dict[str, Mapping[str, Any]] = {
    "sigmoid": {"loss": "sigmoid"},
    "Matryoshka, 256 and 64": {"matryoshka_dims": (256, 64)},
}
# A start from random weights shows what a loss does; the default one starts near the best.
STARTS = {"closed form": {}, "random": {"projection_init": "model"}}
# The last fit on all images would double the time, and repeats what was chosen.
SHARED = {"refit": False}


def main() -> None:
    """Train with every loss, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("data", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--num-splits", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True, help="keeps the model and the stores")
    output = Path(__file__).parent / "results" / "loss_effects.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    model, data = arguments.work / "model", arguments.work / "data"
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        build_untrained(model, BuildConfig(projection_dim=max(DIMS)))
    if not data.exists():
        join_datasets(dict(text.partition("=")[::2] for text in arguments.data), data)
    dataset = Dataset.prepare("data", data, model, arguments.work)
    record = {
        **describe_run(
            "torch", "transformers", "modeling_llm2clip", threads=torch.get_num_threads()
        ),
        **dataset.describe(),
        "config": SHARED,
    }
    runs = read_earlier(arguments.output, record)
    done = [{name: run[name] for name in ("split", *list_trainings()[0])} for run in runs]
    for split in range(arguments.num_splits):
        for training in list_trainings():
            if {"split": split, **training} not in done:
                runs.append(measure(dataset, model, split, training))
                print(runs[-1], flush=True)
                text = json.dumps({**record, "runs": runs}, indent=2)
                arguments.output.write_text(f"{text}\n", "utf-8")


def read_earlier(file: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs that a file has, if it was written by the same code on the same data and machine."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    runs: list[dict[str, Any]] = found.pop("runs", [])
    return runs if found == record else []


def join_datasets(sources: Mapping[str, str], folder: Path) -> None:
    """Write a folder of images with all lines of several: links to these by their names."""
    folder.mkdir()
    lines = []
    for name, source in sources.items():
        (folder / name).symlink_to(Path(source).resolve())
        for line in read_lines(Path(source)):
            place = {"image": f"{name}/{line['image']}"}
            group = {"group_id": f"{name}/{line['group_id']}"} if "group_id" in line else {}
            lines.append(json.dumps({**line, **place, **group}))
    chosen = random.Random(0).sample(lines, min(len(lines), NUM_IMAGES))
    (folder / "captions.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")


def list_trainings() -> list[dict[str, Any]]:
    """List start, number of images and name of the loss of every training of a split."""
    return [
        {"start": start, "num_images": size, "loss": loss}
        for start in STARTS
        for size in SIZES
        for loss in (AT_EACH_SIZE if size < max(SIZES) else {**AT_EACH_SIZE, **AT_LAST_SIZE})
    ]


def measure(
    dataset: Dataset, model: Path, split: int, training: Mapping[str, Any]
) -> dict[str, Any]:
    """Train once, and find the images that were set aside with embeddings of each size."""
    test, others = split_things(dataset.records, seed=split)
    captions, images = (read_first(store, test) for store in dataset.stores.values())
    of_loss = {**AT_EACH_SIZE, **AT_LAST_SIZE}[training["loss"]]
    config = AlignConfig(**SHARED, **of_loss, **STARTS[training["start"]])
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        part = others[: training["num_images"]]
        aligned = train(model, dataset.records, part, dataset.stores, Path(scratch), config)
        scores = {str(dim): score(aligned, captions, images, dim=dim) for dim in DIMS}
        chosen = read_results(aligned.parent)["held_out"]
    return {
        **training, "split": split, "scores": scores, "best_step": chosen["best_step"],
        "best_share": chosen["best_share"],
        "cpu_seconds": round(time.process_time() - started, 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
