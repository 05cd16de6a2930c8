"""A server under load beside the bare model, on the same texts and in the same run.

    python -m benchmarks.serving.serving
    python -m benchmarks.serving.serving --before ../another-checkout

The model has the embedded towers of `llm2clip demo`, SmolLM2-135M and EfficientNet-Lite0; its text
adapter and projections are random, which changes no speed. --model serves another one. Server and
bare model have a process each with the same threads, and take turns; the clients share the cores
with them. Every embedding that is served is compared with the model's own. Then the server's memory
is watched over many requests, and it meets clients that hang up, send rubbish and send one enormous
image.

With `--before`, the CPU time of requests and evaluations instead, here and in another checkout in
turns, of a model of one small layer: what they do beside the model. It is added to the same file.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.serving.serving_load import (
    connect,
    read_answer,
    send_all,
    write_request,
    write_text_requests,
)
from benchmarks.shared.checkouts import measure_in_turns
from benchmarks.shared.provenance import describe_run, read_commit, write_result
from benchmarks.shared.small_model import write_small_model

ROOT = Path(__file__).parents[2]
CLIENTS = (64, 8, 1)  # the most first, right between two runs of the bare model
# Sums in another order, over 30 layers that were not trained for it, in embeddings of unit length:
# a text alone was up to 1.5e-4 from itself in a batch. A wrong embedding is off by 0.1 and more.
MOST_DISTANCE = 3e-4
_WARM_UP = 64
_BARE = """
import json, sys, time, numpy as np
from modeling_llm2clip import encode_texts, load_model
model, processor = load_model(sys.argv[1], device="cpu")
texts = json.load(open(sys.argv[2]))
encode_texts(model, processor, texts[:64])
print("ready", flush=True)
for _ in sys.stdin:
    encode_texts(model, processor, texts[:64])  # pages that were idle are slow at first
    started = time.perf_counter()
    embeds = encode_texts(model, processor, texts)
    seconds = time.perf_counter() - started
    np.save(sys.argv[3], embeds.numpy())
    print(seconds, flush=True)
"""
_BESIDE = """
import asyncio, json, sys, time, torch
from pathlib import Path
from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.encoding.encode import TorchEncoder
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.serving.service import EmbeddingService
folder, texts = Path(sys.argv[1]), json.load(open(sys.argv[2]))
service = EmbeddingService.open(
    folder, ServeConfig(device="cpu", max_queue=len(texts))
)
processor = LLM2CLIPProcessor.from_pretrained(folder)
evaluated = TorchEncoder(folder, processor, device=torch.device("cpu"))
runs = {
    "requests": lambda: asyncio.run(ask(16)),
    "one request": lambda: asyncio.run(ask(len(texts))),
    "evaluation": lambda: evaluated.encode_texts(texts),
}
async def ask(size):
    for start in range(0, len(texts), size):
        await service.embed(texts[start : start + size])
for run in runs.values():
    run()
print("ready", flush=True)
for line in sys.stdin:
    started = time.process_time()
    runs[line.strip()]()
    print((time.process_time() - started) / len(texts) * 1e6, flush=True)
