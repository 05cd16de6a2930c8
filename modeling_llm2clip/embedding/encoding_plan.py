"""Check the options of `extract` and `embed`, before torch is imported or data are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeAlias, TypeVar

from ..configs.encoding_config import EmbedConfig, ExtractConfig
from ..data.records.records import Modality
from ..data.store.store_manifest import ShardedManifest
from ..encoding.devices import find_device, require_compiler
from ..model_folders.model_folder import find_model_folder

if TYPE_CHECKING:
    from ..model_folders.model_writing import Source

Engine: TypeAlias = Literal["local", "ray"]
_Config = TypeVar("_Config", EmbedConfig, ExtractConfig)


@dataclass(frozen=True)
class EncodingPlan(Generic[_Config]):
    """A run with checked options.

    Attributes:
        source: Model folder, Hub id, or loaded (model, processor).
        output: Output folder.
        config: Options.
        modality: Inputs to embed.
        part: Number of the partition to compute, from 1.
        num_parts: Number of partitions.
        engine: Where the shards are computed.
    """

    source: Source
    output: Path
    config: _Config
    modality: Modality
    part: int
    num_parts: int
    engine: Engine


def plan_encoding(
    manifest: type[ShardedManifest],
    source: Source,
    output: str | Path,
    config: _Config,
    *,
    modality: Modality,
    partition: str | None,
    engine: Engine,
) -> EncodingPlan[_Config]:
    """Check all options of a run; `manifest` is the class of the output's manifest."""
    if modality not in ("text", "image"):
        raise ValueError(f"modality={modality!r} must be text or image.")
    if modality == "image" and isinstance(config, EmbedConfig) and "text" in config.columns:
        raise ValueError(
            "columns: text cannot be combined with modality image. Use the column captions."
        )
    part, slash, count = ("1/1" if partition is None else partition).partition("/")
    if not (slash and part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise ValueError(f"partition={partition!r} must look like 2/8, the second of eight.")
    if config.precision == "bfloat16":  # every device has the other precisions
        find_device(config.device, precision=config.precision)
    if config.compile:
        require_compiler(find_device(config.device))
    manifest.require_folder(Path(output))
    if isinstance(source, str | Path):
        find_model_folder(source)
    return EncodingPlan(source, Path(output), config, modality, int(part), int(count), engine)
