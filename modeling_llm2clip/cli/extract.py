"""`llm2clip extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .._extras import RAY
from ..configs.config_fields import DataConfig, ImageLimitsConfig
from ..configs.encoding_config import ExtractConfig
from .command import command
from .options import (
    read_captioned_images,
    require_applicable_options,
    require_data,
    require_model,
    suggest_align,
    use_device,
    use_image_limits,
)


@command(
    group="Train",
    examples=(
        "llm2clip extract tuned/model my-images captions --modality text",
        "llm2clip extract tuned/model my-images images --modality image",
        "llm2clip extract tuned/model my-images captions --modality text --partition 2/8",
    ),
)
def extract(
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
    config: ExtractConfig,
) -> int:
    """Writes unprojected embeddings to a store for training (stage 2).

    Resumes an interrupted run. For align --inherit-from, pass a CLIP model as MODEL: the store
    then holds the embeddings of its text encoder.

    Args:
        model: Hub id or folder of an LLM2CLIP model. With --modality text, also a CLIP, SigLIP or
            similar model, whose text encoder is the teacher in align.
        data: Captioned images: folder, *.parquet, *.tar, COCO *.json; or URLs of shards.
        output: Folder of the store, new or from an interrupted run.
        modality: What to embed: captions (text) or images (image). Required.
        partition: Part of the store to write, such as 2/8 for the second of eight. Parts can run in
            parallel on machines that share the folder; the last to finish completes the store.
            Default: all.
        engine: Where to compute: in this run's processes (local) or in the actors of a Ray cluster
            (ray).
        reading: Options for reading the data.
        limits: Limits on the images to decode.
        config: Options for computing and storing the embeddings.
    """
    from ..data.store.store_manifest import StoreManifest
    from ..embedding.encoding_plan import plan_encoding

    require_applicable_options(config, modality)
    needs = [RAY] if engine == "ray" else []
    require_model(model, *needs, or_teacher=modality == "text")
    require_data(data, reading)
    use_image_limits(limits)
    plan = plan_encoding(
        StoreManifest, model, output, config,
        modality=modality, partition=partition, engine=engine,
    )  # fmt: skip
    use_device(config.device, config.precision)
    from accelerate import PartialState

    from ..embedding.extract import describe_extraction, run_extract

    records = read_captioned_images(
        data, reading, require_images=modality == "image", show_progress=config.show_progress
    )
    run_extract(plan, records, source=data)
    state = PartialState()
    if state.is_main_process:
        print("\n".join(describe_extraction(output)))
        manifest = StoreManifest.read(output)
        if manifest.complete:
            print(f"Next: {suggest_align(model, data, output, manifest.content)}")
    state.destroy_process_group()
    return 0
