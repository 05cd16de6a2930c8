"""Search in many images, across the gap between texts and images, beside exact search and FAISS.

    python -m benchmarks.search.search                                      # a million embeddings
    python -m benchmarks.search.search --photographs FOLDER --model MODEL  # and your photographs

1. Makes embeddings as a model of two towers gives them: images lie around one direction, texts
   around another; what they show is the same, in directions of falling variance and in topics of
   unequal size. The cosines of pairs, of texts with other images, and among images are recorded.
2. Builds the index that `llm2clip index` builds, where half of the texts choose how many partitions
   a query visits, and FAISS's on the same rows. The remaining texts measure both, and exact search,
   each in a process of its own that does nothing else: milliseconds per query, recall@10 against
   exact search, and the memory of the process.
3. With --photographs: seconds to decode a folder, to index it, and to search it twice from the
   shell, and where a search spends them.

Everything runs on two cores, whatever the machine has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from benchmarks.shared.provenance import describe_processor, read_commit, write_result
from modeling_llm2clip.search.ann_index import train_ann
from modeling_llm2clip.search.index_about import About
from modeling_llm2clip.search.index_database import IndexDatabase

Array: TypeAlias = np.ndarray[Any, Any]
Search: TypeAlias = Callable[[Array], list[int]]
RESULT = Path(__file__).parents[1] / "results" / "search.json"
CORES = 2
TOP_K = 10
WRITTEN_AT_ONCE = 20_000
FAISS_KIND, FAISS_NPROBE = "IVF1024,SQfp16", 128
# Share of the squared length of an embedding that all images, or all texts, have in common.
COMMON = 0.45
# Cosine of the two common directions; cosine of the contents of a text and its image.
OF_MEANS, OF_PAIRS = 0.25, 0.35
TOPICS, OF_TOPIC = 5000, 0.5
# As many threads as cores decode every image once, and nothing else.
DECODE = """
import sys
from pathlib import Path
from modeling_llm2clip.data.images.image_sources import find_unreadable_images
find_unreadable_images(sorted(p for p in Path(sys.argv[1]).rglob("*") if p.suffix == ".jpg"))
"""
START = """
import sys
from modeling_llm2clip.model_folders.model_loading import load_model
load_model(sys.argv[1])
"""
IMPORTS = ("lancedb", "torch", "transformers", "modeling_llm2clip.search.image_index")


def main() -> int:
    """Measure, write the results, and say which bars are missed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--queries", type=int, default=400, help="half of them only tune")
    parser.add_argument("--photographs", type=Path, help="folder of your own photographs")
    parser.add_argument("--model", help="model that indexes the photographs")
    parser.add_argument("--graphs", help="its ONNX graphs, for a search without torch")
    parser.add_argument("--work", type=Path, help="folder for the database; default: a new one")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    use_two_cores()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        measured = run(
            arguments.rows, arguments.width, arguments.queries, arguments.work or Path(scratch)
        )
    if arguments.photographs:
        measured["photographs"] = run_photographs(
            arguments.model, arguments.photographs, arguments.graphs
        )
    write_result(arguments.output, measured)
    return report_bars(measured)


