"""Images per second of the alignment in its four modes, which differ in what each step runs.

    python -m benchmarks.training.training_efficiency --captions captions_val2017.json \
        --long-captions iiw.jsonl

| mode | at each step |
| --- | --- |
| `lora` | the LLM, forwards and backwards into a LoRA, and the vision tower |
| `frozen_online` | the LLM, forwards, and the vision tower |
| `stored_captions` | the vision tower; caption embeddings come from a store |
| `stored_both` | neither tower; image embeddings come from a store too |

SmolLM2-135M and EfficientNet-Lite0, the embedded emoji, the same images, captions and steps for
all. Each mode has a process of its own, and they take turns. Without `--captions` the emoji keep
their own short names; with it, each image gets a caption of that file as its short one, and one
of `--long-captions` as its long one, so that lengths are those of the paper's recipe (half short,
half long). They need not fit the image, which does not change the speed. Every mode is measured
with the vision tower frozen, and the modes that can train it also with the whole tower trained.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.provenance import describe_run, read_peak_bytes, write_result
from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.building.pretrained_towers import EFFICIENTNET, SMOLLM2, fetch_tower
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.data.records.record_loading import find_example_data, load_records
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.embedding.extract import extract
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.training.alignment.align import align

TEXT_TRAININGS = {
    "lora": "lora",
    "frozen_online": "frozen-online",
    "stored_captions": "stored",
    "stored_both": "stored",
}
# The paper trains four epochs, its released recipe twenty (upstream run script).
EPOCHS = (4, 20)


def main() -> None:
    """Measure all modes, or be the process of one."""
    arguments = _parse()
    if arguments.mode:
        print(json.dumps(_run_mode(arguments)), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        arguments.work = Path(temporary)
        extraction = _prepare(arguments)
        turns: dict[str, dict[str, list[dict[str, float]]]] = {}
        for number in range(arguments.rounds):
            for vision in ("frozen", "full"):
                for mode in TEXT_TRAININGS:
                    if mode == "stored_both" and vision == "full":
                        continue  # its image embeddings would change at every step
                    figures = _run_in_own_process(arguments, mode, vision)
                    turns.setdefault(vision, {}).setdefault(mode, []).append(figures)
                    print(f"round {number}, vision {vision}, {mode}: {figures}", flush=True)
        record = _describe(arguments, turns, extraction)
    write_result(arguments.output, record)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--captions", type=Path, help="short ones: COCO's captions file")
    parser.add_argument("--long-captions", type=Path, help="JSON lines with captions")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "training_efficiency.json")
    parser.add_argument("--mode", choices=tuple(TEXT_TRAININGS), help=argparse.SUPPRESS)
    parser.add_argument("--vision", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _prepare(arguments: argparse.Namespace) -> dict[str, float]:
    """Build the model, extract both stores, and return the seconds per image of each."""
    torch.set_num_threads(arguments.threads)
    chosen = BuildConfig(prompt="chatml", visual_projection_bias=True)
    built = join_towers(fetch_tower(EFFICIENTNET), fetch_tower(SMOLLM2), chosen)
    model = save_model(*built, arguments.work / "model")
    records = _read_records(arguments)
    seconds = {}
    for name, modality in (("captions", "text"), ("images", "image")):
        started = time.perf_counter()
        extract(model, records, arguments.work / name, modality=modality)
        seconds[f"{name}_seconds_per_image"] = (time.perf_counter() - started) / len(records)
    return {name: round(value, 5) for name, value in seconds.items()}


def _read_records(arguments: argparse.Namespace) -> list[CaptionedImage]:
    emoji = [r for r in load_records(find_example_data() / "emoji") if r.lang == "en"]
    records = emoji[: arguments.images]
    if arguments.captions is None:
        return records
    short = [r.captions[0] for r in load_records(arguments.captions, require_images=False)]
    lines = arguments.long_captions.read_text(encoding="utf-8").splitlines()
    long = [json.loads(line)["captions"][0] for line in lines]
    return [
        replace(r, captions=(s,), long_captions=(lo,))
        for r, s, lo in zip(records, short, long, strict=False)
    ]


def _run_in_own_process(arguments: argparse.Namespace, mode: str, vision: str) -> dict[str, float]:
    texts = []
    if arguments.captions:
        texts = ["--captions", str(arguments.captions), "--long-captions",
                 str(arguments.long_captions)]  # fmt: skip
    command = [
        sys.executable, "-m", "benchmarks.training.training_efficiency",
        "--mode", mode, "--vision", vision,
        "--work", str(arguments.work), "--images", str(arguments.images),
        "--batch-size", str(arguments.batch_size), "--steps", str(arguments.steps),
        "--threads", str(arguments.threads), *texts,
    ]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _run_mode(arguments: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(arguments.threads)
    text_training = TEXT_TRAININGS[arguments.mode]
    stores = {}
    if text_training == "stored":
        stores["caption_store"] = EmbeddingStore.open(arguments.work / "captions")
    if arguments.mode == "stored_both":
        stores["image_store"] = EmbeddingStore.open(arguments.work / "images")
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "run"
        align(
            arguments.work / "model",
            _read_records(arguments),
            output,
            AlignConfig(
                text_training=text_training,
                vision_training=arguments.vision,
                max_steps=arguments.steps,
                global_batch_size=arguments.batch_size,
                learning_rate=1e-4,
                # The next images are decoded while the towers work; stored ones need no worker.
                num_workers=0 if arguments.mode == "stored_both" else 1,
                precision="float32",
                device="cpu",
            ),
            **stores,
        )
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    peak = read_peak_bytes() / 1e9
    return {"samples_per_second": last["train_samples_per_second"], "peak_rss_gb": round(peak, 2)}


def _describe(
    arguments: argparse.Namespace,
    turns: dict[str, dict[str, list[dict[str, float]]]],
    extraction: dict[str, float],
) -> dict[str, Any]:
    frozen = {m: _summarize(figures) for m, figures in turns["frozen"].items()}
    return {
        "command": "python -m benchmarks.training.training_efficiency "
        + ("--captions captions_val2017.json --long-captions iiw.jsonl " if arguments.captions
           else "")
        + f"--images {arguments.images} --batch-size {arguments.batch_size} "
        f"--steps {arguments.steps} --rounds {arguments.rounds}",
        **describe_run("torch", "transformers", "accelerate", "peft", threads=arguments.threads),
        "captions": "half COCO val2017, half ImageInWords" if arguments.captions
        else "the emoji's names",
        **frozen,
        "times_as_fast_as_lora": {
            mode: round(row["samples_per_second"] / frozen["lora"]["samples_per_second"], 1)
            for mode, row in frozen.items()
        },
        "vision_trained": {m: _summarize(figures) for m, figures in turns["full"].items()},
        "extraction": extraction,
        "times_as_fast_as_lora_with_extraction": {
            f"{epochs} epochs": _amortize(frozen, extraction, epochs) for epochs in EPOCHS
        },
    }  # fmt: skip


def _summarize(figures: list[dict[str, float]]) -> dict[str, float]:
    return {
        "samples_per_second": statistics.median(f["samples_per_second"] for f in figures),
        "peak_rss_gb": max(f["peak_rss_gb"] for f in figures),
    }


def _amortize(
    frozen: dict[str, dict[str, float]], extraction: dict[str, float], epochs: int
) -> dict[str, float]:
    """Times as fast as LoRA when what was extracted once is shared by so many epochs."""
    captions = extraction["captions_seconds_per_image"]
    both = captions + extraction["images_seconds_per_image"]
    return {
        mode: round(
            1 / frozen["lora"]["samples_per_second"]
            / (1 / frozen[mode]["samples_per_second"] + once / epochs), 1,
        )
        for mode, once in (("stored_captions", captions), ("stored_both", both))
    }  # fmt: skip


if __name__ == "__main__":
    main()
