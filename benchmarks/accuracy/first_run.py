"""The README's training recipe, word for word, on captioned images that no setting was tuned to.

    python -m benchmarks.accuracy.first_run --splits 5 openclipart=FOLDER \\
        photographs=FOLDER emoji=FOLDER

Each FOLDER is a dataset as the README describes it. The recipe's first commands, which train
nothing, run once on all of its images. Then, for each split, a fifth of the images, at most 300, is
set aside, and the recipe's last command runs on the rest, in an empty folder, unchanged; its stores
hold the rest alone. The same is done with other settings, among them the closed form alone and
training from random weights. Every model is asked to find the images that were set aside. Scores
are means over the splits with their standard errors; since all settings see the same splits, their
differences from the closed form have errors of their own. With --work, models and stores stay in
that folder and are taken from there the next time; seconds are then not measured. Datasets that the
output has of the same commit stay in it. All of it is done with each of the --vision-models in
place of the recipe's `embedded`, for the same splits; other names stand behind the dataset's. With
--text-precision, all of it is done once more with `embedded` and texts in that precision.
With --existing, the last command also fine-tunes a model on the same towers that was trained on
other images. Exits with 1 when the recipe reaches less than 0.9 of the best setting on any dataset.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.provenance import describe_run
from benchmarks.tables.markdown_tables import find_standard_error
from modeling_llm2clip.configs.config_fields import Precision
from modeling_llm2clip.configs.encoding_config import ExtractConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.records.records import CaptionedImage, Modality
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.data.store.store_manifest import StoreManifest
from modeling_llm2clip.embedding.extract import index_records, open_rows, plan_store
from modeling_llm2clip.embedding.shard_encoding import load_shard_encoder
from modeling_llm2clip.embedding.store_writer import StoreWriter, begin_store
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import rank_retrieval
from modeling_llm2clip.evaluation.metrics.scores import hit_rate_at
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.run_folder import read_results

ROOT = Path(__file__).parents[2]
RECIPE = re.compile(r"<!-- recipe -->\n```bash\n(.*?)```", re.DOTALL)
# Names in the README: the user's images, the model that embeds them, and the results.
IMAGES, MODEL, ALIGNED = "my-images", "my-model", "aligned"
STORES: dict[Modality, str] = {"text": "captions", "image": "images"}
RECIPE_NAME, CLOSED_FORM = "README's recipe", "closed form alone"
EXISTING, FINE_TUNED = "existing model", "existing model, fine-tuned"
LEAST_SHARE_OF_BEST = 0.9
MOST_TEST_IMAGES = 300
# Flags of `align` beside the recipe's own.
OTHER_SETTINGS = {
    CLOSED_FORM: ["--max-steps", "0"],
    "without the fit on all images": ["--no-refit"],
    "closed form, trained without noise": ["--image-noise", "0", "--caption-noise", "0"],
    "closed form, trained at 1e-3": ["--learning-rate", "1e-3"],
    "closed form, 1,000 steps": ["--max-steps", "1000"],
    "from random, 300 steps": ["--projection-init", "model"],
    "from random, 1,000 steps": ["--projection-init", "model", "--max-steps", "1000"],
}


def main() -> int:
    """Measure every dataset, record the scores, and compare them with the bar."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("data", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--existing", type=Path, help="such as llm2clip-demo/model; default: none")
    parser.add_argument("--splits", type=int, default=1, help="how often images are set aside")
    parser.add_argument(
        "--settings", nargs="*", default=list(OTHER_SETTINGS), choices=OTHER_SETTINGS,
        metavar="NAME", help="which other settings are tried; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--vision-models", nargs="*", default=["embedded", "embedded-small"], metavar="NAME",
        help="default: embedded and embedded-small, which the table compares",
    )  # fmt: skip
    parser.add_argument("--text-precision", choices=("bfloat16",), help="default: none")
    parser.add_argument("--work", type=Path, help="folder to keep stores in; default: none")
    parser.add_argument("--note", default="", help="what else runs on the machine")
    output = Path(__file__).parents[1] / "results" / "first_run.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    record = {
        **describe_run("torch", "transformers", "modeling_llm2clip", note=arguments.note),
        "recipe": read_recipe(),
    }
    measured = read_earlier(arguments.output, record)
    variants: list[tuple[str, Precision]] = [(each, "auto") for each in arguments.vision_models]
    if arguments.text_precision is not None:
        variants.append(("embedded", arguments.text_precision))
    for text, (vision, precision) in itertools.product(arguments.data, variants):
        name, _, folder = text.partition("=")
        name = name if vision == "embedded" else f"{name}, {vision}"
        name = name if precision == "auto" else f"{name}, texts in {precision}"
        with tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch) if arguments.work is None else arguments.work.resolve() / name
            dataset = Dataset(Path(folder).resolve(), work / "whole", vision, precision)
            splits = []
            for seed in range(arguments.splits):
                splits.append(
                    run_split(dataset, Path(scratch) / f"split-{seed}", arguments, seed=seed)
                )
                measured[name] = summarize_dataset(dataset, splits)
                content = json.dumps({**record, "datasets": measured}, indent=2) + "\n"
                arguments.output.write_text(content, encoding="utf-8")  # a split takes minutes
    print(json.dumps(measured, indent=2))
    missed = [
        name
        for name, entry in measured.items()
        if entry["recipe_r1"] < LEAST_SHARE_OF_BEST * entry["best_r1"]
    ]
    if missed:
        print(f"The recipe reaches less than {LEAST_SHARE_OF_BEST} of the best setting: {missed}")
    return bool(missed)


