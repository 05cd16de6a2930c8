"""What the paper's largest run would take, computed from measured slopes and cited numbers.

Called by `scale.py plan`. Nothing here was run: 60 million images with two captions each, an LLM of
8 billion weights, a tower of L/14 at 336 pixels, 16 H100s in two machines. The rates of a GPU are
derived in `benchmarks/gpu/goals.py`, and no GPU has measured them. Work on CPUs is scaled by the
number of cores; work on disks and networks, which differ, is left to the reader as a rate.

| number | source |
| --- | --- |
| 60 million images, 4 epochs, batch of 4,096 | LLM2CLIP, arXiv:2411.04997, sections 3.2 and 4 |
| width 4,096 of the LLM, 1,024 of the tower | Llama-3-8B, arXiv:2407.21783; arXiv:2103.00020 |
| tokens, images and steps a second of one GPU, in bfloat16 | derived: `benchmarks/gpu/goals.py` |
| a trained tower takes four times a forward pass | derived: backward twice, and forward again |
| 16 GPUs are 16 times as fast as one | assumed |
| 30 and 110 tokens of a short and a long caption with prompt | assumed |
| 10,000 steps of 2,048 pairs of fine-tuning | assumed: one epoch over 20 million of the pairs |
| 128 cores in a machine of 8 GPUs | assumed, as clouds rent them |
| 3 dollars for an hour of an H100 | assumed; multiply the hours by your own price |
| everything else | `results/scale.json` |
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.goals import ALIGN_STEPS, FINETUNE_TOKENS, IMAGES, TOKENS

_IMAGES = 60_000_000
_GPUS, _MACHINES = 16, 2
CORES_PER_MACHINE = 128  # of 8 GPUs
_DOLLARS_PER_GPU_HOUR = 3
_LLM, _LLM_WIDTH, _TOWER_WIDTH = "8B", 4096, 1024
CAPTION_TOKENS = (30, 110)
_EPOCHS, _BATCH, _FINETUNING_STEPS, _FINETUNING_BATCH = 4, 4096, 10_000, 2048
_TRAINED = 4  # a forward pass, backward for inputs and weights, and the recomputed forward pass
CHECKSUM_BYTES, NUMBER_BYTES = 8, 2
# Take the place of most of align, where the tower is frozen.
_FROZEN = ("extract images, of a frozen tower", "align, of a frozen tower")


def plan(recorded: dict[str, Any]) -> dict[str, Any]:
    """Compute disk, memory, hours and cost.

    Args:
        recorded: `scale.json`, with the parts records, stages, finetune, store and streams.

    Returns:
        Gigabytes; of each stage hours, GPU hours and what bounds it; and of a run that trains the
        tower, which extracts no images, the sums and dollars.
    """
    stages = _plan_stages(recorded)
    needed = [stage for name, stage in stages.items() if name not in _FROZEN]
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
    captions = _IMAGES * len(CAPTION_TOKENS)
    sizes = {
        "index": _IMAGES * recorded["records"]["file_bytes_per_record"],
        "caption_store": captions * (_LLM_WIDTH * NUMBER_BYTES + CHECKSUM_BYTES),
        "image_store": _IMAGES * (_TOWER_WIDTH * NUMBER_BYTES + CHECKSUM_BYTES),
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
    decode_hours = (
        _IMAGES
        / streams["files_decoded_per_s"]
        / 3600
        * streams["cores"]
        / (CORES_PER_MACHINE * _MACHINES)
    )
    caption_tokens = _IMAGES * sum(CAPTION_TOKENS)
    tuned_tokens = _FINETUNING_STEPS * _FINETUNING_BATCH * sum(CAPTION_TOKENS)
    extracted, aligned = _FROZEN
    return {
        "index": {
            "hours": round(_IMAGES / records["index_records_per_second"] / 3600, 2),
            "bound_by": f"the {records['cores']} cores it was measured on",
        },
        "finetune-llm": _describe(tuned_tokens / FINETUNE_TOKENS[_LLM][0]),
        "extract captions": _describe(caption_tokens / TOKENS[_LLM][0]),
        extracted: _describe(_IMAGES / IMAGES, decode_hours=decode_hours),
        aligned: _describe(_EPOCHS * _IMAGES / _BATCH / ALIGN_STEPS[_LLM, _BATCH]),
        "align": _describe(
            _TRAINED * _EPOCHS * _IMAGES / IMAGES, decode_hours=_EPOCHS * decode_hours
        ),
    }


def _describe(gpu_seconds: float, *, decode_hours: float = 0.0) -> dict[str, Any]:
    """Hours of a stage whose GPUs compute while its cores decode: those of the slower one."""
    bounds = {"GPUs, derived": gpu_seconds / 3600 / _GPUS, "decoding": decode_hours}
    slowest = max(bounds, key=lambda name: bounds[name])
    return {
        "gpu_hours": round(bounds[slowest] * _GPUS, 1),
        "hours": round(bounds[slowest], 2),
        "bound_by": slowest,
        "hours_of_decoding": round(decode_hours, 2),
    }


def _rate_of_stores(hours: float) -> float:
    """Gigabytes per second that all processes together read of the captions in `align`."""
    return _IMAGES * _EPOCHS * _LLM_WIDTH * NUMBER_BYTES / (hours * 3600) / 1e9
