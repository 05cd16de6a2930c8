"""What an export would write, found out without writing anything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open

from .card_facts import require_own_results
from .export import COMPONENTS, ExportArguments, check_export
from .publish import PlannedFile, list_files, require_healthy

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64,  # the batches that a batch norm has counted
}  # fmt: skip


def plan_export(
    source: str | Path,
    folder: str | Path,
    arguments: ExportArguments,
    *,
    facts: Mapping[str, Any] | None = None,
    revision: str | None = None,
    device: str = "cpu",
) -> list[PlannedFile]:
    """Make the checks of `export_checkpoint` and `publish_folder` that need no written folder.

    Args:
        source: as `export_checkpoint` takes it, like the other arguments.
        folder: the folder that would be written.

    Returns:
        The files that would be written. Weights have the size of their tensors, other files that
        of the source's.

    Raises:
        ValueError: The source has no license or is not healthy.
        FileExistsError: `folder` exists and is not empty.
    """
    source, card_facts = check_export(source, folder, arguments, facts=facts, revision=revision)
    keeps_weights = arguments.components == "full" and arguments.dtype is None
    if keeps_weights and "results" in (facts or {}):
        require_own_results(card_facts.results, source)
    require_healthy(source, device=device)
    others = [file for file in list_files(source) if not _WEIGHTS.fullmatch(file.path)]
    return sorted([*_plan_weights(source, arguments), *others], key=lambda file: file.path)


def _plan_weights(source: Path, arguments: ExportArguments) -> list[PlannedFile]:
    """Split the weights as saving them would, from the headers of their files alone."""
    model_class = COMPONENTS[arguments.components]
    left_out = getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or ()
    weights = {}
    for file in sorted(path for path in source.iterdir() if _WEIGHTS.fullmatch(path.name)):
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                if any(re.search(pattern, name) for pattern in left_out):
                    continue
                part = opened.get_slice(name)
                dtype = _choose_dtype(part.get_dtype(), name, model_class, arguments.dtype)
                weights[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    split = split_torch_state_dict_into_shards(
        weights,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=arguments.max_shard_size,
    )
    return [
        PlannedFile(file, sum(weights[name].nbytes for name in names))
        for file, names in split.filename_to_tensors.items()
    ]


def _choose_dtype(saved: str, name: str, model_class: Any, wanted: str | None) -> torch.dtype:
    """Return the dtype that a tensor would be saved in."""
    dtype = _DTYPES.get(saved)
    if dtype is None:
        raise ValueError(f"{name} is saved as {saved}; an export takes {', '.join(_DTYPES)}.")
    keeps = any(part in name for part in model_class._keep_in_fp32_modules_strict or ())
    if wanted is None or keeps or not dtype.is_floating_point:
        return dtype
    chosen: torch.dtype = getattr(torch, wanted)
    return chosen
