"""Whether a model notices images that are unlike those that it was trained on, in all directions.

    python -m benchmarks.accuracy.training_data_distance photographs=FOLDER photographs=FOLDER \\
        "cut-out photographs=FOLDER" emoji=FOLDER drawings=FOLDER

Each FOLDER has captioned images; those of one name are one kind. A third of the groups of each kind
is set aside. The vision tower of --model encodes all images, the others are summarized as `align`
does it, and sets of images are judged as `index`, `tag`, `embed`, `serve` and `evaluate` judge
theirs:

* of each other kind: all its images, and random sets of 20;
* of the same kind, for false alarms: all that were set aside, random sets of 20 of them, and, as
  the worst case, each of them with the 19 that are nearest to it;
* half and half: 20 of those that were set aside, and 20 of another kind.

Then models of two kinds judge the third. No text tower runs: the summary depends on images alone.
Exits with 1 where a whole kind is judged wrongly.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.shared.provenance import describe_run, write_result
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.encoding.encode import encode_images
from modeling_llm2clip.model_folders.training_images import (
    FAR,
    FEWEST_JUDGED,
    DatasetSummary,
    ImageTally,
    TrainingImages,
    summarize_images,
)
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPVisionModel
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.training.alignment.image_summary import sample_images

NUM_SETS = 500
SET_ASIDE = 1 / 3


@dataclass
class Kind:
    """Images of one kind, by the embeddings of the tower: to train on, and set aside."""

    name: str
    trained: Tensor
    held_out: Tensor

    def summarize(self) -> DatasetSummary:
        """Summarize the images to train on."""
        return summarize_images(self.trained, name=self.name, num_images=len(self.trained))


def main() -> int:
    """Measure all directions, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("data", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--model", type=Path, help="default: the embedded towers, built anew")
    parser.add_argument("--max-images", type=int, default=600, help="of each folder")
    parser.add_argument("--ignore-fields", nargs="*", default=[], help="of captions.jsonl")
    output = Path(__file__).parents[1] / "results" / "training_data_distance.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or build_model(Path(scratch) / "model")
        kinds = encode_kinds(
            model, arguments.data, arguments.max_images, ignore_fields=arguments.ignore_fields
        )
    record = {
        **describe_run("torch", "transformers", "modeling_llm2clip"),
        "fewest_judged": FEWEST_JUDGED,
        "num_sets": NUM_SETS,
        "one_kind": {kind.name: measure_one(kind, kinds) for kind in kinds},
        "two_kinds": [measure_pair(pair, kinds) for pair in itertools.combinations(kinds, 2)],
    }
    write_result(arguments.output, record)
    wrong = list(list_wrong(record))
    print("\n".join(wrong) or "Every kind was judged rightly.")
    return bool(wrong)


def build_model(folder: Path) -> Path:
    """Build the model of the README's recipe."""
    command = [sys.executable, "-m", "modeling_llm2clip", "build", "embedded", "embedded", folder]
    subprocess.run(command, check=True)
    return folder


def encode_kinds(
    folder: Path, data: list[str], max_images: int, *, ignore_fields: list[str]
) -> list[Kind]:
    """Encode a sample of the images of each kind."""
    model = LLM2CLIPVisionModel.from_pretrained(folder).eval()
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    folders: dict[str, list[str]] = {}
    for text in data:
        name, _, source = text.partition("=")
        folders.setdefault(name, []).append(source)
    kinds = []
    for name, sources in folders.items():
        embeds, groups = [], []
        for number, source in enumerate(sources):
            records = RecordTable.from_records(load_records(source, ignore_fields=ignore_fields))
            items = sample_images(records, max_images)
            images = list(records.select(items).iterate_images())
            embeds.append(encode_images(model, processor, images, project=False))
            keys = records.read_numbers("group_key", items)
            groups += [(number, key) for key in keys.tolist()]
        held_out = set_aside(groups)
        joined = torch.cat(embeds)
        kinds.append(Kind(name, joined[~held_out], joined[held_out]))
        print(name, len(joined), "images", flush=True)
    return kinds


def set_aside(groups: list[tuple[int, int]]) -> np.ndarray[Any, Any]:
    """Choose the images that are set aside, in whole groups."""
    different = sorted(set(groups))
    order = np.random.default_rng(0).permutation(len(different))
    chosen = {different[place] for place in order[: round(SET_ASIDE * len(different))]}
    return np.array([group in chosen for group in groups])


def measure_one(kind: Kind, kinds: list[Kind]) -> dict[str, Any]:
    """Let a model that was trained on one kind judge all of them."""
    summary = TrainingImages((kind.summarize(),))
    others = {
        other.name: {
            **judge_all(summary, everything(other)),
            "sets_far": judge_sets(summary, random_sets(everything(other), FEWEST_JUDGED)),
            "half_far": judge_sets(
                summary,
                map(
                    torch.cat,
                    zip(
                        random_sets(kind.held_out, FEWEST_JUDGED),
                        random_sets(everything(other), FEWEST_JUDGED),
                        strict=True,
                    ),
                ),
            ),
        }
        for other in kinds
        if other is not kind
    }
    own_kind = {
        **judge_all(summary, kind.held_out),
        "sets_far": judge_sets(summary, random_sets(kind.held_out, FEWEST_JUDGED)),
        "nearest_far": judge_sets(summary, nearest_sets(kind.held_out, FEWEST_JUDGED)),
    }
    return {
        "num_images": len(kind.trained),
        "num_held_out": len(kind.held_out),
        "threshold": FAR,
        "own": own_kind,
        "others": others,
    }


def measure_pair(pair: tuple[Kind, Kind], kinds: list[Kind]) -> dict[str, Any]:
    """Let a model that was trained on two kinds judge these, their mixture and each other kind."""
    summary = TrainingImages((pair[0].summarize(), pair[1].summarize()))
    names = [kind.name for kind in pair]
    fewest = min(len(kind.held_out) for kind in pair)
    mixture = torch.cat([kind.held_out[:fewest] for kind in pair])
    return {
        "kinds": names,
        "own": {kind.name: judge_all(summary, kind.held_out) for kind in pair}
        | {"mixture": judge_all(summary, mixture)},
        "others": {
            kind.name: judge_all(summary, everything(kind))
            for kind in kinds
            if kind.name not in names
        },
    }


def everything(kind: Kind) -> Tensor:
    """All images of a kind."""
    return torch.cat([kind.trained, kind.held_out])


def judge_all(summary: TrainingImages, embeds: Tensor) -> dict[str, Any]:
    """Judge a set of images: its distance, and whether it is far."""
    tally = ImageTally()
    tally.add(embeds)
    distance = summary.measure(tally)
    assert distance is not None
    return {"distance": round(distance, 3), "is_far": distance > FAR}


def judge_sets(summary: TrainingImages, sets: Iterator[Tensor]) -> float:
    """Return the share of sets that are far."""
    return float(np.mean([judge_all(summary, embeds)["is_far"] for embeds in sets]))


def random_sets(embeds: Tensor, size: int) -> Iterator[Tensor]:
    """Yield random sets of images."""
    random = np.random.default_rng(0)
    for _ in range(NUM_SETS):
        yield embeds[random.choice(len(embeds), min(size, len(embeds)), replace=False)]


def nearest_sets(embeds: Tensor, size: int) -> Iterator[Tensor]:
    """Yield each image with those that are nearest to it."""
    unit = torch.nn.functional.normalize(embeds, dim=1)
    for row in unit:
        yield embeds[(unit @ row).topk(min(size, len(unit))).indices]


def list_wrong(record: dict[str, Any]) -> Iterator[str]:
    """List the whole kinds that were judged wrongly."""
    for name, judgments in record["one_kind"].items():
        if judgments["own"]["is_far"]:
            yield f"Trained on {name}, its own kind was called far."
        for other, judged in judgments["others"].items():
            if not judged["is_far"]:
                yield f"Trained on {name}, {other} were not called far."


if __name__ == "__main__":
    sys.exit(main())
