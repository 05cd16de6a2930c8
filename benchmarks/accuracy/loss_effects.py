"""R@1 of the losses of `align` beside the plain one, at several sizes of embeddings and of data.

    python -m benchmarks.accuracy.loss_effects emoji=FOLDER openclipart=FOLDER \\
        photographs=FOLDER --work WORK

The datasets, as the README describes them, become one; their English captions are used. In each
split 300 of the things shown are set aside, and every loss is trained on the same others. The
trainings are short ones, as the record says. Embeddings are truncated to each of `DIMS`. The demo's
towers run once: `--work` keeps the model and the stores. What is measured is written after each
run, and a second call of the same commit goes on from there, perhaps with other `--starts`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.first_run import read_lines
from benchmarks.accuracy.training_set_size import (
    MOST_TEST_IMAGES,
    Dataset,
    build_untrained,
    load_head,
    read_first,
    score,
    split_things,
    take_part,
)
from benchmarks.shared.provenance import describe_run
from modeling_llm2clip import AlignConfig, BuildConfig, EmbeddingStore, LLM2CLIPProcessor
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.encoding.precision import float32_as_such
from modeling_llm2clip.scheduling.graceful_stop import stop_on_signals
from modeling_llm2clip.training.alignment.align import _choose
from modeling_llm2clip.training.alignment.alignment_fit import AlignmentFit, Choice
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.alignment.run_data import open_records
from modeling_llm2clip.training.losses.choose_loss import build_loss
from modeling_llm2clip.training.run_folder import METRICS_FILE

DIMS = (768, 256, 64)
NUM_EVALUATIONS = 10
PLAIN, SIGMOID, MATRYOSHKA = "contrastive", "sigmoid", "Matryoshka, 256 and 64"
STRUCTURE, NO_NOISE, BOTH = "with STRUCTURE", "without noise", "with STRUCTURE, without noise"
LOSSES: dict[str, Mapping[str, Any]] = {
    PLAIN: {},
    STRUCTURE: {"structure_weight": 10.0},
    # With few images noise decides much, and STRUCTURE may take its place.
    NO_NOISE: {"image_noise": 0.0, "caption_noise": 0.0},
    BOTH: {"structure_weight": 10.0, "image_noise": 0.0, "caption_noise": 0.0},
    SIGMOID: {"loss": "sigmoid"},
    MATRYOSHKA: {"matryoshka_dims": DIMS[1:]},
}
# A start from random weights shows the effect of a loss; the default start is near the best.
STARTS: dict[str, Mapping[str, Any]] = {
    "random": {"projection_init": "model"},
    "closed form": {},
}
TRAININGS = {
    ("random", 500): (PLAIN, STRUCTURE, NO_NOISE, BOTH),
    ("random", 1_000): (PLAIN, STRUCTURE),
    ("random", 3_000): (PLAIN, STRUCTURE, SIGMOID, MATRYOSHKA),
    ("closed form", 500): (PLAIN, STRUCTURE),
    ("closed form", 3_000): (PLAIN, SIGMOID, MATRYOSHKA),
}
NUM_IMAGES = max(size for _, size in TRAININGS) + MOST_TEST_IMAGES


def main() -> None:
    """Train with every loss, and write the scores after each run."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("data", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--num-splits", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--work", type=Path, required=True, help="keeps the model and the stores")
    output = Path(__file__).parents[1] / "results" / "loss_effects.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    model, data = arguments.work / "model", arguments.work / "data"
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        build_untrained(model, BuildConfig(projection_dim=max(DIMS)))
    if not data.exists():
        join_datasets(dict(text.partition("=")[::2] for text in arguments.data), data)
    dataset = Dataset.prepare("data", data, model, arguments.work)
    # The last fit on all images would double the time, and repeats the chosen training.
    shared = {"max_steps": arguments.max_steps, "global_batch_size": arguments.batch_size}
    shared |= {"eval_steps": max(1, arguments.max_steps // NUM_EVALUATIONS), "refit": False}
    record = {
        **describe_run(
            "torch", "transformers", "modeling_llm2clip", threads=torch.get_num_threads()
        ),
        **dataset.describe(),
        "config": shared,
    }
    runs = read_earlier(arguments.output, record)
    done = [{name: run[name] for name in ("split", *list_trainings(STARTS)[0])} for run in runs]
    for split in range(arguments.num_splits):
        for training in list_trainings(arguments.starts):
            if {"split": split, **training} not in done:
                runs.append(measure(dataset, model, split, training, shared))
                print(runs[-1], flush=True)
                text = json.dumps({**record, "runs": runs}, indent=2)
                arguments.output.write_text(f"{text}\n", "utf-8")


def read_earlier(file: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs that a file has, if it was written by the same code on the same data and machine."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    runs: list[dict[str, Any]] = content.pop("runs", [])
    return runs if content == record else []


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


def list_trainings(starts: Iterable[str]) -> list[dict[str, Any]]:
    """List start, number of images and name of the loss of every training of a split."""
    return [
        {"start": start, "num_images": size, "loss": loss}
        for (start, size), losses in TRAININGS.items()
        for loss in losses
        if start in starts
    ]


def measure(
    dataset: Dataset,
    model: Path,
    split: int,
    training: Mapping[str, Any],
    shared: Mapping[str, Any],
) -> dict[str, Any]:
    """Train once, and find the images that were set aside with embeddings of each size."""
    test, others = split_things(dataset.records, seed=split)
    captions, images = (read_first(store, test) for store in dataset.stores.values())
    config = AlignConfig(**shared, **LOSSES[training["loss"]], **STARTS[training["start"]])
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        part = others[: training["num_images"]]
        records, copies = take_part(dataset.records, part, dataset.stores, Path(scratch))
        opened = {modality: EmbeddingStore.open(copy) for modality, copy in copies.items()}
        head, choice = choose_weights(model, records, opened, Path(scratch) / "run", config)
        lines = map(json.loads, (Path(scratch) / "run" / METRICS_FILE).open(encoding="utf-8"))
        held_out = [
            {name: line[name] for name in ("step", "held_out_loss", "held_out_t2i_r1")}
            for line in lines
            if "held_out_loss" in line
        ]
        scores = {str(dim): score(head, captions, images, dim=dim) for dim in DIMS}
    return {
        **training, "split": split, "scores": scores,
        "best_step": choice.step, "best_share": choice.share, "held_out": held_out,
        "cpu_seconds": round(time.process_time() - started, 1),
    }  # fmt: skip


def choose_weights(
    model: Path,
    records: RecordTable,
    stores: Mapping[str, EmbeddingStore],
    output: Path,
    config: AlignConfig,
) -> tuple[AlignmentModel, Choice]:
    """Train as `align` does, to the weights that held-out images choose, and write no model."""
    processor = LLM2CLIPProcessor.from_pretrained(model)
    data = open_records(records, processor, config, stores["text"], stores["image"])
    fit = AlignmentFit(model, data, output, config, build_loss(config), resume=False)
    with float32_as_such(), stop_on_signals() as stop:
        choice, weights = _choose(fit, {}, stop)
    assert weights  # nothing is fitted once more
    head = load_head(model)
    _, unknown = head.load_state_dict(weights, strict=False)
    assert not unknown
    return head, choice


if __name__ == "__main__":
    main()
