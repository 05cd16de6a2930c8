"""`llm2clip align`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .._extras import LORA, require
from ..configs.align_config import AlignConfig
from ..configs.data_config import DataConfig
from .captioned_data import read_data, require_data
from .chosen_device import choose_device
from .command import command
from .extras import list_needs_of_data, list_needs_of_model

if TYPE_CHECKING:
    from ..training.alignment.align import AlignResult
    from ..training.alignment.align_arguments import AlignArguments

_STARTS = {"auto": "auto", "model": "as-is", "cca": "canonical-correlation"}


@command(
    group="Train",
    examples=(
        "llm2clip align tuned/model my-images aligned --caption-store captions "
        "--image-store images",
    ),
)
def align(
    model: str,
    data: str,
    output: Path,
    /,
    *,
    caption_store: Path | None = None,
    image_store: Path | None = None,
    resume: bool = False,
    reading: DataConfig,
    config: AlignConfig,
) -> int:
    """Aligns images and captions: trains adapter, projections and what else is chosen (stage 3).

    The aligned model goes to output/model.

    Args:
        model: Hub id or folder of an LLM2CLIP model.
        data: Captioned images: folder, *.parquet, *.tar, COCO *.json.
        output: Folder to write.
        caption_store: Caption embeddings from `llm2clip extract`. Default: none, which
            --text-training frozen-online and lora want.
        image_store: Image embeddings from `llm2clip extract`. Default: none; the vision tower
            runs at each step.
        resume: Continue a run that was stopped.
        reading: How the data are read.
        config: What is trained, and how.
    """
    uses_lora = "lora" in (config.vision_training, config.text_training)
    require(*([LORA] if uses_lora else []), *list_needs_of_data(data, extra="train"))
    require(*list_needs_of_model(model, extra="train"))
    from ..model_folders.atomic_folder import clear_leftovers, require_new_folder
    from ..model_folders.model_types import require_own_model
    from ..training.run_record import require_fresh_or_resumed

    folder = output / "model"
    _require_stores(config, caption_store, image_store)
    clear_leftovers(folder)
    require_new_folder(folder)
    require_fresh_or_resumed(output, resume=resume)
    require_own_model(model)
    require_data(data, reading)
    choose_device(config.device)

    from ..data.embedding_store import EmbeddingStore
    from ..model_folders.model_folder import find_model_folder
    from ..training.alignment.align import align as run
    from ..training.alignment.align import check_settings

    arguments = _to_arguments(config)
    source = find_model_folder(model)
    stores = {
        "caption_store": caption_store and EmbeddingStore.open(caption_store),
        "image_store": image_store and EmbeddingStore.open(image_store),
    }
    check_settings(arguments, **stores)  # reading the data may take long
    records = read_data(data, reading, require_images=image_store is None, resume=resume)
    result = run(source, records, output, arguments, resume=resume, **stores)
    if not result.is_main_process:
        return result.exit_code
    if result.trained is None:
        print(
            f"Stopped after step {result.steps}; continue with --resume. The last checkpoint is "
            f"in {output}."
        )
        return result.exit_code
    _write(result, source, folder, Path(data).resolve().name)
    return 0


def _require_stores(
    config: AlignConfig, caption_store: Path | None, image_store: Path | None
) -> None:
    """Raise ValueError for a store that is missing, before anything is imported."""
    if config.text_training == "stored" and caption_store is None:
        raise ValueError(
            "--text-training stored needs a caption store. Make one with llm2clip extract and "
            "give it as --caption-store, or choose --text-training frozen-online or lora."
        )
    for flag, store in (("--caption-store", caption_store), ("--image-store", image_store)):
        if store is not None and not store.is_dir():
            raise ValueError(f"{flag} {store}: no such folder. Give one of llm2clip extract.")


def _write(result: AlignResult, model: Path, folder: Path, data: str) -> None:
    from ..publishing.assemble import assemble_folder
    from ..training.alignment.alignment_report import (
        NEAR_CHANCE,
        describe_result,
        find_caution,
        list_results,
    )

    assert result.trained is not None
    has_golden = assemble_folder(
        model,
        result.trained,
        folder,
        training_data=[data],
        results=list_results(result, data),
        caution=find_caution(result),
        projections_trained=result.has_trained_projections,
        text_adapter_trained=result.has_trained_adapter,
    )
    for line in describe_result(result):
        print(line)
    print(f"Wrote {folder} after {result.steps} steps, loss {result.final_loss:.4f}.")
    if not has_golden:
        print(
            f"{model} has no recorded caption embeddings, so {folder} has no golden embeddings. "
            "`llm2clip build` records them now."
        )
    print(f"Next: llm2clip doctor {folder}")
    if find_caution(result):
        print(NEAR_CHANCE)


def _to_arguments(config: AlignConfig) -> AlignArguments:
    from ..training.alignment.align_arguments import AlignArguments

    return AlignArguments(
        vision_training=config.vision_training,
        text_training=config.text_training,
        epochs=config.num_train_epochs,
        steps=config.max_steps,
        batch_size=config.global_batch_size,
        lr=config.learning_rate,
        vision_lr=config.vision_learning_rate,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        long_share=config.long_caption_ratio,
        loss_chunk=config.loss_chunk_size,
        start=_STARTS[config.projection_init],
        image_noise=config.image_noise,
        caption_noise=config.caption_noise,
        held_out_share=config.held_out_ratio,
        evaluate_every=config.eval_steps,
        patience=config.early_stopping_patience or None,
        vision_rank=config.vision_lora_rank,
        vision_alpha=config.vision_lora_alpha,
        text_rank=config.lora_rank,
        text_alpha=config.lora_alpha,
        clip_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        num_workers=config.num_workers,
        precision=config.precision,
        device=config.device,
        log_every=config.logging_steps,
        save_every=config.save_steps,
        seed=config.seed,
    )
