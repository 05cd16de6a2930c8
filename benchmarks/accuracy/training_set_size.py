"""R@1 by number of training images: README's `align` on parts of captioned images.

    python -m benchmarks.accuracy.training_set_size openclipart=FOLDER \\
        photographs=FOLDER --work WORK

Each FOLDER is a dataset as the README describes it; its English captions are used. A fifth of the
things shown, at most 300, is set aside, and the rest is trained on in parts that contain each
other: 100 images, 200, and so on. `--num-splits` repeats this with other images set aside. The
demo's towers run once over each dataset: `--work` keeps the model and the embedding stores, so that
a second call trains at once. Scores are written after each run.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.shared.provenance import describe_run
from modeling_llm2clip import (
    AlignConfig,
    BuildConfig,
    EmbeddingStore,
    align,
    build_model,
    extract,
    load_records,
)
from modeling_llm2clip.building.pretrained_towers import fetch_embedded
from modeling_llm2clip.configs.build_config import EMBEDDED
from modeling_llm2clip.data.records.data_hashes import hash_images, hash_texts
from modeling_llm2clip.data.records.record_table import RecordTable
from modeling_llm2clip.data.store.store_manifest import StoreManifest
from modeling_llm2clip.embedding.extract import index_records, open_rows
from modeling_llm2clip.embedding.store_writer import StoreWriter, begin_store
from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
from modeling_llm2clip.evaluation.metrics.ranking import rank_retrieval
from modeling_llm2clip.evaluation.metrics.scores import hit_rate_at
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel

SIZES = (100, 200, 400, 800, 1_600)
MOST_TEST_IMAGES = 300


def main() -> None:
    """Measure every dataset, and write the scores after each run."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("data", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--num-splits", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of images")
    parser.add_argument("--work", type=Path, required=True, help="keeps the model and the stores")
    output = Path(__file__).parents[1] / "results" / "training_set_size.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = arguments.work / "model"
    if not model.exists():
        build_untrained(model, BuildConfig())
    datasets = {
        name: Dataset.prepare(name, Path(folder), model, arguments.work)
        for name, _, folder in (text.partition("=") for text in arguments.data)
    }
    measured: dict[str, Any] = {}
    for split in range(arguments.num_splits):
        for name, dataset in datasets.items():
            entry = measured.setdefault(name, {**dataset.describe(), "runs": []})
            for run in dataset.measure(model, split, arguments.sizes):
                entry["runs"].append(run)
                record = json.dumps(make_record(measured), indent=2)
                arguments.output.write_text(f"{record}\n", "utf-8")


def build_untrained(
    folder: Path, config: BuildConfig, *, vision: str = EMBEDDED, text: str = EMBEDDED
) -> None:
    """Build a model, by default of the demo's towers."""
    vision_model, text_model, config = fetch_embedded(vision, text, config)
    build_model(vision_model, text_model, folder, config)


def make_record(measured: dict[str, Any]) -> dict[str, Any]:
    """Make the record that is written after each run."""
    return {
        **describe_run("torch", "transformers", "modeling_llm2clip"),
        "datasets": measured,
    }


