"""What the paper's largest run would take, computed from measured slopes and cited numbers.

Called by `scale.py plan`. Nothing here was run: 60 million images with two captions each, an LLM of
8 billion weights, EVA02 L/14 at 336 pixels, 16 H100s in two machines.

| number | source |
| --- | --- |
| 60 million images, 4 epochs, batch of 4,096 | LLM2CLIP, arXiv:2411.04997, sections 3.2 and 4 |
| 8.03 billion weights, width 4,096 | Llama-3-8B, arXiv:2407.21783 |
| 304 million weights, width 1,024, 577 tokens | EVA-02-CLIP-L/14+ at 336 pixels, arXiv:2303.15389 |
| 989 TFLOP/s in bfloat16 | NVIDIA H100 SXM data sheet, without sparsity |
| 0.4 of the peak | assumed, as in `examples/recipes` |
| 30 and 110 tokens of a short and a long caption with prompt | assumed, as in `examples/recipes` |
| everything else | `results/scale.json` |
"""

from __future__ import annotations

from typing import Any

_IMAGES = 60_000_000
_GPUS, _MACHINES = 16, 2
_FLOPS = 989e12 * 0.4
_LLM_WEIGHTS, _LLM_WIDTH = 8.03e9, 4096
_TOWER_WEIGHTS, _TOWER_WIDTH, _TOWER_TOKENS = 304e6, 1024, 577
_CAPTION_TOKENS = (30, 110)
_EPOCHS, _FINETUNING_STEPS, _FINETUNING_BATCH = 4, 10_000, 2048
_FORWARD = 2  # operations per weight and token
_PASSES = 4  # forward, again for activations that are not kept, and twice backward
_CHECKSUM_BYTES, _NUMBER_BYTES = 8, 2
_CORES = 128  # of a machine with 8 GPUs


def plan(recorded: dict[str, Any]) -> dict[str, Any]:
    """Compute disk, memory and hours.

    Args:
        recorded: `scale.json`, with the parts records, stages and store.

    Returns:
        Gigabytes, GPU hours and hours of each stage, and what bounds it.
    """
    records = recorded["records"]
    captions = _IMAGES * len(_CAPTION_TOKENS)
    rate = records["index_records_per_second"] / recorded["records"]["cores"] * _CORES
    caption_flops = _FORWARD * _LLM_WEIGHTS * sum(_CAPTION_TOKENS) * _IMAGES
    pairs = _FINETUNING_STEPS * _FINETUNING_BATCH
    mean_tokens = sum(_CAPTION_TOKENS) / len(_CAPTION_TOKENS)
    finetuning_flops = 3 * _FORWARD * _LLM_WEIGHTS * 2 * mean_tokens * pairs
    image_flops = _PASSES * _FORWARD * _TOWER_WEIGHTS * _TOWER_TOKENS * _IMAGES * _EPOCHS
    slopes = recorded["stages"]["bytes_per_record"]
    rows = recorded["store"]["random"]["rows_per_second"]["store"]
    steps_rows = 4096 / _GPUS
    return {
        "images": _IMAGES,
        "gpus": _GPUS,
        "disk_gb": {
            "index": round(_IMAGES * records["file_bytes_per_record"] / 1e9),
            "caption_store": round(captions * (_LLM_WIDTH * _NUMBER_BYTES + _CHECKSUM_BYTES) / 1e9),
            "image_store_of_a_frozen_tower": round(
                _IMAGES * (_TOWER_WIDTH * _NUMBER_BYTES + _CHECKSUM_BYTES) / 1e9
            ),
        },
        "private_gb_per_machine": {
            stage: round(_IMAGES * slope["private_mb"] * _GPUS / _MACHINES / 1e9, 1)
            for stage, slope in slopes.items()
        },
        "stages": {
            "index": {"hours": round(_IMAGES / rate / 3600, 2), "bound_by": "cores"},
            "finetune-llm": _describe(finetuning_flops),
            "extract captions": _describe(caption_flops),
            "align": _describe(image_flops),
        },
        "rows_per_gpu_and_step_ms": round(1000 * steps_rows / rows, 1),
    }


def _describe(flops: float) -> dict[str, Any]:
    hours = flops / _FLOPS / 3600
    return {
        "gpu_hours": round(hours),
        "hours": round(hours / _GPUS, 1),
        "bound_by": "products of matrices",
    }
