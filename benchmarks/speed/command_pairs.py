"""Whole commands, and what users do often in Python, by this checkout and one from before.

    python -m benchmarks.speed.command_pairs --before ../another-checkout [--data my-images]

Both run on the small embedded towers, whose vision tower `--vision` names as each checkout does,
and on the same captioned images, in turns, every time in a process of its own and in an empty
folder. Each checkout prepares the model, stores and index that its tasks read. The images are 300
emoji with captions in three languages, or those of `--data`. Reported are the medians of seconds,
CPU seconds and peak memory, and the median ratio of the CPU seconds of a round, which other work on
the machine changes least. "README's recipe" is the sum of its four commands.
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
RECIPE = ("build", "extract captions", "extract images", "align")
TASKS: dict[str, list[str]] = {
    "build": ["build", "{vision}", "embedded", "out"],
    "record table of 100,000 texts": ["-c", LOAD_TABLE],
    "64,000 random reads of a store": ["-c", READ_STORE],
    "extract captions": ["extract", "{model}", "{data}", "out", "--modality", "text"],
    "extract images": ["extract", "{model}", "{data}", "out", "--modality", "image"],
    "align": [
        "align", "{model}", "{data}", "out", "--caption-store", "{captions}",
        "--image-store", "{images}",
    ],
    "embed images": ["embed", "{aligned}", "{data}", "out", "--modality", "image"],
    "embed captions": ["embed", "{aligned}", "{data}", "out", "--modality", "text"],
    "index images": ["index", "{aligned}", "{data}/images", "out"],
    "search": ["search", "{index}", "a red heart"],
    "evaluate": [
        "evaluate", "ours={aligned}", "--datasets", "own={data}", "--output", "out",
    ],
}  # fmt: skip


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--before", type=Path, required=True, help="another checkout")
    parser.add_argument("--data", type=Path, help="captioned images; default: 300 emoji")
    parser.add_argument(
        "--vision", nargs=2, default=["embedded-small"] * 2, metavar=("BEFORE", "AFTER")
    )
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS, metavar="TASK")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="", help="what else runs on the machine")
    output = Path(__file__).parents[1] / "results" / "command_pairs.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    if arguments.data is None:
        TASKS["evaluate"] += ["--languages", "en"]  # retrieval takes one language at a time
    with tempfile.TemporaryDirectory() as scratch:
        checkouts = {"before": arguments.before.resolve(), "after": ROOT}
        places = {
            name: prepare(Path(scratch) / name, root, arguments.data, vision)
            for (name, root), vision in zip(checkouts.items(), arguments.vision, strict=True)
        }
        counts = count_data(Path(places["after"]["data"]))
        runs = {
            name: measure(TASKS[name], checkouts, places, arguments.rounds)
            for name in arguments.tasks
        }
    if set(RECIPE) <= set(runs):
        runs["README's recipe"] = {
            name: [add_up([runs[task][name][number] for task in RECIPE])
                   for number in range(arguments.rounds)]
            for name in checkouts
        }  # fmt: skip
    figures = {name: summarize(rounds) for name, rounds in runs.items()}
    frame = describe_run("torch", "transformers", "lancedb", note=arguments.note)
    before = read_commit(arguments.before)
    write_result(
        arguments.output,
        frame | counts | {"before": before, "rounds": arguments.rounds, "tasks": figures},
    )


def prepare(
    folder: Path, checkout: Path, data: Path | None, vision: str = "embedded-small"
) -> dict[str, str]:
    """Write the texts and images, and by the checkout the folders that the tasks read."""
    names = ("data", "texts.jsonl", "model", "captions", "images", "aligned", "index")
    places = {name.partition(".")[0]: str(folder / name) for name in names} | {"vision": vision}
    folder.mkdir()
    write_texts(Path(places["texts"]))
    if data is None:
        write_images(Path(places["data"]))
    else:
        places["data"] = str(data.resolve())
    for task, output in (
        ("build", "model"),
        ("extract captions", "captions"),
        ("extract images", "images"),
        ("align", "aligned"),
        ("index images", "index"),
    ):
        words = [places[output] if word == "out" else word for word in TASKS[task]]
        run(checkout, [word.format(**places) for word in words], folder)
        if output == "aligned":
            places["aligned"] += "/model"
    return places


def count_data(folder: Path) -> dict[str, int]:
    """Return how many images and captions a folder has."""
    lines = [json.loads(line) for line in (folder / "captions.jsonl").open(encoding="utf-8")]
    images = {line["image"] for line in lines}
    return {"images": len(images), "captions": sum(len(line["captions"]) for line in lines)}


def write_images(folder: Path, count: int = NUM_IMAGES) -> None:
    """Write images with captions in three languages."""
    lines = [json.loads(line) for line in (EMOJI / "captions.jsonl").open(encoding="utf-8")]
    images = sorted({line["image"] for line in lines})
    chosen = set(random.Random(0).sample(images, count))
    kept = [
        line for line in lines if line["image"] in chosen and line["lang"] in {"en", "de", "ja"}
    ]
    for image in chosen:
        copy = folder / image
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((EMOJI / image).read_bytes())
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, kept)), encoding="utf-8")


def write_texts(file: Path) -> None:
    """Write many texts."""
    many = (
        json.dumps({"id": f"{number}", "captions": [f"caption {number} of a large dataset"]})
        for number in range(NUM_RECORDS)
    )
    file.write_text("\n".join(many), encoding="utf-8")


def measure(
    task: list[str], checkouts: dict[str, Path], places: dict[str, dict[str, str]], rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Run a task in turns, and return the usages of each checkout."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for number in range(rounds):
        for name in sorted(checkouts, reverse=number % 2 == 0):
            words = [word.format(**places[name]) for word in task]
            with tempfile.TemporaryDirectory() as scratch:
                runs[name].append(run(checkouts[name], words, Path(scratch)))
    print(f"{task[:2]} {summarize(runs)}", file=sys.stderr)
    return runs


def add_up(usages: list[dict[str, float]]) -> dict[str, float]:
    """Add the times of tasks that run one after the other; the peak is the highest."""
    return {
        key: (max if key == "peak_mb" else sum)(usage[key] for usage in usages) for key in usages[0]
    }


def summarize(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return the medians of both checkouts, and the median shares of their rounds."""
    medians = {
        name: {
            key: round(statistics.median(usage[key] for usage in usages), 2) for key in usages[0]
        }
        for name, usages in runs.items()
    }
    pairs = list(zip(runs["after"], runs["before"], strict=True))
    shares = {
        f"{key}_share": round(
            statistics.median(after[of] / before[of] for after, before in pairs), 3
        )
        for key, of in (("cpu", "cpu_s"), ("seconds", "seconds"))
    }
    return {**medians, **shares}


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
