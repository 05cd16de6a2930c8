"""Write the final embeddings of a dataset to Parquet files, for vector databases.

`extract` stores a tower's embeddings, for training. The embeddings here are projected and scaled to
unit length, ready to compare.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from .._suggestions import counted, list_first
from ..configs.encoding_config import EmbedConfig
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import hash_json
from ..data.records.data_hashes import hash_columns, hash_images, hash_texts
from ..data.records.record_table import RecordTable
from ..data.records.records import CaptionedImage, Modality
from ..data.sealed_manifest import list_differences
from ..image_loading_llm2clip import get_image_limits
from ..model_folders.fingerprint import describe_prompt, fingerprint_embeddings
from ..model_folders.model_loading import require_trained
from ..model_folders.model_writing import Source, StageSource, open_source
from ..model_folders.onnx_folder import fingerprint_graph
from ..model_folders.training_images import ImageTally, describe_far_images
from ..processing_llm2clip import LLM2CLIPProcessor
from ..scheduling.processes import choose_device
from .embedding_manifest import EmbeddingManifest
from .encoding_plan import EncodingPlan, Engine, plan_encoding
from .input_rows import ImageRows, InputRows, TextRows, require_inputs
from .parquet_writer import (
    ParquetWriter,
    count_values,
    measure_ranges,
    truncate_embeddings,
)
from .shard_computation import (
    ShardWork,
    compute_partition,
    name_unreadable_images,
    open_stops,
)
from .shard_encoding import ShardEncoder, load_shard_encoder
from .sharded_writer import begin_output, describe_missing, read_begun

_CALIBRATION_SIZE = 1024  # records in the sample that measures int8 ranges
_OF_TEXTS = {"text", "name", "lang", "captions", "long_captions"}  # columns in `hash_texts`


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
    """Write the embeddings of all captions or images to Parquet files, or resume writing.

    Each file has the columns `id` and `embedding` (a fixed-size list), and the columns listed in
    `config.columns`. The key `llm2clip` of each file's schema metadata holds a JSON object with the
    model's fingerprint, prompt, dtype, dimensions and int8 ranges. `_manifest.json` holds a
    checksum of each file.

    Args:
        source: Folder or Hub id of an LLM2CLIP model, or a loaded (model, processor); with
            `config.backend` onnx, a folder of ONNX graphs.
        data: Records.
        output: Folder for the files: new, empty, or an unfinished output of the same run, whose
            files are checked before the run resumes.
        config: Options; None for the defaults. `jpeg_decoding` and `skip_invalid` apply only
            to images.
        modality: What to embed: text or image.
        partition: Which part of the files to write, such as 2/8 for the second of eight; the last
            part to finish completes the output. None for all files.
        engine: Where to compute: in the processes of this run, or in the actors of a Ray cluster
            that sees the same files.
        report: Called at most once per run, with a message, if the images that this run encoded
            are unlike the model's training images; never called with Ray. None to warn instead.

    Returns:
        `output`.

    Raises:
        ValueError: No captions or images; the model is not trained; the dtype or `truncate_dim`
            does not fit it; or `output` is damaged, or was made with another model, prompt, dataset
            or option (the message shows both values).
        DataValidationError: Images cannot be decoded. The first one triggers a check that names
            all of them. Repair or remove them, and embed into a new folder.
        FileExistsError: `output` holds other files.
        OSError: `output` is not writable (checked before anything is read), or the disk is full
            (finished files stay).
        StageInterrupt: SIGINT or SIGTERM stopped the run after a batch.
        RuntimeError: A Ray actor failed repeatedly.

    Examples:
        >>> records = load_records("my-images")
        >>> config = EmbedConfig(dtype="float16", columns=("image_file",))
        >>> folder = embed("my-model", records, "embeddings", config, modality="image")
    """
    plan = plan_encoding(
        EmbeddingManifest, source, output, config or EmbedConfig(),
        modality=modality, partition=partition, engine=engine,
    )  # fmt: skip
    return run_embed(plan, data, report=report)


def run_embed(
    plan: EncodingPlan[EmbedConfig],
    data: Sequence[CaptionedImage],
    *,
    report: Callable[[str], object] | None = None,
    source: str = "The dataset",
) -> Path:
    """Write a planned output and return its folder. Errors call the data `source`."""
    config, output, modality = plan.config, plan.output, plan.modality
    records = RecordTable.from_records(data)
    require_inputs(records, modality)
    rows = (
        TextRows(records, config.rows_per_shard, columns=config.columns)
        if modality == "text"
        else ImageRows(records, config.columns)
    )
    device = choose_device(config.device)
    with open_stops(plan.engine) as stop, open_source(plan.source, output) as model:
        model_config = LLM2CLIPConfig.from_pretrained(model.folder)
        require_trained(model_config, purpose="embed", source=model.name)
        encoder = load_shard_encoder(model.folder, modality, config, device)
        planned = _plan_output(model, modality, records, len(rows), encoder, config)
        with PartialState().main_process_first():
            if not planned.is_begun(output):
                with name_unreadable_images(rows, source=source):
                    begun = _add_ranges(planned, encoder, rows, config)
                begin_output(output, begun)
            begun = read_begun(output, planned)
        work = ShardWork(ParquetWriter(output, begun, rows), encoder, rows)
        compute_partition(plan, work, model.folder, stop=stop, source=source)
        if modality == "image":
            _report_far(encoder, model.folder, report or partial(warnings.warn, stacklevel=4))
    return output


def _report_far(encoder: ShardEncoder, folder: Path, report: Callable[[str], object]) -> None:
    """Report if the images that all processes encoded are unlike the model's training images."""
    encoded, tally = encoder.tally, ImageTally()
    for part in gather_object([ImageTally(encoded.num_images, encoded.total)]):
        tally.join(part)
    far = describe_far_images(folder, tally)
    if far and PartialState().is_main_process:
        report(far)


