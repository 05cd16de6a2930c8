"""Builds the index of a folder of images: rows, and approximate index."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..configs.encoding_config import IndexConfig
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.records.record_loading import find_example_data
from ..encoding.devices import find_device
from ..model_folders.training_images import ImageTally, describe_far_images
from .ann_index import FEWEST_ROWS, describe_ann, needs_training, train_ann, tune_ann
from .image_files import list_images
from .index_database import About, IndexDatabase, join_fingerprints
from .index_update import FolderUpdate
from .model_identity import (
    find_whole_model,
    fingerprint_whole_model,
    hash_file_facts,
    name_model,
    require_same_model,
    restore_tally,
    store_tally,
)
from .query_encoding import QueryEncoder

# Texts of everyday things, among which recall is measured: more change its mean by less than 0.01.
_NUM_QUERIES = 200

Report = Callable[[str], object]


def build_index(
    model: str | Path,
    image_dir: Path,
    location: str,
    config: IndexConfig,
    *,
    report: Report | None = None,
) -> tuple[IndexDatabase, QueryEncoder]:
    """Index a folder, or update its index; return the database and the encoder of its queries."""
    find_device(config.device)  # before what takes long
    files = list_images(image_dir)
    warn, say = report or _warn, report or _ignore
    if skipped := files.describe_skipped():
        warn(skipped)
    folder = find_whole_model(model)
    database = _open(model, folder, image_dir, location)
    encoder = QueryEncoder(folder, config.device)
    tally = restore_tally(database.about)
    with database.writing():
        try:
            update = FolderUpdate(database, image_dir, encoder, config, tally)
            counts = update.run(files.readable)
        except KeyboardInterrupt:
            _note_place(database, model, folder, image_dir, tally)
            warn(f"What was encoded is in {location}; the same call continues there.")
            raise
        say(str(counts))
        if counts.errors:
            warn(counts.describe_errors())
        _update_ann(database, encoder, config, has_changed=counts.has_changed, report=say)
        _note_place(database, model, folder, image_dir, tally)
    if far := describe_far_images(folder, tally):
        warn(far)
    return database, encoder


def _open(model: str | Path, folder: Path, image_dir: Path, location: str) -> IndexDatabase:
    """Open the database of this model and folder, or make it."""

    def describe() -> About:
        return About(
            model=name_model(model),
            fingerprint=join_fingerprints(fingerprint_whole_model(folder)),
            model_files=hash_file_facts(folder),
            image_dir=str(image_dir.resolve()),
            width=LLM2CLIPConfig.from_pretrained(folder).projection_dim,
        )

    database = IndexDatabase.create(location, describe)
    require_same_model(database, model, folder)
    indexed = Path(database.about.image_dir)
    if indexed != image_dir.resolve() and indexed.is_dir() and database.count():
        raise ValueError(
            f"{location} is the index of {indexed}, and would lose those images to the ones in "
            f"{image_dir}. Name a new database, or index a folder that holds both."
        )
    return database


def _update_ann(
    database: IndexDatabase,
    encoder: QueryEncoder,
    config: IndexConfig,
    *,
    has_changed: bool,
    report: Report,
) -> None:
    """Train, tune or drop the approximate index, depending on the number of images."""
    about = database.about
    if config.ann == "never" or (config.ann == "auto" and database.count() < FEWEST_ROWS):
        if about.ann is not None:
            with database.changing() as table:
                table.drop_ann()
            database.write_about(replace(about, ann=None))
        return
    is_used = about.ann is not None and about.ann.is_used
    trains = needs_training(database) or (config.ann == "always" and not is_used)
    if not trains and not (is_used and has_changed):
        return
    queries = encoder.encode_texts(choose_texts(_NUM_QUERIES))
    if trains or about.ann is None:
        if about.ann is not None:
            # Who searches meanwhile must not visit new partitions in the number of the old ones.
            database.write_about(replace(about, ann=None))
        always = config.ann == "always"
        ann = train_ann(
            database, queries, min_recall=config.min_recall, always=always, report=report
        )
    else:
        ann = tune_ann(database, about.ann, queries, min_recall=config.min_recall)
        report(describe_ann(ann))
    database.write_about(replace(about, ann=ann))


def choose_texts(count: int) -> list[str]:
    """Choose different English captions of the example images, the same ones at each call."""
    captions: set[str] = set()
    for name in ("photographs", "emoji"):
        file = find_example_data() / name / "captions.jsonl"
        lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
        captions |= {line["captions"][0] for line in lines if line["lang"] == "en"}
    return random.Random(0).sample(sorted(captions), count)


def _note_place(
    database: IndexDatabase,
    model: str | Path,
    folder: Path,
    image_dir: Path,
    tally: ImageTally,
) -> None:
    """Record where model and images are now, and which images were encoded."""
    about = replace(
        database.about,
        model=name_model(model),
        model_files=hash_file_facts(folder),
        image_dir=str(image_dir.resolve()),
        tally=store_tally(tally),
    )
    if about != database.about:
        database.write_about(about)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _ignore(_: str) -> None:
    return None