"""
_QUESTIONS = ("requests", "one request", "evaluation")


def main() -> None:
    """Measure, print, and write the result."""
    arguments = parse()
    if arguments.before is not None:
        result = json.loads(arguments.output.read_text(encoding="utf-8"))
        write(result | {"beside_the_model": measure_beside(arguments)}, arguments.output)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = arguments.model or build_model(folder / "model")
        texts = sample_texts(arguments.num_texts)
        (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        with (
            start_server(model, arguments.threads) as (address, server),
            start_bare(model, folder, arguments.threads) as bare,
        ):
            rounds = [
                measure_round(address, bare, texts, folder / "embeds.npy")
                for _ in range(arguments.rounds)
            ]
            memory = watch_memory(address, server, texts, arguments.num_requests)
            abuse = asyncio.run(meet_bad_clients(address, server, texts[0]))
    result = describe(arguments, texts, rounds, memory, abuse)
    write(result, arguments.output)


def write(result: dict[str, Any], output: Path) -> None:
    """Write the result, and print it.

    Args:
        result: As JSON holds it.
        output: File.
    """
    write_result(output, result)


def measure_beside(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the CPU time of a text beside the model, here and in another checkout in turns."""
    texts = sample_texts(arguments.num_texts)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_small_model(folder / "model", width=64)
        (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        cpu_us = measure_in_turns(
            arguments.before, _BESIDE, [str(folder / "model"), str(folder / "texts.json")],
            questions=_QUESTIONS, rounds=arguments.rounds,
        )  # fmt: skip
    return {
        "command": "python -m benchmarks.serving.serving --before … "
        + f"--num-texts {arguments.num_texts} --rounds {arguments.rounds}",
        "measured_at": time.strftime("%Y-%m-%d"),
        **describe_run(threads=1, note="beside other work"),
        "before": read_commit(arguments.before),
        "texts": f"{len(texts)}, in requests of 16 and in one",
        "cpu_us_per_text": cpu_us,
    }


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", type=Path, help="model folder; default: built of the towers")
    parser.add_argument("--before", type=Path, help="another checkout of this repository")
    parser.add_argument("--num-texts", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-requests", type=int, default=20_000, help="for the memory")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "serving.json")
    return parser.parse_args()


def build_model(folder: Path) -> Path:
    """Build a model of the embedded towers, and say that it is trained, so that it is served.

    Args:
        folder: New folder.
    """
    from modeling_llm2clip.building.build_model import join_towers
    from modeling_llm2clip.building.pretrained_towers import EFFICIENTNET, SMOLLM2, fetch_tower
    from modeling_llm2clip.configs.build_config import BuildConfig
    from modeling_llm2clip.model_folders.model_writing import save_model

    config = BuildConfig(prompt="chatml", projection_dim=512)
    model, processor = join_towers(fetch_tower(EFFICIENTNET), fetch_tower(SMOLLM2), config)
    model.config.random_heads = []
    return save_model(model, processor, folder)


def sample_texts(count: int) -> list[str]:
    """Sample captions of the example data: phrases, sentences and a few paragraphs.

    Args:
        count: Number of texts, all different.
    """
    lines = [
        json.loads(line)
        for name in ("photographs", "emoji")
        for line in (ROOT / "examples" / "data" / name / "captions.jsonl").open(encoding="utf-8")
    ]
    captions = sorted({text for line in lines for text in line["captions"]})
    return random.Random(0).sample([text for text in captions if len(text) >= 20], count)


@contextmanager
def start_server(model: Path, threads: int) -> Iterator[tuple[str, psutil.Process]]:
    """Run `llm2clip serve`; yields its URL and its process.

    Args:
        model: Model folder.
        threads: Threads of torch.
    """
    command = [sys.executable, "-m", "modeling_llm2clip", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://[\d.:]+", line)
        if address is None:
            raise SystemExit(f"The server did not start: {line!r}, exit code {process.wait()}.")
        yield address[0], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def start_bare(model: Path, folder: Path, threads: int) -> Iterator[subprocess.Popen[str]]:
    """Start the process that runs the bare model once for every line it is sent.

    Args:
        model: Model folder.
        folder: Where the texts are, and where the embeddings go.
        threads: Threads of torch.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _BARE, str(model), str(folder / "texts.json"),
         str(folder / "embeds.npy")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"The bare model did not start, exit code {process.wait()}.")
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()


def measure_round(
    address: str, bare: subprocess.Popen[str], texts: list[str], embeds_file: Path
) -> dict[str, Any]:
    """Run the bare model, the server with the most clients, the bare model again, then the others.

    Args:
        address: URL of the server.
        bare: Process of the bare model.
        texts: Texts.
        embeds_file: Where the bare model writes its embeddings.

    Raises:
        SystemExit: A served embedding differs from the model's.
    """
    requests = write_text_requests(address, texts)
    rates = [run_bare(bare, len(texts))]
    expected = np.load(embeds_file)
    measured: dict[str, Any] = {"clients": {}}
    for num_clients in CLIENTS:
        asyncio.run(send_all(address, requests[:_WARM_UP], num_clients=8))
        # One client alone is slow, and a part of the texts shows how slow.
        part = requests if num_clients > 1 else requests[: max(len(requests) // 4, 1)]
        load = asyncio.run(send_all(address, part, num_clients=num_clients))
        embeds = np.stack([load.embeds[number] for number in range(len(part))])
        distance = float(np.linalg.norm(embeds - expected[: len(part)], axis=1).max())
        if distance > MOST_DISTANCE:
            raise SystemExit(f"{num_clients} clients: an embedding is {distance:g} off.")
        row = load.summarize()
        measured["clients"][str(num_clients)] = row | {"largest_distance": distance}
        print(f"{num_clients} clients: {row}", flush=True)
        if num_clients == max(CLIENTS):  # a machine's speed drifts: before and after
            rates.append(run_bare(bare, len(texts)))
    print(f"bare: {rates}", flush=True)
    return {"bare_texts_per_second": round(statistics.fmean(rates), 2), **measured}


def run_bare(bare: subprocess.Popen[str], num_texts: int) -> float:
    """Run the bare model once; returns texts per second.

    Args:
        bare: Its process.
        num_texts: Texts that it encodes.
    """
    assert bare.stdin is not None and bare.stdout is not None
    bare.stdin.write("go\n")
    bare.stdin.flush()
    return round(num_texts / float(bare.stdout.readline()), 2)


def watch_memory(
    address: str, server: psutil.Process, texts: list[str], num_requests: int
) -> dict[str, Any]:
    """Send many requests of short texts, and read the server's memory between parts of them.

    Args:
        address: URL of the server.
        server: Its process.
        texts: Texts, of which the shortest are sent.
        num_requests: Number of requests.
    """
    requests = write_text_requests(address, sorted(texts, key=len)[:200])
    rss_mb = []
    for _ in range(11):  # the first part is the warm-up that the others are compared with
        part = (requests * (num_requests // 2000 + 1))[: num_requests // 10]
        asyncio.run(send_all(address, part, num_clients=64, keep_embeds=False))
        rss_mb.append(round(server.memory_info().rss / 1e6, 1))
        print(f"memory: {rss_mb[-1]} MB", flush=True)
    return {"num_requests": num_requests, "rss_mb": rss_mb}


async def meet_bad_clients(address: str, server: psutil.Process, text: str) -> dict[str, Any]:
    """Hang up, send rubbish, send one enormous image; then ask as a good client.

    Args:
        address: URL of the server.
        server: Its process.
        text: A text that is embedded before and after.
    """
    good = write_text_requests(address, [text])
    before = (await send_all(address, good, num_clients=1)).embeds[0]
    rss = server.memory_info().rss
    statuses: Counter[int] = Counter()
    for number in range(200):  # half of the request, or all of it and no wait for the answer
        _, writer = await connect(address)
        writer.write(good[0][: len(good[0]) // 2] if number % 2 else good[0])
        await writer.drain()
        writer.transport.abort()
    rubbish = random.Random(0)
    for _ in range(200):
        reader, writer = await connect(address)
        writer.write(write_request(address, rubbish.randbytes(rubbish.randint(1, 5000))))
        statuses[(await read_answer(reader))[0]] += 1
        writer.close()
    enormous = await send_enormous_image(address)
    await asyncio.sleep(1)
    after = (await send_all(address, good, num_clients=1)).embeds[0]
    return {
        "hang_ups": 200,
        "rubbish_statuses": {str(k): v for k, v in sorted(statuses.items())},
        "enormous_image_status": enormous,
        "rss_growth_mb": round((server.memory_info().rss - rss) / 1e6, 1),
        "embedding_is_the_same_afterwards": bool(np.linalg.norm(after - before) < MOST_DISTANCE),
    }


async def send_enormous_image(address: str) -> int:
    """Send a PNG of a few hundred kilobytes and 160 million pixels; returns the status.

    Args:
        address: URL of the server.
    """
    buffer = io.BytesIO()
    Image.new("L", (16_000, 10_000)).save(buffer, "PNG")
    image = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    reader, writer = await connect(address)
    writer.write(write_request(address, {"input": [{"image": image}]}))
    status, _ = await read_answer(reader)
    writer.close()
    return status


def describe(
    arguments: argparse.Namespace,
    texts: list[str],
    rounds: list[dict[str, Any]],
    memory: dict[str, Any],
    abuse: dict[str, Any],
) -> dict[str, Any]:
    """Take medians over the rounds; ratios are of figures of one round."""
    ratios = [
        row["clients"]["64"]["texts_per_second"] / row["bare_texts_per_second"] for row in rounds
    ]
    medians = {
        clients: {
            name: statistics.median(row["clients"][clients][name] for row in rounds)
            for name in ("texts_per_second", "p50_ms", "p95_ms", "p99_ms")
        }
        for clients in map(str, sorted(CLIENTS))
    }
    return {
        "command": "python -m benchmarks.serving.serving "
        + f"--num-texts {arguments.num_texts} --rounds {arguments.rounds} "
        + f"--num-requests {arguments.num_requests} --threads {arguments.threads}",
        "measured_at": time.strftime("%Y-%m-%d"),
        **describe_run("torch", "transformers", "fastapi", "uvicorn", threads=arguments.threads),
        "texts": f"{len(texts)} captions of the example data, of a median of "
        + f"{statistics.median(map(len, texts)):g} characters",
        "bare_texts_per_second": statistics.median(r["bare_texts_per_second"] for r in rounds),
        "throughput_ratio_64": round(statistics.median(ratios), 3),
        "p99_ms": medians["64"]["p99_ms"],
        "rss_growth_mb": round(memory["rss_mb"][-1] - memory["rss_mb"][0], 1),
        "by_clients": medians,
        "rounds": rounds,
        "memory": memory,
        "bad_clients": abuse,
    }


if __name__ == "__main__":
    main()
