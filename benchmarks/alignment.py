"""What fine-tuning the LLM on captions buys in the alignment: held-out recalls over seeds.

    python benchmarks/alignment.py --lora tuned-captions/lora

The recipe of the demo (the embedded emoji, a frozen EfficientNet-Lite0) with three states of the
same LLM (SmolLM2-135M): causal as it came, made bidirectional, and bidirectional with the LoRA.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from provenance import describe_processor, read_commit

from modeling_llm2clip.building.pretrained_towers import SMOLLM2, SMOLLM2_BASE, fetch_tower
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.demo.run_demo import make_demo_config, run_demo

_SCORES = ("unseen_t2i_r1", "unseen_t2i_r10", "unseen_i2t_r1", "chance_r1")


def main() -> None:
    """Align every text encoder with every seed, and write the recalls."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--lora", type=Path, required=True, help="what llm2clip finetune-llm wrote")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="folder for the models, which are removed")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "alignment.json")
    arguments = parser.parse_args()
    recalls = {
        name: [_run(seed, build, arguments.work) for seed in arguments.seeds]
        for name, build in (
            ("causal", BuildConfig(bidirectional=False, prompt="chatml")),
            ("bidirectional", BuildConfig(prompt="chatml")),
            (
                "tuned",
                BuildConfig(prompt="chatml", lora=arguments.lora, accept_lora_base=SMOLLM2_BASE),
            ),
        )
    }
    record = {
        "command": f"python benchmarks/alignment.py --seeds {' '.join(map(str, arguments.seeds))}",
        "commit": read_commit(),
        "hardware": f"{describe_processor()}, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "timm", "peft")},
        "data": "embedded emoji; 300 held out with all their images and names",
        "alignment": asdict(make_demo_config(Path("demo")).align),
        "mean_t2i_r1": {
            name: round(statistics.fmean(r["unseen_t2i_r1"] for r in runs), 4)
            for name, runs in recalls.items()
        },
        "recalls": recalls,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


def _run(seed: int, build: BuildConfig, work: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        config = make_demo_config(Path(folder) / "demo", seed=seed, device="cpu")
        # By its folder, so that it comes as it is and not with the package's LoRA.
        config = replace(config, text_model=str(fetch_tower(SMOLLM2)), build=build)
        report = run_demo(config)
    return {"seed": seed, **{name: report[name] for name in _SCORES}}


if __name__ == "__main__":
    main()