def _plan_output(
    model: StageSource,
    modality: Modality,
    records: RecordTable,
    num_rows: int,
    encoder: ShardEncoder,
    config: EmbedConfig,
) -> EmbeddingManifest:
    """Make the manifest of an output that has not been started."""
    dim = config.truncate_dim or encoder.dim
    if dim > encoder.dim:
        raise ValueError(
            f"truncate_dim={dim} exceeds the model's {encoder.dim} dimensions. Choose a smaller "
            "one, or leave it out."
        )
    count_values(dim, config.dtype)
    plan = {**encoder.plan, "data": hash_texts(records)}
    if modality == "image":
        plan["images"] = hash_images(records)
        plan["image limits"] = json.dumps(asdict(get_image_limits()), sort_keys=True)
    if others := sorted(set(config.columns) - _OF_TEXTS):
        plan["values of columns"] = hash_columns(records, others)
    if config.dtype == "int8":
        plan["int8_ranges"] = (
            f"of a sample of {_CALIBRATION_SIZE}"
            if config.int8_ranges is None
            else hash_json(_read_ranges(config.int8_ranges))
        )
    if config.backend == "onnx":
        fingerprint = fingerprint_graph(model.folder, modality, config.text_weights)
    else:
        fingerprint = fingerprint_embeddings(model.folder, modality, encoder.encoder.processor)
    return EmbeddingManifest(
        modality=modality,
        model=model.name,
        fingerprint=fingerprint,
        prompt=(
            _write_prompt(model.folder, encoder.encoder.processor) if modality == "text" else ""
        ),
        dtype=config.dtype,
        dim=dim,
        columns=config.columns,
        num_inputs=num_rows,
        rows_per_shard=config.rows_per_shard,
        plan=plan,
    )


def describe_embeddings(output: Path) -> list[str]:
    """Return lines that describe an output, for a terminal."""
    manifest = EmbeddingManifest.read(output)
    if missing := describe_missing(output, manifest):
        return missing
    shards = manifest.shards
    num_rows = sum(shard.rows for shard in shards)
    lines = [
        f"Wrote {output}: {counted(num_rows, 'embedding')} of {manifest.dim} dimensions in "
        f"{manifest.dtype}, {counted(len(shards), 'file')}."
    ]
    if skipped := [name for shard in shards for name in shard.skipped]:
        names = list_first(skipped)
        lines.append(f"Skipped {counted(len(skipped), 'undecodable image')}: {names}.")
    if truncated := manifest.num_truncated:
        lines.append(f"Truncated {counted(truncated, 'text')} to the model's limit.")
    if clipped := sum(shard.num_clipped for shard in shards):
        share = clipped / (num_rows * manifest.dim)
        lines.append(f"{share:.2%} of the values were clipped to the int8 ranges.")
    return lines


def _add_ranges(
    planned: EmbeddingManifest,
    encoder: ShardEncoder,
    rows: InputRows,
    config: EmbedConfig,
) -> EmbeddingManifest:
    """Return the manifest with int8 ranges, which are measured or read from another output."""
    if config.dtype != "int8":
        return planned
    if config.int8_ranges is None:
        sample = encoder.encode_sample(rows.sample(_CALIBRATION_SIZE))
        if not len(sample):
            raise ValueError(
                f"int8 ranges cannot be measured, because none of {_CALIBRATION_SIZE} sampled "
                "images can be decoded. Repair the images, or choose another dtype."
            )
        measured = measure_ranges(truncate_embeddings(sample, planned.dim))
        return replace(planned, ranges=tuple(map(tuple, measured.tolist())))
    ranges = _read_ranges(config.int8_ranges)
    if differences := list_differences(
        _list_causes_of_ranges(EmbeddingManifest.read(config.int8_ranges)),
        _list_causes_of_ranges(planned),
    ):
        raise ValueError(
            f"int8_ranges={config.int8_ranges} was measured on different embeddings: "
            f"{'; '.join(differences)}. Use an output with the same model, modality, truncate_dim "
            "and JPEG decoding."
        )
    return replace(planned, ranges=ranges)


def _list_causes_of_ranges(manifest: EmbeddingManifest) -> dict[str, object]:
    return {
        **manifest.fingerprint,
        "modality": manifest.modality,
        "dimensions": manifest.dim,
        "jpeg decoding": manifest.plan.get("jpeg decoding"),
    }


def _read_ranges(folder: Path) -> tuple[tuple[float, ...], ...]:
    ranges = EmbeddingManifest.read(folder).ranges
    if ranges is None:
        raise ValueError(f"int8_ranges={folder} has no int8 ranges, because its dtype is not int8.")
    return ranges


def _write_prompt(folder: Path, processor: LLM2CLIPProcessor) -> str:
    """Return the prompt as text, with {text} in place of the caption."""
    config = LLM2CLIPConfig.from_pretrained(folder)
    prefix, suffix = describe_prompt(processor.tokenizer.backend_tokenizer, config)
    return f"{prefix}{{text}}{suffix}"
