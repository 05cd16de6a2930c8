"""Outputs of data that are read again: stores, Parquet, indexes, cached records, results."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import aligning
import evaluating
import inheriting
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from aligning import Prepared
from indexes import save_images
from tiny import draw_noise

from faults.damage import Target, call
from modeling_llm2clip.configs.encoding_config import EmbedConfig, ExtractConfig, IndexConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.embedding.embed import embed
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.evaluation.evaluate import evaluate
from modeling_llm2clip.evaluation.results import read_evaluation_results
from modeling_llm2clip.search.image_index import ImageIndex
from modeling_llm2clip.search.index_database import IndexDatabase

Modality = Literal["text", "image"]
_QUIET: dict[str, Any] = {"device": "cpu", "show_progress": False}
_STORE = ExtractConfig(store_dtype="float32", rows_per_shard=16, **_QUIET)
_EMBED = EmbedConfig(columns=("text", "name"), dtype="int8", rows_per_shard=16, **_QUIET)
_INDEX = IndexConfig(**_QUIET)
_MANY = 20_001  # records; of fewer the index is not kept
_LABELS = "red\nblue\n"
_inputs = Path()  # of all targets, which no case changes


def begin(folder: Path) -> None:
    """Choose the folder of the inputs. They are on disk, since every case is a process."""
    global _inputs
    _inputs = folder / "inputs"
    _inputs.mkdir(parents=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")


def make_once(name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder of the inputs, which the first caller makes."""
    folder = _inputs / name
    if not folder.exists():
        make(folder)
    return folder


def prepare() -> Prepared:
    """Return data, model and stores for alignments."""
    root = make_once("aligning", aligning.prepare)
    return Prepared(root / "data", root / "exported", root / "captions", root / "images")


def prepare_inheriting() -> inheriting.Inheriting:
    """Return the same of a model that keeps its CLIP's projection, with a teacher's store."""
    root = make_once("inheriting", lambda f: inheriting.prepare(f, "clip", count=24))
    names = ("data", "model", "captions", "images", "clip", "teacher")
    return inheriting.Inheriting(**{name: root / name for name in names})


# Stores and Parquet.


def extract_part(folder: Path, part: str | None, modality: Modality = "text") -> Path:
    """Extract captions or images, or one partition of them."""
    prepared = prepare()
    return extract(
        prepared.model, prepared.records, folder / "store", _STORE,
        modality=modality, partition=part,
    )  # fmt: skip


def extract_teacher(folder: Path) -> Path:
    prepared = prepare_inheriting()
    return extract(prepared.clip, prepared.records, folder / "store", _STORE, modality="text")


def extract_two_parts(folder: Path) -> Path:
    extract_part(folder, "1/2")
    return extract_part(folder, "2/2")


def read_store(folder: Path) -> object:
    """Return everything that a store can be asked for."""
    store = EmbeddingStore.open(folder)
    items = range(len(store))
    counts = np.add(*store.count_rows())
    numbers = np.concatenate([np.arange(count) for count in counts])
    return [
        hashlib.sha256(store.read(range(store.manifest.num_rows)).numpy().tobytes()).hexdigest(),
        [(store.rows_of(i).tolist(), store.rows_of(i, long=True).tolist()) for i in items],
        store.rows_at(np.repeat(np.arange(len(store)), counts), numbers).tolist(),
        (list(store.names), list(store.group_ids), list(store.langs)),
        (store.keys.tolist(), [keys.tolist() for keys in store.iterate_numbers("group_key")]),
        store.manifest.to_json(),
    ]


def embed_part(folder: Path, part: str | None, **options: Any) -> Path:
    """Embed captions, or one partition of them."""
    prepared = prepare()
    return embed(
        prepared.model, prepared.records, folder / "embeddings", replace(_EMBED, **options),
        modality="text", partition=part,
    )  # fmt: skip


def read_embeddings(folder: Path) -> object:
    """Continue an output, and return its rows as another package reads them."""
    embed_part(folder.parent, None)
    return hashlib.sha256(repr(pq.read_table(folder).to_pydict()).encode()).hexdigest()


def read_ranges(folder: Path) -> object:
    """Embed by the int8 ranges of another output."""
    other = embed_part(folder.parent / "other", None, int8_ranges=folder)
    return hashlib.sha256(repr(pq.read_table(other).to_pydict()).encode()).hexdigest()


