"""What each run of the paper would take on 8 H100s, computed from its recipe. Nothing was run.

    python -m benchmarks.scale.scale_paper

Writes `results/scale_paper.json`. The rates of a GPU are derived in `benchmarks/gpu/goals.py`, and
no GPU has measured them.

| number | source |
| --- | --- |
| steps, batch sizes, epochs, towers | the recipe |
| CC3M 2,873,538 and CC12M 10,000,225 images | microsoft/LLM2CLIP at cba3b45, run.sh |
| 60 million images | LLM2CLIP, arXiv:2411.04997, section 4 |
| weights, tokens, width and layers of a tower | its architecture |
| images per second of a tower | those of L/14-336, by operations: products, and attention |
| CPU time to prepare an image | `results/gpu_proxies.json`, of 640 x 480 pixels |
| tokens of captions, bytes of stored ones, cores of a machine | those of `scale_plan.py` |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.goals import FINETUNE_TOKENS, TOKENS, TOWER_IMAGES
from benchmarks.scale.scale_plan import (
    CAPTION_TOKENS,
    CHECKSUM_BYTES,
    CORES_PER_MACHINE,
    NUMBER_BYTES,
)
from modeling_llm2clip.configs.config_fields import read_config
from modeling_llm2clip.configs.train_config import TrainConfig

_ROOT = Path(__file__).parents[2]
_FOLDER = _ROOT / "examples" / "recipes" / "paper"
_RESULTS = _ROOT / "benchmarks" / "results"
OUTPUT = _RESULTS / "scale_paper.json"
_GPUS = 8  # of one machine
_IMAGES = {"3m": 2_873_538, "15m": 12_873_763, "60m": 60_000_000}
_LLMS = {
    "meta-llama/Llama-3.1-8B-Instruct": ("8B", 4096),
    "meta-llama/Llama-3.2-1B-Instruct": ("1B", 2048),
}


class Tower(NamedTuple):
    """Size of a vision transformer."""

    weights: int
    tokens: int
    width: int
    layers: int

    @property
    def operations(self) -> int:
        """Operations of a forward pass of one image."""
        products = 2 * self.weights * self.tokens
        return products + 4 * self.tokens**2 * self.width * self.layers


_TOWERS = {
    "openai/clip-vit-base-patch16": Tower(85_799_424, 197, 768, 12),
    "openai/clip-vit-large-patch14": Tower(303_179_776, 257, 1024, 24),
    "openai/clip-vit-large-patch14-336": Tower(303_507_456, 577, 1024, 24),
    "timm/eva02_base_patch16_clip_224.merged2b": Tower(85_869_312, 197, 768, 12),
    "timm/eva02_large_patch14_clip_224.merged2b": Tower(303_317_952, 257, 1024, 24),
    "timm/eva02_large_patch14_clip_336.merged2b": Tower(303_645_632, 577, 1024, 24),
    "google/siglip2-so400m-patch14-224": Tower(427_680_704, 256, 1152, 27),
}
_MEASURED = _TOWERS["openai/clip-vit-large-patch14-336"]  # whose images per second are derived


def main() -> None:
    """Compute, print, and write the result."""
    text = json.dumps({"gpus": _GPUS, "rows": plan_runs()}, indent=2) + "\n"
    OUTPUT.write_text(text, encoding="utf-8")
    print(text)


def plan_runs() -> dict[str, dict[str, Any]]:
    """Compute images, GPU hours by stage, hours on 8 GPUs and disk of every run of the paper."""
    proxies = json.loads((_RESULTS / "gpu_proxies.json").read_text("utf-8"))
    of_cores = proxies["after"]["cpu_ms"]["prepare 16 images of 640 x 480 for 336 pixels"]
    decoded_per_second = CORES_PER_MACHINE * 16 / of_cores * 1e3
    return {
        file.stem: _plan_run(read_config(file, TrainConfig), decoded_per_second)
        for file in sorted(_FOLDER.glob("*.yaml"))
        if file.stem != "base"
    }


def _plan_run(config: TrainConfig, decoded_per_second: float) -> dict[str, Any]:
    finetune, align, llm = config.finetune, config.align, _LLMS[config.text_model]
    assert finetune is not None and finetune.max_steps and align.num_train_epochs
    num_images, tower = _IMAGES[Path(config.data).stem], _TOWERS[config.vision_model]
    pairs = finetune.max_steps * finetune.per_device_train_batch_size * _GPUS
    tuned = pairs * sum(CAPTION_TOKENS) / FINETUNE_TOKENS[llm[0]][finetune.gradient_checkpointing]
    extracted = num_images * sum(CAPTION_TOKENS) / TOKENS[llm[0]][0]
    slowdown = tower.operations / _MEASURED.operations
    trained = align.num_train_epochs * num_images * slowdown
    trained /= TOWER_IMAGES[align.gradient_checkpointing]
    decoded = align.num_train_epochs * num_images / decoded_per_second * _GPUS
    seconds = {"finetune": tuned, "extract": extracted, "align": max(trained, decoded)}
    stored = len(CAPTION_TOKENS) * (llm[1] * NUMBER_BYTES + CHECKSUM_BYTES)
    return {
        "images": num_images,
        "gpu_hours": {stage: round(value / 3600, 1) for stage, value in seconds.items()},
        "hours": round(sum(seconds.values()) / 3600 / _GPUS, 1),
        "caption_store_gb": round(num_images * stored / 1e9),
    }


if __name__ == "__main__":
    main()
