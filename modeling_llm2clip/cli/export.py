"""`llm2clip export`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .._extras import ONNX_EXPORT, require
from .._suggestions import escape_controls
from ..configs.config_fields import ImageLimitsConfig
from ..configs.export_config import ExportConfig
from .command import command
from .options import require_model, use_device, use_image_limits


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
) -> int:
    """Exports a model or one of its towers, in another dtype, as ONNX graphs or with a new card.

    Args:
        model: Hub id or folder of an LLM2CLIP model.
        output: Output folder.
        limits: Limits on the images of `onnx_data` to decode.
        config: Card, dtype and format of the exported model.
        revision: Branch, tag or commit of the Hub repository. Default: the main branch.
    """
    require_model(model, revision=revision)
    from ..data.atomic_files import require_new_folder

    require_new_folder(output)
    if (unused := limits.list_given()) and not config.onnx:
        named = ", ".join(f"`{name}`" for name in unused)
        raise ValueError(f"{named} only applies to --onnx, which reads images. Remove it.")
    use_image_limits(limits)
    if config.onnx:
        require(*ONNX_EXPORT)
    else:
        config = replace(config, device=str(use_device(config.device)))
    from ..publishing.export_model import export_model

    folder = export_model(model, output, config, revision=revision)
    following = f"Next: llm2clip doctor {folder}"
    if config.components == "vision-tower":
        following = "Load it with AutoModel, or pass its config to LlavaConfig(vision_config=…)."
    elif config.onnx:
        following = _describe_graphs(folder)
    print(escape_controls(f"Wrote {folder}. {following}"))
    return 0


def _describe_graphs(folder: Path) -> str:
    from ..model_folders.onnx_folder import read_onnx_record
    from ..publishing.onnx_export import describe_check

    record = read_onnx_record(folder)
    lines = [f"Opset {record['opset']}, IR {record['ir_version']}; {record['checked_on']}:"]
    for file, graph in record["graphs"].items():
        checked = describe_check(graph["check"])
        lines.append(f"{file}: {graph['weights']}, {graph['size_mb']} MB; {checked}")
        if reason := graph.get("fixed_size_because"):
            lines.append(f"  Fixed image size: {reason}")
    if record["script"] is not None:
        lines.append(f"No encode.py: {record['script']}")
    return "\n".join(lines)
