"""Speed, size, cosine and recall of ONNX graphs and of torch, paired in one run.

    python -m benchmarks.speed.onnx_speed llm2clip-demo/model --captions coco.jsonl

The model is exported with float32, int8 and int4 weights, whatever recall int4 costs. Every engine
has a process of its own with the same captions, and they take turns. The caption files are yours:
one JSON object a line, with `captions`. (A script `onnx.py` would hide the package of that name.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shared.provenance import describe_run, write_result
from benchmarks.speed.encoding_speed import sample_captions

ENGINES = ("torch", "float32", "int8", "int4")
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def main() -> None:
    """Measure, print, and write the result."""
    if sys.argv[1:2] == ["--engine"]:
        serve(*sys.argv[2:])
        return
    arguments = _parse()
    recall_on = arguments.data or "emoji that the demo holds out"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        captions = sample_captions(arguments.captions, arguments.count)
        arguments.data = arguments.data or str(_write_held_out(folder / "held_out"))
        texts = {"timed": captions, "recall": _list_recall_captions(arguments.data)}
        (folder / "captions.json").write_text(json.dumps(texts), encoding="utf-8")
        record = _export(arguments, folder / "onnx")
        sources = {
            name: arguments.model if name == "torch" else folder / "onnx" for name in ENGINES
        }
        workers = {
            name: _start(name, source, folder, arguments.threads)
            for name, source in sources.items()
        }
        seconds = _take_turns(workers, arguments.rounds)
        embeddings = {name: np.load(_embeddings_file(folder, name)) for name in ENGINES}
        sizes = _measure_mb(arguments.model, record)
        recalls = _measure_recalls(
            arguments, {name: rows[len(captions) :] for name, rows in embeddings.items()}
        )
    rows = [
        {
            "name": name,
            **_summarize(name, seconds, embeddings, len(captions)),
            "recall_at_1": recalls[name],
            "size_mb": sizes[name],
        }
        for name in ENGINES
    ]
    result = {
        "command": f"python -m benchmarks.speed.onnx_speed MODEL --count {arguments.count} "
        f"--rounds {arguments.rounds} --threads {arguments.threads}",
        "captions": f"{len(captions)} from {[f.parent.name or f.name for f in arguments.captions]}",
        **describe_run(*_PACKAGES, threads=arguments.threads),
        "opset": record["opset"],
        "ir_version": record["ir_version"],
        "recall_on": recall_on,
        "rows": rows,
    }
    write_result(arguments.output, result)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", type=Path, help="folder of a whole model, such as the demo's")
    parser.add_argument("--captions", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", help="captioned images for recall; default: the demo's held-out")
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "onnx.json")
    return parser.parse_args()


def _write_held_out(folder: Path) -> Path:
    """Write the emoji that the demo's model was not trained on, as a source of records."""
    from modeling_llm2clip.demo.run_demo import split_emoji
    from modeling_llm2clip.evaluation.datasets.caption_readers import EMOJI_SEED

    folder.mkdir()
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as file:
        for record in split_emoji(EMOJI_SEED)[1]:
            line = {"image": str(record.path.resolve()), "captions": record.captions}
            file.write(json.dumps({**line, "group_id": record.group_id}) + "\n")
    return folder


