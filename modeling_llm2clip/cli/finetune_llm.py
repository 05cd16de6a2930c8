"""`llm2clip finetune-llm`."""

from __future__ import annotations

from pathlib import Path

from .._extras import CAPTION_TUNING
from ..configs.config_fields import DataConfig
from ..configs.finetune_config import FinetuneConfig
from .command import command
from .options import (
    name_data,
    read_captioned_images,
    require_data,
    require_model,
    use_device,
)


@command(group="Train", examples=("llm2clip finetune-llm my-model my-images tuned",))
def finetune_llm(
    model: str,
    data: str,
    output: Path,
    /,
    *,
    reading: DataConfig,
    config: FinetuneConfig,
    resume: bool = False,
) -> int:
    """Fine-tunes the LLM on captions with LoRA (stage 1).

    Merges the LoRA and writes the model to OUTPUT/model.

    Args:
        model: Hub id or folder of an LLM2CLIP model.
        data: Captioned images, of which only the captions are read: folder, *.parquet, *.tar, COCO
            *.json; or URLs of shards.
        output: Output folder.
        reading: Options for reading the data.
        config: Options for the fine-tuning.
        resume: Resume an interrupted run.
    """
    require_model(model, *CAPTION_TUNING)
    from ..training.run_folder import require_output

    require_output(output, resume=resume, model=output / "model" if config.merge else None)
    require_data(data, reading)
    use_device(config.device, config.precision)

    from accelerate import PartialState

    from ..data.remote.shard_urls import has_remote_shards
    from ..training.finetuning.finetune_llm import describe_finetuning
    from ..training.finetuning.finetune_llm import finetune_llm as run

    records = read_captioned_images(data, reading, require_images=False)
    folder = run(
        model, records, output, config,
        data_name=name_data(data, is_elsewhere=has_remote_shards(data)), resume=resume,
    )  # fmt: skip
    if PartialState().is_main_process:
        print("\n".join(describe_finetuning(output)))
        if config.merge:
            print(f"Next: llm2clip extract {folder} DATA STORE --modality text")
    return 0
