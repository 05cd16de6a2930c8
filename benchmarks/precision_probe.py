"""Whether a lower precision is faster and true for the embedded LLM on this machine.

python benchmarks/precision_probe.py --captions coco.jsonl iiw.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from encoding_speed import sample_captions
from encoding_worker import build_model
from provenance import describe_processor, read_commit

from modeling_llm2clip.demo.pretrained_towers import SMOLLM2, fetch_tower
from modeling_llm2clip.encoding.precision_probe import pick_probe_captions, probe_precisions


def main() -> None:
    """Probe, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--captions", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, default=64, help="captions of the probe")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "precision_probe.json")
    arguments = parser.parse_args()
    captions = pick_probe_captions(sample_captions(arguments.captions, 2000), count=arguments.count)
    model, processor = build_model(str(fetch_tower(SMOLLM2)))
    trials = probe_precisions(model, processor, captions)
    record = {
        "command": f"python benchmarks/precision_probe.py --count {arguments.count}",
        "commit": read_commit(),
        "hardware": f"{describe_processor()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "captions": len(captions),
        "trials": [
            {
                "dtype": str(trial.precision.dtype).removeprefix("torch."),
                "first_layer": trial.precision.first_layer,
                "speedup": round(trial.speedup, 3),
                "min_cosine": round(trial.min_cosine, 6),
                "pays": trial.pays,
            }
            for trial in trials
        ],
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
