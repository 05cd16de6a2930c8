"""`llm2clip extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from .._extras import RAY
from ..configs.data_config import DataConfig, ImageLimitsConfig
from ..configs.encoding_config import ExtractConfig
from .command import command
from .options import (
    read_captioned_images,
    refuse_foreign_options,
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
    """Extracts unprojected embeddings into a store, for training (stage 2).

    Continues an interrupted store. The text encoder of a CLIP gives what --inherit-from of align
    takes.

    Args:
        model: Hub id or folder of a model that build, finetune-llm or export wrote; or of a CLIP,
            SigLIP or the like, whose own text encoder is the teacher of align.
        data: Captioned images: folder, *.parquet, *.tar, COCO *.json, or shards at URLs.
        output: Folder of the store, new or from an interrupted run.
        modality: Modality to embed: the captions or the images. No default, required.
        partition: Part of the store to compute, such as 2/8 for the second of eight. Parts may run
            at the same time on machines that share the folder; the last one to finish completes the
            store. Default: all.
        engine: Where to compute: in the processes of this run, or in the actors of a Ray cluster.
        reading: How the data are read.
        limits: Which images are decoded.
        config: How to compute and store embeddings.
    """
    from ..data.store.store_manifest import StoreManifest
    from ..embedding.encoding_plan import plan_encoding

    refuse_foreign_options(config, modality)
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
            hint = suggest_align(model, data, output, manifest.content)
            print(f"Align a model on it: {hint}")
    state.destroy_process_group()
    return 0
