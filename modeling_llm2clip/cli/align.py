"""`llm2clip align`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._extras import LORA, require
from ..configs.align_config import AlignConfig
from ..configs.config_fields import DataConfig, ImageLimitsConfig
from .command import command
from .options import (
    name_data,
    read_captioned_images,
    require_data,
    stream_captioned_images,
    use_device,
    use_image_limits,
)

if TYPE_CHECKING:
    from ..data.records.records import CaptionedImage
    from ..data.streams.record_streams import RecordStream


# Titles and order of the fields of `AlignConfig` in the help.
SECTIONS = {
    "What is trained": (
        "vision_training", "text_training", "lock_text", "loss", "max_steps", "num_train_epochs",
        "global_batch_size", "learning_rate",
    ),
    "Held-out images": (
        "held_out_ratio", "refit", "zero_shot", "choose_by",
    ),
    "Device, speed and memory": (
        "device", "precision", "num_workers", "gradient_checkpointing",
    ),
    "Start of the projections": ("projection_init",),
    "Losses besides the main one": (
        "matryoshka_dims", "distillation_weight", "keep_texts",
    ),
    "Sampling and noise": (
        "image_noise", "caption_noise", "seed",
    ),
    "Optimizer": (
        "warmup_steps", "layer_decay",
    ),
    "Checkpoints and metrics": ("save_steps", "logging_steps", "report_to"),
}  # fmt: skip


@command(
    group="Train",
    examples=(
        "llm2clip align tuned/model my-images aligned --caption-store captions "
        "--image-store images",
    ),
    sections=SECTIONS,
)
def align(
    model: str,
    data: str,
    output: Path,
    /,
    *,
    caption_store: Path | None = None,
    image_store: Path | None = None,
    inherit_from: Path | None = None,
    teacher: str | None = None,
    resume: bool = False,
    stream: bool = False,
    reading: DataConfig,
    limits: ImageLimitsConfig,
    config: AlignConfig,
) -> int:
    """Trains the text adapter and projections to align images with captions (stage 3).

    Writes the aligned model to OUTPUT/model. A frozen tower does not run if its embeddings are
    read from a store.

    Args:
        model: Hub id or folder of an LLM2CLIP model.
        data: Captioned images: folder, *.parquet, *.tar, COCO *.json; or URLs of shards, such as
            https://host/{00000..00199}.tar or URLs that begin with s3:// or hf://datasets/.
        output: Output folder.
        caption_store: Caption embeddings from `llm2clip extract`. Default: none, which requires
            --text-training frozen-online or lora.
        image_store: Image embeddings from `llm2clip extract`. Default: none, so the vision tower
            runs at every step.
        inherit_from: Embeddings of the same captions by the text encoder of the CLIP model that
            contains the vision tower, written by `llm2clip extract CLIP DATA STORE --modality
            text`. The text side first learns to match these embeddings. Default: none.
        teacher: Hub id or folder of the CLIP model that contains the vision tower. Its text encoder
            computes the target embeddings for --keep-texts, which requires this option. Default:
            none.
        resume: Resume an interrupted run.
        stream: Stream local shards through a shuffle buffer, as is always done with remote shards.
            Requires --max-steps.
        reading: Options for reading the data.
        limits: Limits on the images to decode.
        config: Options for the alignment.
    """
    require(*([LORA] if "lora" in (config.vision_training, config.text_training) else []))
    from ..data.remote.shard_urls import has_remote_shards
    from ..model_folders.model_folder import find_model_folder, require_own_model
    from ..training.run_folder import require_output

    stores: dict[str, Any] = {
        "caption_store": caption_store, "image_store": image_store, "inherit_from": inherit_from
    }  # fmt: skip
    config.require_stores(**stores)  # plan_align checks this too, but imports torch first
    for name, store in stores.items():
        if store is not None and not store.is_dir():
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {store}: no such folder. Write it with llm2clip extract.")
    require_output(output, resume=resume, model=output / "model")
    require_own_model(model)
    streamed = stream or has_remote_shards(data)
    if not streamed:
        require_data(data, reading)
    from ..training.alignment.align import plan_align, run_alignment

    plan = plan_align(output, config, **stores, teacher=teacher, resume=resume)
    use_image_limits(limits)
    use_device(config.device, config.precision)
    from accelerate import PartialState

    from ..training.alignment.alignment_report import describe_alignment

    find_model_folder(model)  # fails before the data are read, which may take long
    records: Sequence[CaptionedImage] | RecordStream
    if streamed:
        records = stream_captioned_images(data, reading)
    else:
        reads_images = image_store is None or config.distillation_weight > 0
        records = read_captioned_images(
            data,
            reading,
            require_images=reads_images,
            trains_on_images=reads_images and not resume,
        )
    folder = run_alignment(plan, model, records, data_name=name_data(data, is_elsewhere=streamed))
    if PartialState().is_main_process:
        print("\n".join([*describe_alignment(output), f"Next: llm2clip doctor {folder}"]))
    return 0
