"""How much fine-tuning the LLM on captions improves the alignment: held-out recalls over seeds.

    python -m benchmarks.training.alignment --lora tuned-captions/lora
    python -m benchmarks.training.alignment --before ../another-checkout

The recipe of the demo (the embedded emoji, a frozen EfficientNet-Lite0) with three states of the
same LLM (SmolLM2-135M): causal as it came, made bidirectional, and bidirectional with the LoRA.
With `--before`, it measures the CPU time of a batch of stored embeddings instead: here and in
another checkout in turns, with the default noise and without. The figures go to the same file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.scale.scale_records import write_records
from benchmarks.scale.scale_stages import prepare_stage
from benchmarks.shared.checkouts import measure_in_turns
from benchmarks.shared.provenance import describe_run, read_commit, write_result
from modeling_llm2clip.building.pretrained_towers import SMOLLM2, fetch_tower
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.demo.run_demo import make_demo_config, run_demo

# Widths of SmolLM2-135M and EfficientNet-Lite0.
_WIDTHS = {"caption_embeds": 576, "vision_embeds": 1280}
_NUM_STORED = 20_000
_QUESTIONS = tuple(f"{size} {noise}" for size in (512, 4096) for noise in ("off", "on"))
_BATCHES = """
import sys, time, numpy as np
from pathlib import Path
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
from modeling_llm2clip.training.alignment.alignment_data import AlignmentDataset
from modeling_llm2clip.training.alignment.sampling import draw_samples
folder, count = Path(sys.argv[1]), int(sys.argv[2])
records = load_records(folder / str(count), require_images=False)
stores = {f"{n}_store": EmbeddingStore.open(folder / f"{n}s-{count}") for n in ("caption", "image")}
datasets = {
    name: AlignmentDataset(records, None, AlignConfig(**noise), **stores)
    for name, noise in (
        ("off", {"image_noise": 0.0, "caption_noise": 0.0}),
        ("on", {"image_noise": 1.0, "caption_noise": 0.5}),
    )
}
order = np.random.default_rng(0)
def read(size, noise, times):
    for _ in range(times):
        items = order.permutation(count)[:size]
        batch = datasets[noise].__getitems__(draw_samples(items, 0, seed=0))
        datasets[noise].make_inputs(batch)
read(4096, "on", 8)  # of rows that are read for the first time, the checksums are compared
print("ready", flush=True)
for line in sys.stdin:
    size, noise = line.split()
    times = max(1, 16384 // int(size))
    started = time.process_time()
    read(int(size), noise, times)
    print((time.process_time() - started) / times * 1000, flush=True)
"""
_SCORES = ("unseen_t2i_r1", "unseen_t2i_r10", "unseen_i2t_r1", "chance_r1")


def main() -> None:
    """Align every text encoder with every seed, and write the recalls."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--lora", type=Path, help="what llm2clip finetune-llm wrote")
    chosen.add_argument("--before", type=Path, help="another checkout, for the times of batches")
    parser.add_argument("--rounds", type=int, default=15, help="with --before")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="folder for the models, which are removed")
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "alignment.json")
    arguments = parser.parse_args()
    if arguments.before is not None:
        recorded = json.loads(arguments.output.read_text(encoding="utf-8"))
        _write({**recorded, "batches": _measure_batches(arguments)}, arguments.output)
        return
    recalls = {
        name: [_run(seed, build, arguments.work) for seed in arguments.seeds]
        for name, build in (
            ("causal", BuildConfig(bidirectional=False, prompt="chatml")),
            ("bidirectional", BuildConfig(prompt="chatml")),
            (
                "tuned",
                BuildConfig(prompt="chatml", lora=arguments.lora),
            ),
        )
    }
    record = {
        "command": "python -m benchmarks.training.alignment "
        f"--seeds {' '.join(map(str, arguments.seeds))}",
        **describe_run("torch", "transformers", "timm", "peft"),
        "data": "embedded emoji; 300 held out with all their images and names",
        "alignment": asdict(make_demo_config(Path("demo")).align),
        "mean_t2i_r1": {
            name: round(statistics.fmean(r["unseen_t2i_r1"] for r in runs), 4)
            for name, runs in recalls.items()
        },
        "recalls": recalls,
    }
    _write(record, arguments.output)


def _write(record: dict[str, Any], output: Path) -> None:
    write_result(output, record)


def _measure_batches(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=arguments.work) as temporary:
        folder = Path(temporary)
        write_records(folder / str(_NUM_STORED), _NUM_STORED)
        prepare_stage("align", folder, _NUM_STORED, widths=_WIDTHS)
        cpu_ms = measure_in_turns(
            arguments.before, _BATCHES, [temporary, str(_NUM_STORED)],
            questions=_QUESTIONS, rounds=arguments.rounds,
        )  # fmt: skip
    return {
        "command": "python -m benchmarks.training.alignment --before … "
        f"--rounds {arguments.rounds}",
        **describe_run(threads=1, note="beside other work"),
        "before": read_commit(arguments.before),
        "data": f"{_NUM_STORED:,} records; captions of {_WIDTHS['caption_embeds']} and images of "
        f"{_WIDTHS['vision_embeds']} dimensions",
        "cpu_ms": cpu_ms,
    }


def _run(seed: int, build: BuildConfig, work: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        config = make_demo_config(Path(folder) / "demo", seed=seed, device="cpu")
        # By its folder, so that it comes as it is and not with the package's LoRA.
        config = replace(config, text_model=str(fetch_tower(SMOLLM2)), build=build)
        report = run_demo(config)
    return {"seed": seed, **{name: report[name] for name in _SCORES}}


if __name__ == "__main__":
    main()
