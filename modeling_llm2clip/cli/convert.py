"""`llm2clip convert`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from cyclopts import Parameter

from .._extras import TIMM_TOWER, require
from ..configs.build_config import BuildConfig
from ..configs.config_fields import Config
from ..configs.export_config import ConvertConfig
from ..configs.source_format import SourceFormat
from ..conversion.layouts import LAYOUTS, require_options
from .command import Repeated, command
from .options import use_device

_LLM2VEC = "llm2vec"
_NOT_FOR_LLM2VEC = ("file", "revision", "text_revision", "llm_lora", "components", "max_shard_size")
# Options that an LLM2Vec folder leaves open.
_CHANGES_OF_LLM2VEC = {"prompt", "prompt_prefix", "prompt_suffix", "normalize_text_before_adapter"}
if TYPE_CHECKING:
    FormatName: TypeAlias = str
else:
    FormatName = Literal[(*LAYOUTS, _LLM2VEC)]


@dataclass(frozen=True, kw_only=True, init=False)
class FormatChanges(SourceFormat):
    """Flags for the fields of a source format; `chosen` has those on the command line."""

    layout: Annotated[str, Parameter(parse=False)] = ""
    chosen: Annotated[dict[str, Any], Parameter(parse=False)] = field(default_factory=dict)

    def __init__(self, **chosen: Any) -> None:
        object.__setattr__(self, "chosen", chosen)


_FLAGS = Parameter(
    name="*", group="Source format options", show_default=lambda _: "the source format's"
)


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Config):
    """Which files are converted."""

    file: str | None = None
    """Weight file inside a Hub repository or folder. Default: the only one."""
    revision: str | None = None
    """Branch, tag or commit of the checkpoint's Hub repository. Default: its main branch."""
    text_model: str | None = None
    """Hub id or folder of the language model, or of the base model of a LoRA. No default; required
    unless the source is a merged llm2vec folder."""
    text_revision: str | None = None
    """Branch, tag or commit of the language model's Hub repository. Default: its main branch."""
    llm_lora: Annotated[tuple[str, ...], Repeated] = ()
    """LoRA to merge: folder, ID or ID@REVISION; repeatable. Default: none."""
    accept_lora_base: str | None = None
    """Name that the LoRA uses for this language model. Default: the language model's own name."""
    vision_model: str | None = None
    """Vision tower of a new model, only for llm2vec. No default; required there."""


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
    source: SourceConfig,
    changes: Annotated[FormatChanges, _FLAGS] = FormatChanges(),  # has no state
    config: ConvertConfig,
) -> int:
    """Converts a checkpoint of another project to a model folder.

    Args:
        checkpoint: Weight file, folder or Hub id.
        output: Folder to write.
        source_format: Family of the checkpoint, with the properties that its weights do not record;
            llm2vec for an LLM2Vec folder as text tower of a new model. No default, required.
        source: Files to convert.
        changes: Changes to the source format for this checkpoint.
        config: What to write.
    """
    from ..data.atomic_files import require_new_folder

    require_new_folder(output)
    if source_format == _LLM2VEC:
        return _build(checkpoint, output, source, changes.chosen, config)
    layout = LAYOUTS[source_format]
    require(*([TIMM_TOWER] if layout.needs_timm else []))
    if source.text_model is None or source.vision_model is not None:
        raise ValueError(
            "A checkpoint is converted with its language model: give --text-model, and no "
            "--vision-model."
        )
    fields = changes.chosen
    require_options(layout, fields)
    if "prompt_prefix" in fields or "prompt_suffix" in fields:
        fields = {"prompt": None, **fields}
    chosen = replace(layout.source_format, **fields)
    config = replace(config, device=str(use_device(config.device)))
    from ..conversion.convert_checkpoint import convert_checkpoint
    from ..conversion.source_checkpoint import CheckpointSource, LLMSource
    from ..model_folders.model_folder import RECORD_FILE

    folder = convert_checkpoint(
        CheckpointSource(checkpoint, source.file, source.revision),
        LLMSource(
            source.text_model,
            source.text_revision,
            source.llm_lora,
            source.accept_lora_base,
        ),
        output,
        chosen,
        config,
    )
    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    for reason, keys in sorted(record["dropped"].items()):
        print(f"left out, {reason}: {', '.join(keys)}")
    print(
        f"Wrote {folder} with {record['num_parameters']:,} parameters. All checks passed, and "
        f"golden embeddings are recorded. Check any copy with: llm2clip doctor {output}"
    )
    return 0


def _build(
    folder: str, output: Path, source: SourceConfig, changes: dict[str, Any], config: ConvertConfig
) -> int:
    if source.vision_model is None:
        raise ValueError("An LLM2Vec folder becomes the text tower of a new model: give "
                         "--vision-model.")  # fmt: skip
    _refuse_unused(source, changes, config)
    building = BuildConfig(
        **changes,
        accept_lora_base=source.accept_lora_base,
        dtype=config.dtype,
        device=str(use_device(config.device)),
    )
    building.require_prompt()

    from ..conversion.llm2vec import build_from_llm2vec

    build_from_llm2vec(
        source.vision_model, Path(folder), output, building, base=source.text_model, card=config
    )
    print(f"Wrote {output}. Text adapter and projections are random: align it before use.")
    return 0


def _refuse_unused(source: SourceConfig, changes: dict[str, Any], config: ConvertConfig) -> None:
    """Raise ValueError for options that an LLM2Vec folder decides itself."""
    chosen = (*source.list_given(), *config.list_given())
    unused = [name for name in chosen if name in _NOT_FOR_LLM2VEC]
    if unused := [*unused, *(name for name in changes if name not in _CHANGES_OF_LLM2VEC)]:
        raise ValueError(
            f"The source format llm2vec has no use for {', '.join(f'`{n}`' for n in unused)}. The "
            "folder sets the pooling and length of texts, the vision tower sets how images are "
            "prepared, and the whole model is written, in files of the usual size. Leave them out. "
            "For another revision, download it and give its folder."
        )