@dataclass(frozen=True)
class Dataset:
    """Captioned images with the stored embeddings of both towers, by modality."""

    name: str
    records: RecordTable
    stores: dict[str, EmbeddingStore]

    @classmethod
    def prepare(cls, name: str, source: Path, model: Path, work: Path) -> Dataset:
        """Read a dataset, and extract both stores where that is not done."""
        records = RecordTable.from_records(r for r in load_records(source) if r.lang == "en")
        texts = extract(model, records, work / f"{name}-text", modality="text")
        images = extract(model, records, work / f"{name}-image", modality="image")
        stores = {"text": EmbeddingStore.open(texts), "image": EmbeddingStore.open(images)}
        return cls(name, records, stores)

    def describe(self) -> dict[str, Any]:
        """Return how many images are set aside, and the R@1 of a random order."""
        test, _ = split_things(self.records, seed=0)
        return {"num_test_images": len(test), "chance_r1": 1 / len(test)}

    def measure(self, model: Path, split: int, sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Train on parts, and find the images that were set aside.

        Yields:
            By size `split`, `num_images`, `seconds`, and the scores of `score`.
        """
        test, training = split_things(self.records, seed=split)
        captions, images = (read_first(store, test) for store in self.stores.values())
        for size in (size for size in sizes if size <= len(training)):
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as scratch:
                head = train(model, self.records, training[:size], self.stores, Path(scratch))
                scores = score(head, captions, images)
            seconds = round(time.monotonic() - started, 1)
            run = {"split": split, "num_images": size, "seconds": seconds, **scores}
            print(self.name, run, flush=True)
            yield run


def split_things(records: RecordTable, *, seed: int) -> tuple[list[int], list[int]]:
    """Return one record of each thing that is set aside, and of each one to train on, shuffled."""
    first_of_group: dict[str, int] = {}
    for number, record in enumerate(records):
        first_of_group.setdefault(record.group_id or record.name, number)
    shuffled = [first_of_group[group_id] for group_id in sorted(first_of_group)]
    random.Random(seed).shuffle(shuffled)
    num_test = min(MOST_TEST_IMAGES, len(shuffled) // 5)
    return shuffled[:num_test], shuffled[num_test:]


def take_part(
    records: RecordTable, part: list[int], stores: dict[str, EmbeddingStore], to: Path
) -> tuple[RecordTable, dict[str, Path]]:
    """Return some records, and the stores that an extraction of them would write."""
    rows = np.array(sorted(part))
    chosen = records.select(rows)
    copies = {
        modality: copy_rows(store, rows, chosen, to / modality)
        for modality, store in stores.items()
    }
    return chosen, copies


def train(
    model: Path,
    records: RecordTable,
    part: list[int],
    stores: dict[str, EmbeddingStore],
    to: Path,
    config: AlignConfig | None = None,
) -> AlignmentModel:
    """Align on some records and their stored embeddings, by default with the defaults."""
    chosen, copies = take_part(records, part, stores, to)
    aligned = align(
        model, chosen, to / "aligned", config,
        caption_store=copies["text"], image_store=copies["image"],
    )  # fmt: skip
    return load_head(aligned)


def load_head(model: Path) -> AlignmentModel:
    """Load the projections that `align` trains, without the towers."""
    return AlignmentModel.from_pretrained(model, with_llm=False, with_vision_tower=False).eval()


def copy_rows(
    store: EmbeddingStore,
    items: np.ndarray[Any, Any],
    records: RecordTable,
    folder: Path,
) -> Path:
    """Write the store that `extract` would write of some items, from the embeddings of all."""
    plan = {**store.manifest.plan, "data": hash_texts(records)}
    if "images" in plan:
        plan["images"] = hash_images(records)
    planned = replace(store.manifest, complete=False, shards=(), plan=plan)
    begin_store(folder, planned, index_records(records, planned))
    begun = StoreManifest.read(folder)
    writer, rows = StoreWriter(folder, begun), open_rows(folder, begun, records)
    shards = range(begun.num_shards)
    sizes = [len(rows.read_inputs(begun.inputs_of_shard(shard))) for shard in shards]
    embeds = store.read(find_rows(writer, store, items)).split(sizes)
    for shard in shards:
        writer.write(shard, embeds[shard])
    writer.finish()
    return folder


def find_rows(
    writer: StoreWriter, store: EmbeddingStore, items: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Return the row in the whole store of each row of a part of it."""
    part = EmbeddingStore(writer.folder, writer.manifest)
    rows = np.empty(part.manifest.num_rows, np.int64)
    for number, item in enumerate(items.tolist()):
        for long in (False, True):
            rows[part.rows_of(number, long=long)] = store.rows_of(item, long=long)
    return rows


@torch.no_grad()
def score(
    head: AlignmentModel, captions: Tensor, images: Tensor, *, dim: int | None = None
) -> dict[str, float]:
    """R@1 of both directions, and their mean, of stored embeddings; row n of both is a pair.

    Embeddings are truncated to their first `dim` dimensions.
    """
    pairs = [str(number) for number in range(len(images))]
    ranking = rank_retrieval(
        head.project_vision_embeds(images)[:, :dim],
        head.project_caption_embeds(captions)[:, :dim],
        Correspondence.from_group_ids(pairs, pairs),
    )
    t2i, i2t = hit_rate_at(ranking.t2i, k=1), hit_rate_at(ranking.i2t, k=1)
    return {"t2i_r1": t2i, "i2t_r1": i2t, "r1": (t2i + i2t) / 2}


def read_first(store: EmbeddingStore, items: list[int]) -> Tensor:
    """Embeddings of the first caption, or of the image, of each item."""
    numbers = np.array(items)
    return store.read(store.rows_at(numbers, np.zeros_like(numbers)))


if __name__ == "__main__":
    main()
