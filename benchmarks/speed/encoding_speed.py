"""Captions per second of this package, sentence-transformers and LLM2Vec, paired in one run.

    python -m benchmarks.speed.encoding_speed --captions coco.jsonl iiw.jsonl \
        --llm2vec-python /path/to/another/venv/bin/python

Every encoder has a process of its own, with the same weights, and they take turns, so that a
machine whose speed drifts is fair to all. Between two turns the fp32 matrix product peak of the
machine is measured. The caption files are yours: one JSON object a line, with `captions`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from benchmarks.shared.provenance import describe_run, write_result
from benchmarks.speed.encoding_worker import BUILDERS
from modeling_llm2clip.building.pretrained_towers import SMOLLM2, fetch_tower

_WORKER = "benchmarks.speed.encoding_worker"


def main() -> None:
    """Measure, print, and write the result."""
    arguments = _parse()
    llm = Path(arguments.llm or fetch_tower(SMOLLM2))
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        captions = sample_captions(arguments.captions, arguments.count)
        (Path(temporary) / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
        names = [n for n in BUILDERS if n != "LLM2Vec" or arguments.llm2vec_python]
        workers = {n: _start(n, llm, Path(temporary), arguments) for n in names}
        turns, peaks = _take_turns(workers, arguments.rounds)
        flops = _count_flops(llm, captions)
        embeddings = {n: np.load(_embeddings_file(Path(temporary), n)) for n in names}
        rows = [_summarize(n, turns[n], flops, captions, embeddings) for n in names]
        for process in workers.values():
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()
    result = _describe(arguments, captions, peaks, rows)
    write_result(arguments.output, result)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--captions", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llm", help="folder of a Llama; default: the embedded SmolLM2")
    parser.add_argument("--llm2vec-python", help="python of an environment with llm2vec")
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "encoding_speed.json")
    return parser.parse_args()


def sample_captions(files: list[Path], count: int) -> list[str]:
    """Take captions from the files in turn by their size: the mix of lengths is theirs."""
    pool = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            pool.append(json.loads(line)["captions"][0])
    if len(pool) < count:
        raise SystemExit(f"The files hold {len(pool)} captions, --count asks for {count}.")
    return random.Random(0).sample(pool, count)


def _start(
    name: str, llm: Path, temporary: Path, arguments: argparse.Namespace
) -> subprocess.Popen[str]:
    python, folder = sys.executable, llm
    if name == "LLM2Vec":
        python, folder = arguments.llm2vec_python, rewrite_for_old_readers(llm, temporary)
    process = subprocess.Popen(
        [python, "-m", _WORKER, name, str(folder), str(temporary / "captions.json"),
         str(_embeddings_file(temporary, name)), str(arguments.threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = iter(process.stdout.readline, "")  # type: ignore[union-attr]
    if not any(line.strip() == "ready" for line in lines):
        raise SystemExit(f"{name} could not start, exit code {process.wait()}.")
    print(f"{name}: ready", flush=True)
    return process


def rewrite_for_old_readers(llm: Path, temporary: Path) -> Path:
    """Write configuration and tokenizer as transformers 4.44 reads them; the weights are linked."""
    folder = temporary / "old_llm"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to((llm / "model.safetensors").resolve())
    config = json.loads((llm / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype", "float32")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((llm / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((llm / "tokenizer_config.json").read_text())
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _embeddings_file(temporary: Path, name: str) -> Path:
    return temporary / f"{name.replace(' ', '_')}.npy"


def _take_turns(
    workers: dict[str, subprocess.Popen[str]], rounds: int
) -> tuple[dict[str, list[dict[str, Any]]], list[float]]:
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    peaks = []
    for number in range(rounds):
        for name, process in workers.items():
            before = _measure_peak()
            process.stdin.write("go\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            figures = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            after = _measure_peak()
            figures["peak"] = (before + after) / 2
            peaks += [before, after]
            turns[name].append(figures)
            print(f"round {number}, {name}: {figures}", flush=True)
    return turns, peaks


def _measure_peak() -> float:
    """Median GFLOP/s of a square fp32 product, over seconds: the first ones may run in a burst."""
    matrix, product = torch.randn(2048, 2048), torch.empty(2048, 2048)
    speeds = []
    for _ in range(40):
        started = time.perf_counter()
        torch.mm(matrix, matrix, out=product)
        speeds.append(2 * 2048**3 / (time.perf_counter() - started) / 1e9)
    return statistics.median(speeds)


def _count_flops(llm: Path, captions: list[str]) -> float:
    """Two per weight of the linear layers and token, and the two products of attention."""
    config = AutoConfig.from_pretrained(llm)
    width, inner = config.hidden_size, config.intermediate_size
    heads, head = config.num_attention_heads, width // config.num_attention_heads
    keys = config.num_key_value_heads * head
    weights = config.num_hidden_layers * (2 * width**2 + 2 * width * keys + 3 * width * inner)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    lengths = [len(i) for i in tokenizer(captions, truncation=True, max_length=512)["input_ids"]]
    attention = 4 * heads * head * config.num_hidden_layers
    return sum(2.0 * weights * length + attention * length**2 for length in lengths)


def _summarize(
    name: str,
    turns: list[dict[str, Any]],
    flops: float,
    captions: list[str],
    embeddings: dict[str, Any],
) -> dict[str, Any]:
    seconds = statistics.median(t["seconds"] for t in turns)
    row = {
        "name": name,
        "captions_per_second": round(len(captions) / seconds, 2),
        "seconds": [round(t["seconds"], 2) for t in turns],
        "cpu_seconds": [round(t["cpu_seconds"], 2) for t in turns],
        "share_of_peak": round(
            statistics.median(flops / t["seconds"] / 1e9 / t["peak"] for t in turns), 3
        ),
        "peak_rss_gb": max(t["peak_rss_gb"] for t in turns),
    }
    reference = embeddings.get("LLM2Vec", embeddings["sentence-transformers, same ids"])
    if embeddings[name].shape == reference.shape and "through" not in name:
        cosines = _cosines(embeddings[name], reference)
        row["min_cosine"] = round(float(cosines.min()), 6)
    return row


def _cosines(left: Any, right: Any) -> Any:
    left, right = left.astype(np.float64), right.astype(np.float64)
    return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def _describe(
    arguments: argparse.Namespace, captions: list[str], peaks: list[float], rows: list[Any]
) -> dict[str, Any]:
    return {
        "command": "python -m benchmarks.speed.encoding_speed "
        + f"--count {arguments.count} --rounds {arguments.rounds} --threads {arguments.threads}",
        "captions": f"{len(captions)} from {[f.parent.name or f.name for f in arguments.captions]}",
        **describe_run("torch", "transformers", "sentence-transformers", threads=arguments.threads),
        "fp32_peak_gflops": round(statistics.median(peaks), 1),
        "min_cosine_against": "LLM2Vec"
        if arguments.llm2vec_python
        else "sentence-transformers, same ids",
        "rows": rows,
    }


if __name__ == "__main__":
    main()
