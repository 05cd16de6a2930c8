"""Whole commands, and what users do often in Python, by this checkout and one from before.

    python -m benchmarks.speed.command_pairs --before ../another-checkout

Both run on the embedded towers and the same emoji, in turns, every time in a process of its own and
in an empty folder. Each checkout prepares the model, stores and index that its tasks read. Reported
are the medians of seconds, CPU seconds and peak memory, and the median ratio of the CPU seconds of
a round, which other work on the machine changes least.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.shared.provenance import describe_run, read_commit, run_process, write_result

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "examples" / "data" / "emoji"
NUM_IMAGES, NUM_RECORDS = 300, 100_000

LOAD_TABLE = """
from modeling_llm2clip import load_records
load_records("{texts}", modality="text", cache=False)
"""
READ_STORE = """
import numpy as np
from modeling_llm2clip import EmbeddingStore
store = EmbeddingStore.open("{captions}")
rows = np.random.default_rng(0).integers(0, 100, (1000, 64))
for of_batch in rows: store.read(of_batch)
"""
TASKS: dict[str, list[str]] = {
    "record table of 100,000 texts": ["-c", LOAD_TABLE],
    "64,000 random reads of a store": ["-c", READ_STORE],
    "extract 900 captions": ["extract", "{model}", "{data}", "out", "--modality", "text"],
    "extract 300 images": ["extract", "{model}", "{data}", "out", "--modality", "image"],
    "align": [
        "align", "{model}", "{data}", "out", "--caption-store", "{captions}",
        "--image-store", "{images}", "--max-steps", "30",
    ],
    "embed 300 images": ["embed", "{aligned}", "{data}", "out", "--modality", "image"],
    "embed 900 captions": ["embed", "{aligned}", "{data}", "out", "--modality", "text"],
    "index 300 images": ["index", "{aligned}", "{data}/images", "out"],
    "search": ["search", "{index}", "a red heart"],
}  # fmt: skip


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--before", type=Path, required=True, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="", help="what else runs on the machine")
    output = Path(__file__).parents[1] / "results" / "command_pairs.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkouts = {"before": arguments.before.resolve(), "after": ROOT}
        places = {name: prepare(Path(scratch) / name, root) for name, root in checkouts.items()}
        figures = {
            name: measure(task, checkouts, places, arguments.rounds) for name, task in TASKS.items()
        }
    frame = describe_run("torch", "transformers", "lancedb", note=arguments.note)
    before = read_commit(arguments.before)
    write_result(
        arguments.output, frame | {"before": before, "rounds": arguments.rounds, "tasks": figures}
    )


def prepare(folder: Path, checkout: Path) -> dict[str, str]:
    """Write the data, and by the checkout the folders that the tasks read."""
    names = ("data", "texts.jsonl", "model", "captions", "images", "aligned", "index")
    places = {name.partition(".")[0]: str(folder / name) for name in names}
    folder.mkdir()
    write_data(Path(places["data"]), Path(places["texts"]))
    run(checkout, ["build", "embedded", "embedded", places["model"]], folder)
    for task, output in (
        ("extract 900 captions", "captions"),
        ("extract 300 images", "images"),
        ("align", "aligned"),
        ("index 300 images", "index"),
    ):
        words = [places[output] if word == "out" else word for word in TASKS[task]]
        run(checkout, [word.format(**places) for word in words], folder)
        if output == "aligned":
            places["aligned"] += "/model"
    return places


def write_data(folder: Path, texts: Path) -> None:
    """Write images with captions in three languages, and many texts."""
    lines = [json.loads(line) for line in (EMOJI / "captions.jsonl").open(encoding="utf-8")]
    images = sorted({line["image"] for line in lines})
    chosen = set(random.Random(0).sample(images, NUM_IMAGES))
    kept = [
        line for line in lines if line["image"] in chosen and line["lang"] in {"en", "de", "ja"}
    ]
    for image in chosen:
        copy = folder / image
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((EMOJI / image).read_bytes())
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, kept)), encoding="utf-8")
    many = (
        json.dumps({"id": f"{number}", "captions": [f"caption {number} of a large dataset"]})
        for number in range(NUM_RECORDS)
    )
    texts.write_text("\n".join(many), encoding="utf-8")


def measure(
    task: list[str], checkouts: dict[str, Path], places: dict[str, dict[str, str]], rounds: int
) -> dict[str, Any]:
    """Run a task in turns."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for number in range(rounds):
        for name in sorted(checkouts, reverse=number % 2 == 0):
            words = [word.format(**places[name]) for word in task]
            with tempfile.TemporaryDirectory() as scratch:
                runs[name].append(run(checkouts[name], words, Path(scratch)))
    medians = {
        name: {
            key: round(statistics.median(usage[key] for usage in usages), 2) for key in usages[0]
        }
        for name, usages in runs.items()
    }
    pairs = zip(runs["after"], runs["before"], strict=True)
    share = statistics.median(after["cpu_s"] / before["cpu_s"] for after, before in pairs)
    print(f"{task[:2]} {share:.3f}", file=sys.stderr)
    return {**medians, "cpu_share": round(share, 3)}


def run(checkout: Path, words: list[str], folder: Path) -> dict[str, float]:
    """Run one task, and return seconds, CPU seconds and peak memory."""
    command = words if words[0] == "-c" else ["-m", "modeling_llm2clip", *words]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    with (folder / "log").open("w+") as log:
        usage = run_process(
            [sys.executable, *command], cwd=folder, env=environment, stdout=log, stderr=log
        )
        if usage.exit_code:
            log.seek(0)
            raise SystemExit(f"{checkout}: {words} failed:\n{log.read()}")
    return {
        "seconds": usage.seconds,
        "cpu_s": usage.cpu_seconds,
        "peak_mb": usage.peak_bytes / 2**20,
    }


if __name__ == "__main__":
    main()