def read_recipe() -> list[str]:
    """Return the commands of the README's recipe, unchanged."""
    (block,) = RECIPE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    return [line for line in block.splitlines() if line.strip()]


def read_earlier(file: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Datasets that a file has, if it was written by the same code on the same machine."""
    if not file.is_file():
        return {}
    recorded = json.loads(file.read_text(encoding="utf-8"))
    same = all(recorded.get(name) == value for name, value in record.items())
    return dict(recorded["datasets"]) if same else {}


class Dataset:
    """A dataset with the model and the stores of all its images."""

    def __init__(
        self,
        source: Path,
        whole: Path,
        vision: str = "embedded",
        text_precision: Precision = "auto",
    ) -> None:
        """Run the commands of the recipe that train nothing, unless `whole` has their outputs."""
        self.source, self.whole = source, whole
        self.configs: dict[Modality, ExtractConfig] = {
            "text": ExtractConfig(precision=text_precision),
            "image": ExtractConfig(),
        }
        self.lines = read_lines(source)
        is_new = not whole.exists()
        if is_new:
            write_images(source, whole / IMAGES, self.lines)
        started = time.monotonic()
        for command in read_recipe()[:-1]:
            if is_new or " build " not in command:
                command = command.replace("build embedded ", f"build {vision} ")
                if text_precision != "auto":
                    texts = f"--modality text --precision {text_precision}"
                    command = command.replace("--modality text", texts)
                run(command, whole)
        self.seconds = time.monotonic() - started if is_new else None
        self.records = load_records(whole / IMAGES)


def run_split(
    dataset: Dataset, folder: Path, arguments: argparse.Namespace, *, seed: int
) -> dict[str, Any]:
    """Set images aside, and run the recipe and the other settings on the rest.

    Returns: scores by setting, numbers of images, the seconds of the recipe's last command, and
        what it chose.
    """
    align = read_recipe()[-1]
    test = prepare_split(dataset, folder, seed=seed)
    commands = {RECIPE_NAME: align}
    for number, name in enumerate(arguments.settings):
        other = align.replace(f" {ALIGNED} ", f" {ALIGNED}-{number} ")
        commands[name] = " ".join([other, *OTHER_SETTINGS[name]])
    scores = {}
    if arguments.existing is not None:
        other = align.replace(f" {ALIGNED} ", " fine-tuned ")
        commands[FINE_TUNED] = other.replace(f" {MODEL} ", f" {arguments.existing.resolve()} ")
        scores[EXISTING] = score(arguments.existing, test)
    seconds = 0.0
    for name, command in commands.items():
        started = time.monotonic()
        run(command, folder)
        if name == RECIPE_NAME:
            seconds = time.monotonic() - started
        scores[name] = score(folder / command.split()[4] / "model", test)
        print(seed, name, scores[name], flush=True)
    results = read_results(folder / ALIGNED)
    return {
        "scores": scores,
        "seconds": seconds,
        "num_images": len(load_records(folder / IMAGES)),
        "num_test_images": len(test),
        "chosen": {name: results[name] for name in ("start", "held_out", "refit", "steps")},
    }


def summarize_dataset(dataset: Dataset, splits: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of the recipe and of the best setting, chance, the recipe's seconds, and all scores.

    R@1 is the mean of both directions.
    """
    scores = summarize([split["scores"] for split in splits])
    existing = {"before": scores.pop(EXISTING, None), "after": scores.pop(FINE_TUNED, None)}
    best = max(scores, key=lambda name: scores[name]["r1"]["mean"])
    seconds = dataset.seconds
    if seconds is not None:
        seconds = round(seconds + mean(split["seconds"] for split in splits))
    return {
        "num_splits": len(splits),
        "recipe_r1": scores[RECIPE_NAME]["r1"]["mean"],
        "best_r1": scores[best]["r1"]["mean"],
        "best": best,
        "chance_r1": 1 / splits[0]["num_test_images"],
        "seconds": seconds,
        "num_images": splits[0]["num_images"],
        "num_test_images": splits[0]["num_test_images"],
        "chosen": [split["chosen"] for split in splits],
        "scores": scores,
        "existing_model": existing if existing["before"] is not None else None,
    }


def summarize(splits: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Compute means and standard errors over the splits by setting, beside the splits' scores.

    `minus_closed_form` has the same of the differences of R@1 from the closed form alone.
    """
    summary: dict[str, Any] = {}
    for name in splits[0]:
        of_splits = [scores[name] for scores in splits]
        summary[name] = {
            measure: describe([scores[measure] for scores in of_splits]) for measure in of_splits[0]
        }
        if CLOSED_FORM in splits[0] and name != CLOSED_FORM:
            summary[name]["minus_closed_form"] = describe(
                [scores[name]["r1"] - scores[CLOSED_FORM]["r1"] for scores in splits]
            )
    return summary


def describe(values: list[float]) -> dict[str, Any]:
    """Mean, standard error of the mean (None of one value), and the values."""
    error = find_standard_error(values)
    return {"mean": mean(values), "standard_error": error, "by_split": values}


def read_lines(source: Path) -> list[dict[str, Any]]:
    """Read the lines of a dataset in English, with the fields that the package knows."""
    lines = [json.loads(line) for line in (source / "captions.jsonl").open(encoding="utf-8")]
    known = ("image", "captions", "long_captions", "keywords", "group_id", "lang")
    return [
        {name: line[name] for name in known if line.get(name)}
        for line in lines
        if line.get("lang", "en") == "en"
    ]


def write_images(source: Path, folder: Path, lines: list[dict[str, Any]]) -> None:
    """Write a folder of images: links to the source's, and some of its lines."""
    folder.mkdir(parents=True)
    for child in source.iterdir():
        if child.is_dir():
            (folder / child.name).symlink_to(child.resolve())
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class TestImages:
    """Images that were set aside, one of each thing, with their first captions."""

    group_ids: list[str]
    caption_embeds: Tensor
    vision_embeds: Tensor

    def __len__(self) -> int:
        return len(self.group_ids)


def prepare_split(dataset: Dataset, folder: Path, *, seed: int) -> TestImages:
    """Set aside a fifth of the things shown, 300 at most, and write the rest with its stores."""
    records = dataset.records
    group_ids = sorted({record.group_id for record in records})
    random.Random(seed).shuffle(group_ids)
    held_out = set(group_ids[: min(MOST_TEST_IMAGES, len(group_ids) // 5)])
    rest = [line for line in dataset.lines if line.get("group_id", line["image"]) not in held_out]
    write_images(dataset.source, folder / IMAGES, rest)
    (folder / MODEL).symlink_to(dataset.whole / MODEL)
    stores = {
        modality: EmbeddingStore.open(dataset.whole / name) for modality, name in STORES.items()
    }
    rows = {modality: number_rows(records, modality) for modality in stores}
    for modality, store in stores.items():
        kept = load_records(folder / IMAGES)
        write_part(
            store, rows[modality], kept, folder, dataset.configs[modality], modality=modality
        )
    test = list({r.group_id: r for r in reversed(records) if r.group_id in held_out}.values())
    return TestImages(
        [record.group_id for record in test],
        stores["text"].read([rows["text"][record.captions[0]] for record in test]),
        stores["image"].read([rows["image"][record.name] for record in test]),
    )


def number_rows(records: Sequence[CaptionedImage], modality: Modality) -> dict[str, int]:
    """Row of each caption, or of the image of each name, in the store of some records."""
    if modality == "image":
        keys = dict.fromkeys(record.name for record in records)
    else:
        keys = dict.fromkeys(
            text for record in records for text in (*record.captions, *record.long_captions)
        )
    return {text: row for row, text in enumerate(keys)}


def write_part(
    store: EmbeddingStore,
    rows: dict[str, int],
    records: Sequence[CaptionedImage],
    folder: Path,
    config: ExtractConfig,
    *,
    modality: Modality,
) -> None:
    """Write the store that `extract` writes of some records, from one of all of them."""
    table, model = RecordTable.from_records(records), folder / MODEL
    encoder = load_shard_encoder(model, modality, config, torch.device("cpu"))
    planned = plan_store(model, table, encoder, config, modality)
    output = folder / STORES[modality]
    begin_store(output, planned, index_records(table, planned))
    begun = StoreManifest.read(output)
    writer, inputs = StoreWriter(output, begun), open_rows(output, begun, table)
    names = list(number_rows(records, modality))
    for shard in writer.list_missing():
        part = begun.inputs_of_shard(shard)
        texts = names[part.start : part.stop] if modality == "image" else inputs.read_inputs(part)
        writer.write(shard, store.read([rows[text] for text in texts]))
    writer.finish()


def run(command: str, folder: Path) -> None:
    """Run a command of the README with this package, and show its output."""
    print(f"$ {command}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = f"{sys.executable} -m modeling_llm2clip "
    assert command.startswith("llm2clip ")
    subprocess.run(
        command.replace("llm2clip ", program, 1), shell=True, check=True, cwd=folder,
        env=environment,
    )  # fmt: skip


@torch.no_grad()
def score(folder: Path, test: TestImages) -> dict[str, float]:
    """R@1 of both directions, and their mean, among the images that were set aside."""
    head = AlignmentModel.from_pretrained(folder, with_llm=False, with_vision_tower=False).eval()
    text_embeds = head.project_caption_embeds(test.caption_embeds)
    image_embeds = head.project_vision_embeds(test.vision_embeds)
    ranking = rank_retrieval(
        image_embeds, text_embeds, Correspondence.from_group_ids(test.group_ids, test.group_ids)
    )
    scores = {
        "t2i_r1": hit_rate_at(ranking.t2i, k=1),
        "i2t_r1": hit_rate_at(ranking.i2t, k=1),
    }
    return {**scores, "r1": sum(scores.values()) / 2}


if __name__ == "__main__":
    sys.exit(main())
