"""Rows per second into Parquet: `embed`, and sentence-transformers' `encode` with pandas.

    python -m benchmarks.speed.embed_speed --model llm2clip-demo/model

Both load the same model folder, embed the same captions and images of the emoji, and write Parquet.
They take turns, so that a machine whose speed drifts is fair to both. The seconds include loading
the model; embeddings are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer

from benchmarks.shared.provenance import describe_run, write_result
from modeling_llm2clip import EmbedConfig, embed, load_records
from modeling_llm2clip.data.records.record_loading import find_example_data
from modeling_llm2clip.data.records.record_table import RecordTable


def main() -> None:
    """Measure, print, and write the result."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    records = sample_records(arguments.count)
    rows = []
    for modality in ("text", "image"):
        with tempfile.TemporaryDirectory() as temporary:
            rows.append(_compare(arguments.model, records, modality, Path(temporary), arguments))
    result = {
        "rows": rows,
        "rounds": arguments.rounds,
        **describe_run(
            "torch", "sentence-transformers", "pandas", "pyarrow", threads=arguments.threads
        ),
    }
    write_result(arguments.output, result)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--count", type=int, default=1000, help="images, with their captions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "embed_speed.json")
    return parser.parse_args()


def sample_records(count: int) -> RecordTable:
    """Take records of the emoji in English, evenly spaced."""
    records = load_records(find_example_data() / "emoji")
    english = [number for number, record in enumerate(records) if record.lang == "en"]
    places = np.linspace(0, len(english) - 1, min(count, len(english))).astype(int)
    return records.select(np.array(english)[places])


def write_ours(model: str, records: RecordTable, modality: str, folder: Path) -> np.ndarray:
    """Embed with this package; returns the embeddings in the order of the records."""
    config = EmbedConfig(show_progress=False)
    embed(model, records, folder, config, modality=modality)
    column = pq.read_table(folder)["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def write_theirs(model: str, records: RecordTable, modality: str, folder: Path) -> np.ndarray:
    """Embed with sentence-transformers, and write with pandas."""
    encoder = SentenceTransformer(model, device="cpu")
    if modality == "text":
        inputs = [text for r in records for text in (*r.captions, *r.long_captions)]
    else:
        inputs = [str(record.path) for record in records]
    embeddings = encoder.encode(inputs, show_progress_bar=False, normalize_embeddings=True)
    folder.mkdir()
    frame = pd.DataFrame({"id": range(len(inputs)), "embedding": list(embeddings)})
    frame.to_parquet(folder / "embeddings.parquet")
    return embeddings


def _compare(
    model: str, records: RecordTable, modality: str, folder: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    embeddings: dict[str, np.ndarray] = {}
    for turn in range(arguments.rounds):
        for name, write in (("ours", write_ours), ("theirs", write_theirs)):
            started = time.perf_counter()
            embeddings[name] = write(model, records, modality, folder / f"{name}-{turn}")
            seconds[name].append(time.perf_counter() - started)
    count = len(embeddings["ours"])
    rates = {name: count / statistics.median(times) for name, times in seconds.items()}
    return {
        "modality": modality,
        "count": count,
        "rows_per_second": round(rates["ours"], 1),
        "sentence_transformers_rows_per_second": round(rates["theirs"], 1),
        "times_sentence_transformers": round(rates["ours"] / rates["theirs"], 2),
        "min_cosine": float((embeddings["ours"] * embeddings["theirs"]).sum(axis=1).min()),
        "seconds": {name: [round(t, 2) for t in times] for name, times in seconds.items()},
    }


if __name__ == "__main__":
    main()
