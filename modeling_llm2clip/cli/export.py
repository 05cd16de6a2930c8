"""`llm2clip export`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .._extras import ONNX_EXPORT, require
from ..configs.data_config import ImageLimitsConfig
from ..configs.export_config import ExportConfig
from .command import command
from .options import require_model, use_device, use_image_limits

_OF_VISION_TOWER = {"components", "license", "device"}


@command(
    group="Publish",
    examples=(
        "llm2clip export aligned/model to-publish --license apache-2.0 --dtype bfloat16",
        "llm2clip export aligned/model vision-tower --components vision-tower",
        "llm2clip export aligned/model for-onnx --onnx --onnx-weights float32 int8",
    ),
)
def export(
    model: str,
    output: Path,
    /,
    *,
    limits: ImageLimitsConfig,
    config: ExportConfig,
    revision: str | None = None,
    dry_run: bool = False,
) -> int:
    """Exports a model in full or in part, in another dtype, as ONNX graphs or with a new card.

    Args:
        model: Hub id or folder of an LLM2CLIP model.
        output: Folder to write.
        limits: Which images of `onnx_data` are decoded.
        config: What to write.
        revision: Branch, tag or commit of a Hub repository. Default: its main branch.
        dry_run: Check the model, and list files and sizes; write nothing.
    """
    require_model(model, revision=revision)
    from ..model_folders.atomic_folder import require_new_folder

    is_tower = config.components == "vision-tower"
    if is_tower:
        _refuse_unused(config, dry_run=dry_run)
    if (given := limits.list_given()) and not config.onnx:
        named = ", ".join(f"`{name}`" for name in given)
        raise ValueError(f"{named} is for --onnx, which reads images. Leave it out.")
    use_image_limits(limits)
    require_new_folder(output)
    if config.onnx:
        return _export_onnx(model, output, config, revision, dry_run=dry_run)
    config = replace(config, device=str(use_device(config.device)))
    if dry_run:
        return _list_files(model, output, config, revision)
    from ..publishing.export_model import export_model

    folder = export_model(model, output, config, revision=revision)
    following = (
        "AutoModel and LlavaConfig(vision_config=…) take it unchanged."
        if is_tower
        else f"Next: llm2clip doctor {folder}"
    )
    print(f"Wrote {folder}. {following}")
    return 0


def _export_onnx(
    model: str, output: Path, config: ExportConfig, revision: str | None, *, dry_run: bool
) -> int:
    """Write ONNX graphs, and print how each was checked."""
    require(*ONNX_EXPORT)
    if dry_run:
        raise ValueError(
            "`dry_run` cannot check ONNX graphs, which have to be written. Leave it out."
        )
    from ..model_folders.onnx_folder import read_onnx_record
    from ..publishing.export_model import export_model
    from ..publishing.onnx_export import describe_check

    folder = export_model(model, output, config, revision=revision)
    record = read_onnx_record(folder)
    for file, graph in record["graphs"].items():
        sizes = ", ".join(f"{name} {shape}" for name, shape in graph["inputs"].items())
        print(f"{file}: {graph['weights']}, {graph['size_mb']} MB; {sizes}")
        print(f"  {describe_check(graph['check'])}")
        if reason := graph.get("fixed_size_because"):
            print(f"  Images of one size alone: {reason}")
    if record["script"] is not None:
        print(f"No encode.py: {record['script']}")
    print(
        f"Wrote {folder}: opset {record['opset']}, IR {record['ir_version']}, checked on "
        f"{record['checked_on']}."
    )
    return 0


def _refuse_unused(config: ExportConfig, *, dry_run: bool) -> None:
    unused = [name for name in config.list_given() if name not in _OF_VISION_TOWER]
    if unused := [*unused, *(["dry_run"] if dry_run else [])]:
        named = ", ".join(f"`{name}`" for name in unused)
        raise ValueError(f"--components vision-tower has no use for {named}. Leave it out.")


def _list_files(model: str, output: Path, config: ExportConfig, revision: str | None) -> int:
    from ..publishing.export_model import plan_export
    from ..publishing.push_to_hub import describe_files

    print(describe_files(plan_export(model, output, config, revision=revision)))
    print(
        f"Nothing was written to {output}. Sizes of weight files are exact but for their headers, "
        "the others are those in MODEL. Leave out --dry-run to write it."
    )
    return 0