def use_two_cores() -> None:
    """Bind this process and its children to two cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    os.environ["OMP_NUM_THREADS"] = str(CORES)


def run(rows: int, width: int, queries: int, work: Path) -> dict[str, Any]:
    """Build and measure everything on made embeddings."""
    images, texts, cosines = make_embeddings(rows, width, queries)
    tuning, measured = texts[: queries // 2], texts[queries // 2 :]
    database = fill(work / "index", images)
    np.save(work / "texts.npy", measured)
    np.save(work / "nearest.npy", find_nearest(measured, images))
    faiss_build_s = build_faiss(images, work / "faiss.index")
    del images
    ann = train_ann(database, tuning, always=True, report=print)
    database.write_about(replace(database.about, ann=ann))
    index, exact, faiss = (measure_apart(name, work) for name in ("index", "exact", "faiss"))
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": read_commit(),
        "processor": describe_processor(),
        "cores": CORES,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("lancedb", "faiss-cpu", "numpy", "pyarrow")},
        },
        "rows": rows,
        "width": width,
        "queries": len(measured),
        "cosines": cosines,
        "ann": asdict(ann),
        "build_s": ann.build_s,
        "query_ms": index["query_ms"],
        "recall_at_10": index["recall_at_10"],
        "rss_gb": index["rss_gb"],
        "exact_query_ms": exact["query_ms"],
        "faiss": f"{FAISS_KIND}, {FAISS_NPROBE} visited",
        "faiss_build_s": round(faiss_build_s, 1),
        "faiss_query_ms": faiss["query_ms"],
        "faiss_recall_at_10": faiss["recall_at_10"],
        "faiss_rss_gb": faiss["rss_gb"],
    }


def make_embeddings(rows: int, width: int, queries: int) -> tuple[Array, Array, dict[str, float]]:
    """Make embeddings of images, of texts that each describe one of them, and their cosines.

    Returns:
        (rows, width) and (queries, width) float32 of unit length, and mean cosines.
    """
    random = np.random.default_rng(0)
    scales = (np.arange(1, width + 1) ** -0.5).astype(np.float32)
    of_images, of_texts = make_means(random, width)
    topics = unit(random.standard_normal((TOPICS, width), dtype=np.float32) * scales)
    shares = 1 / np.arange(1, TOPICS + 1)
    images = np.empty((rows, width), dtype=np.float32)
    described = np.sort(random.choice(rows, queries, replace=False))
    shown = np.empty((queries, width), dtype=np.float32)
    for start in range(0, rows, WRITTEN_AT_ONCE):
        end = min(start + WRITTEN_AT_ONCE, rows)
        individual = unit(random.standard_normal((end - start, width), dtype=np.float32) * scales)
        topic = topics[random.choice(TOPICS, end - start, p=shares / shares.sum())]
        content = unit(OF_TOPIC**0.5 * topic + (1 - OF_TOPIC) ** 0.5 * individual)
        here = (described >= start) & (described < end)
        shown[here] = content[described[here] - start]
        images[start:end] = unit(COMMON**0.5 * of_images + (1 - COMMON) ** 0.5 * content)
    other = unit(random.standard_normal((queries, width), dtype=np.float32) * scales)
    said = unit(OF_PAIRS * shown + (1 - OF_PAIRS**2) ** 0.5 * other)
    texts = unit(COMMON**0.5 * of_texts + (1 - COMMON) ** 0.5 * said)
    some = images[:: max(1, rows // 1000)]
    cosines = {
        "text_with_its_image": float((texts * images[described]).sum(axis=1).mean()),
        "text_with_any_image": float((texts @ some.T).mean()),
        "image_with_any_image": float((some @ some.T).mean()),
        "nearest_image_of_a_text": float((texts @ images.T).max(axis=1).mean()),
    }
    order = random.permutation(queries)  # so that both parts are of images from everywhere
    return images, texts[order], {name: round(value, 3) for name, value in cosines.items()}


def make_means(random: np.random.Generator, width: int) -> tuple[Array, Array]:
    """Make the directions around which images and texts lie."""
    first, second = unit(random.standard_normal((2, width), dtype=np.float32))
    second = unit((second - (first @ second) * first)[None])[0]
    return first, OF_MEANS * first + (1 - OF_MEANS**2) ** 0.5 * second


def find_nearest(texts: Array, images: Array) -> Array:
    """Find the rows of the images of the greatest cosine by comparing with all, (texts, k)."""
    best = np.empty((len(texts), 0), dtype=np.float32)
    rows = np.empty((len(texts), 0), dtype=np.int64)
    for start in range(0, len(images), WRITTEN_AT_ONCE):
        part = texts @ images[start : start + WRITTEN_AT_ONCE].T
        best = np.concatenate([best, part], axis=1)
        here = np.arange(start, start + part.shape[1])
        rows = np.concatenate([rows, np.broadcast_to(here, part.shape)], axis=1)
        places = np.argpartition(-best, TOP_K - 1, axis=1)[:, :TOP_K]
        best = np.take_along_axis(best, places, axis=1)
        rows = np.take_along_axis(rows, places, axis=1)
    return rows


def unit(rows: Array) -> Array:
    """Bring rows to unit length."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def fill(folder: Path, images: Array) -> IndexDatabase:
    """Write the embeddings as `llm2clip index` would, with made paths."""
    about = About(model="made", fingerprint={}, model_files="", image_dir=str(folder),
                  width=images.shape[1])  # fmt: skip
    database = IndexDatabase(folder, lambda: about)
    # Facts differ from image to image, as those of photographs do: LanceDB packs equal ones so
    # tightly that reading ten of them takes longer.
    random = np.random.default_rng(1)
    sides = np.array([4032, 3024, 4000, 3000, 1920, 1080])
    for start in range(0, len(images), WRITTEN_AT_ONCE):
        part = images[start : start + WRITTEN_AT_ONCE]
        names = [f"{start + row:08d}.jpg" for row in range(len(part))]
        times = [
            datetime.fromtimestamp(second, timezone.utc)
            for second in random.integers(1_500_000_000, 1_700_000_000, len(part)).tolist()
        ]
        facts: dict[str, list[Any]] = {
            "path": names,
            "sha256": [random.bytes(32).hex() for _ in names],
            "bytes": random.integers(10**5, 10**7, len(part)).tolist(),
            "modified": times,
            "width": random.choice(sides, len(part)).tolist(),
            "height": random.choice(sides, len(part)).tolist(),
            "taken": [time.replace(tzinfo=None) for time in times],
            "stat": [str(time.timestamp()) for time in times],
        }
        database.write(facts, part)
    database.optimize()
    return database