# Indexes.


def build_index(folder: Path) -> Path:
    """Index images."""
    images = make_once("images", save_images)
    ImageIndex.build(prepare().model, images, folder / "index", _INDEX)
    return folder / "index"


def build_updated_index(folder: Path) -> Path:
    """Index images, of which one is removed later, one replaced and one added."""
    images = make_once("images", save_images)
    (images / "gone.png").write_bytes((images / "1.png").read_bytes())
    draw_noise(32, 32, seed=9).save(images / "3.png")
    build_index(folder)
    (images / "gone.png").unlink()
    draw_noise(32, 32, seed=10).save(images / "3.png")
    draw_noise(32, 32, seed=11).save(images / "added.png")
    return build_index(folder)


def read_index(folder: Path) -> object:
    """Search by text and filter, and return all embeddings."""
    index = ImageIndex.open(folder, device="cpu")
    results = [index.search("a red dog", where=where) for where in (None, "width > 41")]
    database = IndexDatabase(folder)
    embeddings = sorted(
        (name, row.tobytes().hex())
        for names, rows in database.iterate_embeddings()
        for name, row in zip(names, rows, strict=True)
    )
    hits = [[(path.name, cosine) for path, cosine in result.hits] for result in results]
    return hits, embeddings


def update_index(folder: Path) -> object:
    """Update an index, tag its images by it, and search it."""
    labels = folder.parent / "labels.txt"
    labels.write_text(_LABELS, encoding="utf-8")
    tags = folder.parent / "tags.csv"
    tags.unlink(missing_ok=True)
    ImageIndex.build(prepare().model, _inputs / "images", folder, _INDEX)
    call("tag", prepare().model, _inputs / "images", "--labels", labels, "--index", folder,
         "--device", "cpu", "--output", tags)  # fmt: skip
    return tags.read_text(encoding="utf-8"), read_index(folder)


# Caches and results.


def write_many(folder: Path) -> None:
    """Write rows of which one is not a record: its count is kept beside the index."""
    numbers = [*map(str, range(_MANY + 1))]
    columns = {
        "key": numbers,
        "url": [f"https://a.example/{number}" for number in numbers],
        "status": ["failed", *["success"] * _MANY],
        "error_message": numbers,
        "caption": [f"text {number}" for number in numbers],
    }
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "00000.parquet")


def cache_records(folder: Path) -> Path:
    load_cached(folder)
    return folder


def load_cached(folder: Path) -> object:
    os.environ["XDG_CACHE_HOME"] = str(folder)
    records = load_records(make_once("many", write_many), modality="text")
    assert list(folder.rglob("*.arrow"))
    content = [(r.name, r.captions, r.long_captions, r.lang, r.group_id) for r in records]
    return len(content), hashlib.sha256(repr(content).encode()).hexdigest(), records.skipped


def evaluate_again(folder: Path) -> object:
    """Find the results of an evaluation, and return all."""
    _evaluate(folder)
    return [(result.task, result.scores, result.counts) for result in
            read_evaluation_results(folder)]  # fmt: skip


def _evaluate(output: Path) -> Path:
    data = make_once("evaluated", evaluating.write_data)
    evaluate(**evaluating.arguments(output, str(data), str(prepare().model)))
    return output


TARGETS = (
    Target("store of captions", partial(extract_part, part=None), read_store),
    Target("store of images", partial(extract_part, part=None, modality="image"), read_store),
    Target("store of a teacher", extract_teacher, read_store),
    Target("begun store", partial(extract_part, part="1/2"),
           lambda path: read_store(extract_part(path.parent, None))),
    Target("store in partitions", extract_two_parts, read_store),
    Target("begun Parquet", partial(embed_part, part="1/2"), read_embeddings),
    Target("Parquet", partial(embed_part, part=None), read_embeddings),
    Target("int8 ranges", partial(embed_part, part=None), read_ranges,
           files=("_manifest.json",)),
    # Only a new database has no files of earlier versions, which nobody reads.
    Target("index", build_index, read_index, files=("data/*",)),
    Target("index that is updated", build_updated_index, update_index),
    Target("cached records", cache_records, load_cached),
    Target("results", lambda folder: _evaluate(folder / "results"), evaluate_again),
)  # fmt: skip
