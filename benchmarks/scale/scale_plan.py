"""What the paper's largest run would take, computed from measured slopes and cited numbers.

Called by `scale.py plan`. Nothing here was run: 60 million images with two captions each, an LLM of
8 billion weights, EVA02 L/14 at 336 pixels, 16 H100s in two machines. Work on CPUs is scaled by the
number of cores; work on disks and networks, which differ, is left to the reader as a rate.

| number | source |
| --- | --- |
| 60 million images, 4 epochs, batch of 4,096 | LLM2CLIP, arXiv:2411.04997, sections 3.2 and 4 |
| 8.03 billion weights, width 4,096 | Llama-3-8B, arXiv:2407.21783 |
| 304 million weights, width 1,024, 577 tokens | EVA-02-CLIP-L/14+ at 336 pixels, arXiv:2303.15389 |
| 989 TFLOP/s in bfloat16 | NVIDIA H100 SXM data sheet, without sparsity |
| 0.4 of the peak | assumed, as in `examples/recipes` |
| 30 and 110 tokens of a short and a long caption with prompt | assumed, as in `examples/recipes` |
| 10,000 steps of 2,048 pairs of fine-tuning | assumed: one epoch over 20 million of the pairs |
| 128 cores in a machine of 8 GPUs | assumed, as clouds rent them |
| 3 dollars for an hour of an H100 | assumed; multiply the hours by your own price |
| everything else | `results/scale.json` |
"""

from __future__ import annotations

from typing import Any

_IMAGES = 60_000_000
_GPUS, _MACHINES = 16, 2
_CORES = 128 * _MACHINES
_DOLLARS_PER_GPU_HOUR = 3
_FLOPS = 989e12 * 0.4
_LLM_WEIGHTS, _LLM_WIDTH = 8.03e9, 4096
_TOWER_WEIGHTS, _TOWER_WIDTH, _TOWER_TOKENS = 304e6, 1024, 577
_CAPTION_TOKENS = (30, 110)
_EPOCHS, _BATCH, _FINETUNING_STEPS, _FINETUNING_BATCH = 4, 4096, 10_000, 2048
_FORWARD = 2  # operations per weight and token
_TRAINED = 3  # a forward pass, and backward for inputs and weights
_RECOMPUTED = 4  # the same, and forward again for activations that are not kept
_CHECKSUM_BYTES, _NUMBER_BYTES = 8, 2
_FROZEN = "extract images, of a frozen tower"  # takes the place of most of align


def plan(recorded: dict[str, Any]) -> dict[str, Any]:
    """Compute disk, memory, hours and cost.

    Args:
        recorded: `scale.json`, with the parts records, stages, finetune, store and streams.

    Returns:
        Gigabytes; of each stage hours, GPU hours and what bounds it; and of a run that trains the
        tower, which extracts no images, the sums and dollars.
    """
    stages = _plan_stages(recorded)
    needed = [stage for name, stage in stages.items() if name != _FROZEN]
    gpu_hours = sum(stage.get("gpu_hours", 0) for stage in needed)
    return {
        "images": _IMAGES,
        "gpus": _GPUS,
        "machines": _MACHINES,
        "disk_gb": _plan_disk(recorded),
        "private_gb_per_machine": _plan_memory(recorded),
        "stages": stages,
        "gpu_hours": round(gpu_hours),
        "hours": round(sum(stage["hours"] for stage in needed), 1),
        "dollars": round(gpu_hours * _DOLLARS_PER_GPU_HOUR),
        "gigabytes_per_second_from_stores": round(_rate_of_stores(stages["align"]["hours"]), 2),
    }


def _plan_disk(recorded: dict[str, Any]) -> dict[str, int]:
    captions = _IMAGES * len(_CAPTION_TOKENS)
    sizes = {
        "index": _IMAGES * recorded["records"]["file_bytes_per_record"],
        "caption_store": captions * (_LLM_WIDTH * _NUMBER_BYTES + _CHECKSUM_BYTES),
        "image_store": _IMAGES * (_TOWER_WIDTH * _NUMBER_BYTES + _CHECKSUM_BYTES),
    }
    return {name: round(size / 1e9) for name, size in sizes.items()}


def _plan_memory(recorded: dict[str, Any]) -> dict[str, float]:
    """Memory that grows with the records; the towers come on top of it."""
    slopes = recorded["stages"]["bytes_per_record"]
    of_stages = {
        "finetune-llm": recorded["finetune"]["peak_bytes_per_record"],
        **{name: slope["private_mb"] for name, slope in slopes.items()},
    }
    processes = _GPUS / _MACHINES
    return {name: round(_IMAGES * b * processes / 1e9, 1) for name, b in of_stages.items()}


def _plan_stages(recorded: dict[str, Any]) -> dict[str, dict[str, Any]]:
    streams, records = recorded["streams"], recorded["records"]
    decode_hours = _IMAGES / streams["files_decoded_per_s"] / 3600 * streams["cores"] / _CORES
    caption_tokens = sum(_CAPTION_TOKENS)
    pair_tokens = 2 * caption_tokens / len(_CAPTION_TOKENS)
    pairs = _FINETUNING_STEPS * _FINETUNING_BATCH
    tower_flops = _FORWARD * _TOWER_WEIGHTS * _TOWER_TOKENS * _IMAGES
    return {
        "index": {
            "hours": round(_IMAGES / records["index_records_per_second"] / 3600, 2),
            "bound_by": f"the {records['cores']} cores it was measured on",
        },
        "finetune-llm": _describe(_TRAINED * _FORWARD * _LLM_WEIGHTS * pair_tokens * pairs),
        "extract captions": _describe(_FORWARD * _LLM_WEIGHTS * caption_tokens * _IMAGES),
        _FROZEN: _describe(tower_flops, decode_hours=decode_hours),
        "align": _describe(
            _RECOMPUTED * _EPOCHS * tower_flops, decode_hours=_EPOCHS * decode_hours
        ),
    }


def _describe(flops: float, *, decode_hours: float = 0.0) -> dict[str, Any]:
    """Hours of a stage whose GPUs compute while its cores decode: those of the slower one."""
    gpu_hours = flops / _FLOPS / 3600
    bounds = {"products of matrices": gpu_hours / _GPUS, "decoding": decode_hours}
    slowest = max(bounds, key=lambda name: bounds[name])
    return {
        "gpu_hours": round(bounds[slowest] * _GPUS),
        "hours": round(bounds[slowest], 1),
        "bound_by": slowest,
        "hours_of_decoding": round(decode_hours, 2),
    }


def _rate_of_stores(hours: float) -> float:
    """Gigabytes per second that all processes together read of the captions in `align`."""
    return _IMAGES * _EPOCHS * _LLM_WIDTH * _NUMBER_BYTES / (hours * 3600) / 1e9
