"""Final embeddings of a dataset into Parquet files, for vector databases.

`extract` stores the embeddings of a tower, for training; these are projected, of unit length, and
ready to be compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from .._suggestions import counted
from ..configs.encoding_config import EmbedConfig
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import hash_json
from ..data.records.data_hashes import hash_columns, hash_images, hash_texts
from ..data.records.record_table import RecordTable
from ..data.records.records import CaptionedImage, Modality
from ..model_folders.fingerprint import describe_prompt, fingerprint_embeddings
from ..model_folders.model_loading import require_trained
from ..model_folders.model_writing import Source, StageSource, open_source
from ..model_folders.onnx_folder import fingerprint_graph
from ..model_folders.training_images import ImageTally, describe_far_images
from ..processing_llm2clip import LLM2CLIPProcessor
from ..scheduling.processes import choose_device
from .embedding_manifest import EmbeddingManifest
from .parquet_writer import (
    ImageRows,
    ParquetWriter,
    TextRows,
    count_values,
    measure_ranges,
    require_same_limits,
    truncate_embeddings,
)
from .shard_computation import (
    Engine,
    Prepare,
    compute_partition,
    make_shard_worker,
    open_stops,
    parse_partition,
)
from .shard_encoding import ShardEncoder, load_shard_encoder
from .sharded_writer import Array, begin_or_continue

_SHOWN = 5
_OF_TEXTS = {"text", "name", "lang", "captions", "long_captions"}  # columns of `hash_texts`


def embed(
    source: Source,
    data: Sequence[CaptionedImage],
    output: str | Path,
    config: EmbedConfig | None = None,
    *,
    modality: Modality,
    partition: str | None = None,
    engine: Engine = "local",
    report: Callable[[str], object] | None = None,
) -> Path:
    """Write the embeddings of all captions or images to Parquet files, or continue to.

    Each file has the columns `id`, `embedding` (a list of fixed size) and those of
    `config.columns`. Its schema's metadata has under `llm2clip` a JSON object with the model's
    fingerprint, prompt, dtype, dimensions and int8 ranges. `_manifest.json` has a checksum of each
    file.

    Args:
        source: Folder or Hub id of an LLM2CLIP model, or a loaded (model, processor); with
            `config.backend` onnx, a folder of ONNX graphs.
        data: Records.
        output: Folder of the files: new, empty, or of the same output, which is continued and
            whose files are checked.
        config: Options; None for the defaults. `token_budget` is for texts alone, `batch_size`,
            `num_workers` and `skip_invalid` for images alone.
        modality: What is embedded: text or image.
        partition: Which part of the files to write, such as 2/8 for the second of eight; the last
            part to end completes the output. None for all of them.
        engine: What computes: the processes of this run, or the actors of a Ray cluster that sees
            the same files.
        report: Called with what is said of images that are unlike those that the model was trained
            on, once per run, of the images that this run encoded; never under Ray. Default: it is
            warned of.

    Returns:
        `output`.

    Raises:
        ValueError: No captions or images, or broken ones; the model is not trained; the dtype or
            `truncate_dim` does not fit it; or `output` has embeddings of another model, prompt,
            dataset or option, with both values, or damaged files.
        FileExistsError: `output` holds other files.
        OSError: `output` cannot be written, before anything is read; the disk is full, and what is
            written stays.
        StageInterrupt: SIGINT or SIGTERM stopped the run after a batch.
        RuntimeError: An actor of Ray failed again and again.

    Examples:
        >>> records = load_records("my-images")
        >>> config = EmbedConfig(dtype="float16", columns=("image_file",))
        >>> folder = embed("my-model", records, "embeddings", config, modality="image")
    """
    parse_partition(partition)
    config, output = config or EmbedConfig(), Path(output)
    EmbeddingManifest.require_folder(output)
    records = RecordTable.from_records(data)
    rows = _open_rows(records, config, modality)
    device = choose_device(config.device)
    with open_stops(engine) as stop, open_source(source, output) as found:
        model_config = LLM2CLIPConfig.from_pretrained(found.folder)
        require_trained(model_config, purpose="embed", source=found.name)
        encoder = load_shard_encoder(found.folder, modality, config, device)
        planned = _plan_output(found, modality, records, len(rows), encoder, config)
        with PartialState().main_process_first():
            begin = partial(_add_ranges, planned, encoder, rows, config)
            begun = begin_or_continue(output, planned, begin)
            if modality == "image":
                require_same_limits(output, skip_invalid=config.skip_invalid)
        writer = ParquetWriter(
            output, begun, rows, model_dim=encoder.dim, skip_invalid=config.skip_invalid
        )
        make_worker = partial(_make_worker, found.folder, writer, config)
        compute_partition(
            writer,
            partial(_prepare_rows, rows, encoder),
            config,
            name=f"embed {modality}",
            unit=" texts" if modality == "text" else " images",
            partition=partition,
            stop=stop,
            make_worker=make_worker if engine == "ray" else None,
            finish=writer.finish,
        )
        if modality == "image":
            _report_far(encoder, found.folder, report or _warn)
    return output


def _report_far(encoder: ShardEncoder, folder: Path, report: Callable[[str], object]) -> None:
    """Report images of all processes that are unlike those that the model was trained on."""
    tally = ImageTally()
    for of_process in gather_object([encoder.tally]):
        tally.join(of_process)
    far = describe_far_images(folder, tally)
    if far and PartialState().is_main_process:
        report(far)


def _open_rows(
    records: RecordTable, config: EmbedConfig, modality: Modality
) -> TextRows | ImageRows:
    """List what an output has a row for."""
    if modality == "text":
        return TextRows(records, config.columns, rows_per_shard=config.rows_per_shard)
    if modality != "image":
        raise ValueError(f"modality={modality!r} must be text or image.")
    if "text" in config.columns:
        raise ValueError("columns: text is for modality text alone. Give captions.")
    return ImageRows(records, config.columns)


def _plan_output(
    model: StageSource,
    modality: Modality,
    records: RecordTable,
    num_rows: int,
    encoder: ShardEncoder,
    config: EmbedConfig,
) -> EmbeddingManifest:
    """Make the manifest of an output that is not begun."""
    dim = config.truncate_dim or encoder.dim
    if dim > encoder.dim:
        raise ValueError(
            f"truncate_dim={dim} is more than the {encoder.dim} dimensions of the model. Give "
            "fewer, or leave it out."
        )
    count_values(dim, config.dtype)
    plan = {**encoder.plan, "data": hash_texts(records)}
    if modality == "image":
        plan["images"] = hash_images(records)
    if others := sorted(set(config.columns) - _OF_TEXTS):
        plan["values of columns"] = hash_columns(records, others)
    if config.dtype == "int8":
        plan["int8_ranges"] = (
            f"of a sample of {config.calibration_size}"
            if config.int8_ranges is None
            else hash_json(_read_ranges(config.int8_ranges).tolist())
        )
    if config.backend == "onnx":
        fingerprint = fingerprint_graph(model.folder, modality, config.text_weights)
    else:
        fingerprint = fingerprint_embeddings(model.folder, modality)
    return EmbeddingManifest(
        modality=modality,
        model=model.name,
        fingerprint=fingerprint,
        prompt=_write_prompt(model.folder) if modality == "text" else "",
        dtype=config.dtype,
        dim=dim,
        columns=config.columns,
        num_rows=num_rows,
        rows_per_shard=config.rows_per_shard,
        plan=plan,
    )


def _make_worker(folder: Path, writer: ParquetWriter, config: EmbedConfig) -> Callable[[int], None]:
    """Load the tower that is needed, for files that something else hands out."""
    modality = writer.manifest.modality
    encoder = load_shard_encoder(folder, modality, config, choose_device(config.device))
    return make_shard_worker(writer, _prepare_rows(writer.rows, encoder))


def _prepare_rows(rows: TextRows | ImageRows, encoder: ShardEncoder) -> Prepare:
    return lambda of_shard: encoder.prepare(rows.read_inputs(of_shard))


def describe_embeddings(output: Path) -> list[str]:
    """Describe an output in lines for a terminal."""
    manifest = EmbeddingManifest.read(output)
    files = map(manifest.name_shard, range(manifest.num_shards))
    there = sum((output / file).is_file() for file in files)
    if not manifest.complete or there < manifest.num_shards:
        return [
            f"{there} of {manifest.num_shards} files are in {output}. The last partition to end "
            "completes the output."
        ]
    shards = manifest.shards
    num_rows = sum(shard.rows for shard in shards)
    lines = [
        f"Wrote {output}: {counted(num_rows, 'embedding')} of {manifest.dim} dimensions in "
        f"{manifest.dtype}, {counted(len(shards), 'file')}."
    ]
    if skipped := [name for shard in shards for name in shard.skipped]:
        names = ", ".join(skipped[:_SHOWN]) + (", …" if len(skipped) > _SHOWN else "")
        lines.append(f"Skipped {counted(len(skipped), 'undecodable image')}: {names}.")
    if truncated := sum(shard.num_truncated for shard in shards):
        lines.append(f"Truncated {counted(truncated, 'text')} to the tokens that the model reads.")
    if clipped := sum(shard.num_clipped for shard in shards):
        share = clipped / (num_rows * manifest.dim)
        lines.append(f"{share:.2%} of the values were outside the int8 ranges, and were clipped.")
    return lines


def _add_ranges(
    planned: EmbeddingManifest,
    encoder: ShardEncoder,
    rows: TextRows | ImageRows,
    config: EmbedConfig,
) -> EmbeddingManifest:
    """Measure the int8 ranges, or read those of another output."""
    if config.dtype != "int8":
        return planned
    if config.int8_ranges is None:
        sample = encoder.encode_sample(rows.sample(config.calibration_size))
        if not len(sample):
            raise ValueError(
                "No image of the sample can be decoded. Repair them, or give a larger "
                "calibration_size."
            )
        ranges = measure_ranges(truncate_embeddings(sample, planned.dim))
    else:
        ranges = _read_ranges(config.int8_ranges)
        if ranges.shape[1] != planned.dim:
            raise ValueError(
                f"int8_ranges={config.int8_ranges} has ranges of {ranges.shape[1]} dimensions, and "
                f"{planned.dim} are wanted. Give another output, or the same truncate_dim."
            )
    return replace(planned, ranges=tuple(map(tuple, ranges.tolist())))


def _read_ranges(folder: Path) -> Array:
    ranges = EmbeddingManifest.read(folder).read_ranges()
    if ranges is None:
        raise ValueError(f"int8_ranges={folder} has no int8 ranges: it was not written as int8.")
    return ranges


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _write_prompt(folder: Path) -> str:
    """Write the prompt as text, with {text} for the caption."""
    config = LLM2CLIPConfig.from_pretrained(folder)
    tokenizer = LLM2CLIPProcessor.from_pretrained(folder).tokenizer
    prefix, suffix = describe_prompt(tokenizer.backend_tokenizer, config)
    return f"{prefix}{{text}}{suffix}"
