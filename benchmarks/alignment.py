"""What caption tuning buys in the alignment: held-out recalls by text encoder, over seeds.

    python benchmarks/alignment.py --adapter tuned-captions/adapter

The same images (the embedded emoji), frozen vision tower (EfficientNet-Lite0), steps and seeds
for three states of the same LLM (SmolLM2-135M): causal as it came, made bidirectional, and
bidirectional with the caption-tuned adapter.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from provenance import describe_processor, read_commit
from torch import Tensor

from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.demo.pretrained_towers import (
    EFFICIENTNET,
    SMOLLM2,
    SMOLLM2_BASE,
    fetch_tower,
)
from modeling_llm2clip.demo.run_demo import DemoArguments, read_images
from modeling_llm2clip.demo.stages import align, encode_records, evaluate, hold_out


def main() -> None:
    """Align every text encoder with every seed, and write the recalls."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "alignment.json")
    arguments = parser.parse_args()
    recalls: dict[str, list[dict[str, Any]]] = {}
    vision_embeds = None  # the tower is the same for all
    for name, bidirectional, adapter in (
        ("causal", False, None),
        ("bidirectional", True, None),
        ("tuned", True, arguments.adapter),
    ):
        recalls[name], vision_embeds = _run(arguments.seeds, bidirectional, adapter, vision_embeds)
    record = {
        "command": f"python benchmarks/alignment.py --seeds {' '.join(map(str, arguments.seeds))}",
        "commit": read_commit(),
        "hardware": f"{describe_processor()}, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "timm", "peft")},
        "data": "embedded emoji; 300 things held out with all their images and names",
        "alignment": asdict(_settings(arguments.seeds[0]).alignment),
        "mean_t2i_r1": {
            name: round(statistics.fmean(r["unseen_t2i_r1"] for r in runs), 4)
            for name, runs in recalls.items()
        },
        "recalls": recalls,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


def _settings(seed: int) -> DemoArguments:
    return DemoArguments(output=Path("nothing-is-written-here"), seed=seed)


def _run(
    seeds: list[int], bidirectional: bool, adapter: Path | None, vision_embeds: Tensor | None
) -> tuple[list[dict[str, Any]], Tensor]:
    records, _ = read_images(_settings(seeds[0]))
    towers = fetch_tower(EFFICIENTNET), fetch_tower(SMOLLM2)
    encoded = None
    runs = []
    for seed in seeds:
        chosen = BuildConfig(
            prompt="chatml",
            bidirectional=bidirectional,
            lora=adapter,
            accept_lora_base=SMOLLM2_BASE,
            seed=seed,
        )
        model, processor = join_towers(*towers, chosen)
        # Neither tower depends on the seed.
        encoded = encoded or encode_records(model, processor, records, vision_embeds=vision_embeds)
        held_out = hold_out(records, seed=seed)
        align(model, encoded, held_out, _settings(seed).alignment)
        runs.append({"seed": seed, **evaluate(model, encoded, held_out)})
        print(runs[-1], flush=True)
    assert encoded is not None
    return runs, encoded.vision_embeds


if __name__ == "__main__":
    main()
