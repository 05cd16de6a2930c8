"""The demo's scores over several seeds: other held-out emoji, another random adapter.

    llm2clip demo && python benchmarks/demo_seeds.py --report llm2clip-demo/report.json

The report of a whole run gives its seed's scores, time and memory. The other seeds share one
encoding, which does not depend on the seed, so they have scores only.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from provenance import describe_processor, read_commit

from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.building.pretrained_towers import (
    EFFICIENTNET,
    SMOLLM2,
    SMOLLM2_BASE,
    fetch_tower,
)
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.demo.run_demo import DemoArguments, read_images
from modeling_llm2clip.demo.stages import align, encode_records, evaluate, hold_out


def main() -> None:
    """Run the seeds and write the list of reports."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--report", type=Path, required=True, help="report.json of a whole run")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2])
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "demo.json")
    arguments = parser.parse_args()
    whole = json.loads(arguments.report.read_text(encoding="utf-8"))
    whole |= {
        "commit": read_commit(),
        "hardware": f"{describe_processor()}, {platform.machine()}",
    }
    reports = [whole, *(_shorten(whole, seed) for seed in _run_seeds(arguments.seeds))]
    arguments.output.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(reports, indent=2))


def _run_seeds(seeds: list[int]) -> list[dict[str, Any]]:
    nothing_written = Path("demo-seeds-write-nothing")
    records, _ = read_images(DemoArguments(output=nothing_written))
    towers = fetch_tower(EFFICIENTNET), fetch_tower(SMOLLM2)
    images = None
    scores = []
    for seed in seeds:
        chosen = BuildConfig(
            prompt="chatml",
            lora=DemoArguments(output=nothing_written).find_adapter(),
            accept_lora_base=SMOLLM2_BASE,
            seed=seed,
        )
        model, processor = join_towers(*towers, chosen)
        images = images or encode_records(model, processor, records)
        held_out = hold_out(records, seed=seed)
        chosen_alignment = DemoArguments(output=nothing_written, seed=seed).alignment
        align(model, images, held_out, chosen_alignment)
        scores.append({"seed": seed, **evaluate(model, images, held_out)})
        print(scores[-1], flush=True)
    return scores


def _shorten(whole: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    """A report without time and memory, which were not measured for this seed alone."""
    kept = ("caption_tuned", "num_images", "num_held_out", "versions", "commit", "hardware")
    return {**{name: whole[name] for name in kept}, **scores}


if __name__ == "__main__":
    main()