def build_faiss(images: Array, file: Path) -> float:
    """Build the peer's index and write it; return the seconds that building takes."""
    import faiss

    faiss.omp_set_num_threads(CORES)
    started = time.monotonic()
    partitions = int(FAISS_KIND.removeprefix("IVF").partition(",")[0])
    kind = FAISS_KIND if len(images) >= 40 * partitions else "IVF64,SQfp16"
    index = faiss.index_factory(images.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.train(images[:: max(1, len(images) // (64 * index.nlist))])
    index.add(images)
    seconds = time.monotonic() - started
    faiss.write_index(index, str(file))
    return seconds


def measure_apart(name: str, work: Path) -> dict[str, float]:
    """Measure in a process of its own, whose memory nothing else uses."""
    command = [sys.executable, "-m", "benchmarks.search.search", "--measure", name, str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(name, done.stdout.strip(), flush=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(name: str, work: Path) -> dict[str, float]:
    """Search with every text twice, of which the second time counts: everything is warm then."""
    texts, nearest = np.load(work / "texts.npy"), np.load(work / "nearest.npy")
    search = open_faiss(work / "faiss.index") if name == "faiss" else open_index(name, work)
    if name == "exact":
        texts, nearest = texts[:10], nearest[:10]
    for text in texts:
        search(text)
    seconds, shares = [], []
    for text, expected in zip(texts, nearest, strict=True):
        started = time.perf_counter()
        rows = search(text)
        seconds.append(time.perf_counter() - started)
        shares.append(len(set(rows) & set(expected.tolist())) / len(expected))
    return {
        "query_ms": round(1000 * statistics.median(seconds), 2),
        "recall_at_10": round(statistics.fmean(shares), 4),
        "rss_gb": round(read_peak_memory() / 1e9, 2),
    }


def read_peak_memory() -> int:
    """Return the most bytes that this program had; `getrusage` also counts its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def open_index(name: str, work: Path) -> Search:
    """Open the database, whose paths are the numbers of the rows."""
    database = IndexDatabase(work / "index")
    ann = database.about.ann if name == "index" else None
    return lambda text: [
        int(row["path"].removesuffix(".jpg")) for row in database.search(text, top_k=TOP_K, ann=ann)
    ]


def open_faiss(file: Path) -> Search:
    """Open the peer's index."""
    import faiss

    faiss.omp_set_num_threads(CORES)
    index = faiss.read_index(str(file))
    index.nprobe = FAISS_NPROBE
    return lambda text: index.search(text[None], TOP_K)[1][0].tolist()


def run_photographs(model: str, folder: Path, graphs: str | None) -> dict[str, Any]:
    """Measure a folder of photographs: decoded, indexed, and searched from the shell."""
    command = [sys.executable, "-m", "modeling_llm2clip"]
    with tempfile.TemporaryDirectory() as scratch:
        index = f"{scratch}/index"
        decode_s = time_command([sys.executable, "-c", DECODE, str(folder)])
        start_s = time_command([sys.executable, "-c", START, model])
        index_s = time_command([*command, "index", model, str(folder), index])
        again_s = time_command([*command, "index", model, str(folder), index])
        search = [*command, "search", index, "a dog on a beach"]
        searches = [time_command(search) for _ in range(3)]
        with_graphs = [time_command([*search, "--model", graphs]) for _ in range(3) if graphs]
    imports = {name: time_command([sys.executable, "-c", f"import {name}"]) for name in IMPORTS}
    return {
        "images": sum(path.is_file() for path in folder.rglob("*.jpg")),
        "decode_s": decode_s,
        "model_start_s": start_s,
        "index_s": index_s,
        "index_unchanged_s": again_s,
        "first_result_s": round(index_s + searches[0], 2),
        "second_search_s": statistics.median(searches[1:]),
        **({"second_search_graphs_s": statistics.median(with_graphs[1:])} if graphs else {}),
        "import_s": imports,
    }


def time_command(command: list[str]) -> float:
    """Run a command and return its seconds."""
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr[-2000:]}")
    return round(time.monotonic() - started, 2)


def report_bars(measured: dict[str, Any]) -> int:
    """Print which bars are missed; return 1 if any is."""
    photographs = measured.get("photographs")
    bars = {
        "query_ms below 30": measured["query_ms"] < 30,
        "recall_at_10 at least 0.95": measured["recall_at_10"] >= 0.95,
        "rss_gb below 2": measured["rss_gb"] < 2,
        "second search below 5 s": not photographs or photographs["second_search_s"] < 5,
        "second search with graphs below 5 s": not photographs
        or photographs.get("second_search_graphs_s", 0) < 5,
        "first result within decoding and start": not photographs
        or photographs["first_result_s"] <= photographs["decode_s"] + photographs["model_start_s"],
    }
    missed = [name for name, is_met in bars.items() if not is_met]
    if missed:
        print(f"Missed: {missed}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