def _export(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from modeling_llm2clip import ExportConfig, export_model
    from modeling_llm2clip.model_folders.onnx_folder import read_onnx_record

    config = ExportConfig(
        onnx=True, onnx_weights=ENGINES[1:], onnx_data=arguments.data, max_recall_loss=1.0
    )
    return read_onnx_record(export_model(arguments.model, folder, config))


def _list_recall_captions(data: str | None) -> list[str]:
    from modeling_llm2clip.publishing.onnx_checks import load_check_inputs

    return list(load_check_inputs(data).captions)


def _start(name: str, source: Path, folder: Path, threads: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.speed.onnx_speed", "--engine", name, str(source),
         str(folder / "captions.json"), str(_embeddings_file(folder, name)), str(threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = iter(process.stdout.readline, "")  # type: ignore[union-attr]
    if not any(line.strip() == "ready" for line in lines):
        raise SystemExit(f"{name} could not start, exit code {process.wait()}.")
    return process


def serve(name: str, source: str, captions_file: str, embeddings_file: str, threads: str) -> None:
    """Load one engine, say `ready`, then encode once for every line that is sent.

    Args:
        name: One of `ENGINES`.
        source: Folder of the model, or of its graphs.
        captions_file: JSON with the captions that are `timed`, and those for `recall`.
        embeddings_file: Where the embeddings of both are written, one after the other.
        threads: Threads that compute.
    """
    captions = json.loads(Path(captions_file).read_text(encoding="utf-8"))
    encode = load_engine(name, source, int(threads))
    further = encode(captions["recall"])  # and a warm-up
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        embeddings = encode(captions["timed"])
        seconds = time.perf_counter() - started
        np.save(embeddings_file, np.concatenate([embeddings, further]))
        print(seconds, flush=True)


def load_engine(name: str, source: str, threads: int) -> Callable[[list[str]], Any]:
    """Return the function that encodes captions with one engine.

    Args:
        name: One of `ENGINES`.
        source: Folder of the model, or of its graphs.
        threads: Threads that compute.
    """
    import torch

    torch.set_num_threads(threads)
    if name == "torch":
        from modeling_llm2clip import encode_texts, load_model

        model, processor = load_model(source, device="cpu")
        return lambda captions: encode_texts(model, processor, captions).numpy()
    from modeling_llm2clip.model_folders.onnx_folder import load_onnx_encoder

    encoder = load_onnx_encoder(
        source,
        weights=name,
        modalities=("text",),
        num_threads=threads,  # type: ignore[arg-type]
    )
    return lambda captions: encoder.encode_texts(captions).numpy()


def _embeddings_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _take_turns(workers: dict[str, subprocess.Popen[str]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(rounds):
        for name, process in workers.items():
            process.stdin.write("go\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            seconds[name].append(float(process.stdout.readline()))  # type: ignore[union-attr]
            print(f"round {number}, {name}: {seconds[name][-1]:.2f} s", flush=True)
    for process in workers.values():
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
    return seconds


def _summarize(
    name: str, seconds: dict[str, list[float]], embeddings: dict[str, Any], count: int
) -> dict[str, Any]:
    pairs = zip(seconds["torch"], seconds[name], strict=True)
    cosines = (embeddings[name].astype(np.float64) * embeddings["torch"]).sum(1)
    return {
        "captions_per_second": round(count / statistics.median(seconds[name]), 2),
        "times_torch": round(statistics.median(torch / engine for torch, engine in pairs), 3),
        "seconds": [round(value, 2) for value in seconds[name]],
        "min_cosine": round(float(cosines.min()), 6),
    }


def _measure_mb(model: Path, record: dict[str, Any]) -> dict[str, float]:
    """Return the size of the text tower, its adapter and projection in each engine."""
    from modeling_llm2clip.model_folders.weights import open_weights

    text = ("text_model.", "text_adapter.", "text_projection.")
    tensors = open_weights(model).items()
    num_bytes = sum(tensor.num_bytes for name, tensor in tensors if name.startswith(text))
    graphs = [graph for graph in record["graphs"].values() if "input_ids" in graph["inputs"]]
    return {
        "torch": round(num_bytes / 1e6, 1),
        **{graph["weights"]: graph["size_mb"] for graph in graphs},
    }


def _measure_recalls(arguments: argparse.Namespace, embeddings: dict[str, Any]) -> dict[str, float]:
    """Return text to image R@1 of each engine's texts among the model's own images."""
    import torch

    from modeling_llm2clip import encode_images, load_model
    from modeling_llm2clip.publishing.onnx_checks import load_check_inputs, measure_recall

    model, processor = load_model(str(arguments.model), device="cpu")
    images = encode_images(model, processor, load_check_inputs(arguments.data).images)
    return {name: measure_recall(torch.from_numpy(e), images) for name, e in embeddings.items()}


if __name__ == "__main__":
    main()
