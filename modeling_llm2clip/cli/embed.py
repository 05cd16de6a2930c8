"""`llm2clip embed`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .._extras import ONNX_RUNTIME, RAY, require
from ..configs.config_fields import DataConfig, ImageLimitsConfig
from ..configs.encoding_config import EmbedConfig
from .command import command
from .options import (
    read_captioned_images,
    report,
    require_applicable_options,
    require_data,
    require_model,
    use_device,
    use_image_limits,
)

if TYPE_CHECKING:
    from ..data.records.record_table import RecordTable


@command(
    group="Use",
    examples=(
        "llm2clip embed aligned/model my-images image-embeddings --modality image",
        "llm2clip embed aligned/model my-images text-embeddings --modality text --columns text "
        "--dtype int8",
        "llm2clip embed aligned/model my-images image-embeddings --modality image --partition 2/8",
    ),
)
def embed(
    model: str,
    data: str,
    output: Path,
    /,
    *,
    modality: Literal["text", "image"],
    partition: str | None = None,
    engine: Literal["local", "ray"] = "local",
    reading: DataConfig,
    limits: ImageLimitsConfig,
    config: EmbedConfig,
) -> int:
    """Writes embeddings for a vector database to Parquet files.

    Resumes an interrupted run, and checks the files of a finished one.

    Args:
        model: Hub id or folder of an LLM2CLIP model; with --backend onnx, of its ONNX export.
        data: Captioned images: folder, *.parquet, *.tar, COCO *.json. With --modality image,
            captions are optional and a plain folder of images works. With --modality text, images
            are optional and a file of texts (also *.csv) works.
        output: Output folder, new or from an interrupted run.
        modality: What to embed: captions (text) or images (image). Required.
        partition: Part of the output to write, such as 2/8 for the second of eight. Parts can run
            in parallel on machines that share the folder; the last to finish completes the output.
            Default: all.
        engine: Where to compute: in this run's processes (local) or in the actors of a Ray cluster
            (ray).
        reading: Options for reading the data.
        limits: Limits on the images to decode.
        config: Options for computing and storing the embeddings.
    """
    from ..embedding.embedding_manifest import EmbeddingManifest
    from ..embedding.encoding_plan import plan_encoding

    require_applicable_options(config, modality)
    if config.skip_invalid and reading.check_images:
        raise ValueError(
            "--check-images stops at an invalid image, so it cannot be combined with "
            "--skip-invalid. "
            "Remove one of them."
        )
    needs = [RAY] if engine == "ray" else []
    if config.backend == "onnx":
        require(*needs, ONNX_RUNTIME)
        from ..model_folders.onnx_folder import find_onnx_folder

        model = str(find_onnx_folder(model))
    else:
        require_model(model, *needs)
    require_data(data, reading)
    use_image_limits(limits)
    plan = plan_encoding(
        EmbeddingManifest, model, output, config,
        modality=modality, partition=partition, engine=engine,
    )  # fmt: skip
    use_device(config.device, config.precision)
    from accelerate import PartialState

    from ..embedding.embed import describe_embeddings, run_embed

    records = _read_records(data, reading, config, modality)
    run_embed(plan, records, report=report, source=data)
    if PartialState().is_main_process:
        print("\n".join(describe_embeddings(output)))
    PartialState().destroy_process_group()
    return 0


def _read_records(
    data: str,
    reading: DataConfig,
    config: EmbedConfig,
    modality: Literal["text", "image"],
) -> RecordTable:
    """Read captioned images, or list the images of a folder without captions."""
    from ..data.records.source_files import is_source

    if modality == "text" or not Path(data).is_dir() or is_source(Path(data)):
        return read_captioned_images(
            data,
            reading,
            require_images=modality == "image",
            modality=modality,
            show_progress=config.show_progress,
        )
    from ..search.image_files import records_from_images

    if reading.image_dir is not None:
        raise ValueError(
            f"--image-dir: {data} is a folder of images without a captions file. Remove the "
            "option, or pass data that list the images."
        )
    return records_from_images(
        data,
        check_images=reading.check_images,
        skip_invalid=config.skip_invalid,
        show_progress=config.show_progress,
        report=report,
    )
