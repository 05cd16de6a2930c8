"""`llm2clip convert`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from cyclopts import Parameter

from .._extras import TIMM_TOWER, require
from ..configs.export_config import ConvertConfig, SourceFormat
from ..conversion.layouts import LAYOUTS, require_options
from .command import Repeated, command
from .options import use_device

if TYPE_CHECKING:
    FormatName: TypeAlias = str
else:
    FormatName = Literal[(*LAYOUTS,)]


@dataclass(frozen=True, kw_only=True, init=False)
class FormatChanges(SourceFormat):
    """Flags that override fields of a source format; `chosen` has the flags that were passed."""

    layout: Annotated[str, Parameter(parse=False)] = ""
    normalize_text_before_adapter: Annotated[bool, Parameter(parse=False)] = True
    head_width: Annotated[int, Parameter(parse=False)] = 64
    chosen: Annotated[dict[str, Any], Parameter(parse=False)] = field(default_factory=dict)

    def __init__(self, **chosen: Any) -> None:
        object.__setattr__(self, "chosen", chosen)


_FLAGS = Parameter(
    name="*", group="Source format options", show_default=lambda _: "from the source format"
)


@command(
    group="Publish",
    examples=(
        "llm2clip convert microsoft/LLM2CLIP-Openai-L-14-336 model --source-format openai-hub "
        "--text-model microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned --dtype bfloat16",
    ),
)
def convert(
    checkpoint: str,
    output: Path,
    /,
    *,
    source_format: FormatName,
    text_model: str,
    file: str | None = None,
    llm_lora: Annotated[tuple[str, ...], Repeated] = (),
    changes: Annotated[FormatChanges, _FLAGS] = FormatChanges(),  # immutable
    config: ConvertConfig,
) -> int:
    """Converts a checkpoint of the official LLM2CLIP code to a model folder.

    Args:
        checkpoint: Weight file, folder, Hub id or ID@REVISION.
        output: Output folder.
        source_format: Checkpoint family, which sets the properties that the weights do not record,
            such as the prompt. Required.
        text_model: Language model: Hub id, ID@REVISION or folder. With --llm-lora, the LoRA's base
            model. Required.
        file: Name of the weight file in the Hub repository or folder. Default: the standard name,
            such as model.safetensors.
        llm_lora: LoRA to merge into the language model: folder, Hub id or ID@REVISION; repeatable.
            Default: none.
        changes: Options that override the source format for this checkpoint.
        config: License, dtype and components of the converted model.
    """
    from ..data.atomic_files import require_new_folder

    require_new_folder(output)
    layout = LAYOUTS[source_format]
    require(*([TIMM_TOWER] if layout.needs_timm else []))
    fields = changes.chosen
    require_options(layout, fields)
    if "prompt_prefix" in fields or "prompt_suffix" in fields:
        fields = {"prompt": None, **fields}
    chosen = replace(layout.source_format, **fields)
    config = replace(config, device=str(use_device(config.device)))
    from ..conversion.convert_checkpoint import convert_checkpoint
    from ..conversion.source_checkpoint import CheckpointSource, LLMSource, split_revision
    from ..model_folders.model_folder import RECORD_FILE

    name, revision = split_revision(checkpoint)
    folder = convert_checkpoint(
        CheckpointSource(name, file, revision),
        LLMSource(*split_revision(text_model), llm_lora),
        output,
        chosen,
        config,
    )
    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    for reason, keys in sorted(record["dropped"].items()):
        print(f"Dropped ({reason}): {', '.join(keys)}")
    print(
        f"Wrote {folder} with {record['num_parameters']:,} parameters. All checks passed, and "
        f"golden embeddings were saved. Check any copy with: llm2clip doctor {output}"
    )
    return 0
