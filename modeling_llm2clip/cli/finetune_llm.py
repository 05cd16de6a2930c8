"""`llm2clip finetune-llm`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .._extras import CAPTION_TUNING, require
from ..configs.data_config import DataConfig
from ..configs.finetune_config import FinetuneConfig
from .captioned_data import read_data, require_data
from .chosen_device import choose_device
from .command import command
from .extras import list_needs_of_model

if TYPE_CHECKING:
    from ..training.finetuning.finetune_llm import TuneArguments, TuneResult

_NEGATIVES = {"query-to-doc": "one-way", "symmetric": "both-ways", "all": "all-captions"}


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
    """Fine-tunes the LLM on captions, with a LoRA (stage 1).

    The model with the LoRA merged goes to output/model.

    Args:
        model: Hub id or folder of an LLM2CLIP model.
        data: Captioned images, of which only the captions are read: folder, *.parquet, *.tar,
            COCO *.json.
        output: Folder to write.
        reading: How the data are read.
        config: How the LLM is trained.
        resume: Continue a run that was stopped.
    """
    require(*CAPTION_TUNING)
    require(*list_needs_of_model(model, extra="train"))
    from ..model_folders.atomic_folder import clear_leftovers, require_new_folder
    from ..model_folders.model_types import require_own_model
    from ..training.run_record import require_fresh_or_resumed

    merged = output / "model"
    if config.merge:
        clear_leftovers(merged)
        require_new_folder(merged)
    require_fresh_or_resumed(output, resume=resume)
    require_own_model(model)
    require_data(data, reading)
    device = choose_device(config.device)

    from ..data.caption_groups import group_captions, read_text_pairs, skip_single_captions
    from ..modeling_llm2clip import LLM2CLIPTextModel
    from ..processing_llm2clip import LLM2CLIPProcessor
    from ..training.distributed import join_processes
    from ..training.finetuning.caption_lora import merge_caption_adapter
    from ..training.finetuning.finetune_llm import plan_tuning, run_tuning

    state = join_processes(cpu=device.type == "cpu")
    if config.merge:
        _require_whole_model(model)
    records, num_skipped = read_data(data, reading, require_images=False), 0
    if config.skip_single_captions:
        records, num_skipped = skip_single_captions(records)
        if state.is_main_process:
            print(f"Skipped {num_skipped} images with one caption only.")
    plan = plan_tuning(
        model,
        group_captions(records),
        output,
        _to_arguments(config),
        other_pairs=[(read_text_pairs(file), weight) for file, weight in config.text_pairs],
        start=config.init_lora,
        resume=resume,
        num_skipped=num_skipped,
    )
    processor = LLM2CLIPProcessor.from_pretrained(model)
    loaded = LLM2CLIPTextModel.from_pretrained(model).to(device)
    result = run_tuning(loaded, processor, plan)
    if not state.is_main_process:
        return result.exit_code
    if result.adapter is None:
        print(f"Stopped; continue with --resume. The last checkpoint is in {output}.")
        return result.exit_code
    _print_result(result, processor.longest_text)
    if config.merge:
        merge_caption_adapter(model, result.adapter, merged)
        print(f"Wrote {merged}. Next: llm2clip extract {merged} DATA STORE --modality text")
    return 0


def _print_result(result: TuneResult, longest_text: int) -> None:
    print(f"Wrote {result.adapter}. CRA {result.cra_before:.1%} -> {result.cra_after:.1%}.")
    print(
        f"{result.counts['num_truncated']} of {result.counts['num_texts']} texts are longer than "
        f"{longest_text} tokens and truncated."
    )


def _require_whole_model(model: str) -> None:
    """Raise ValueError for a text-only model, which cannot be written with the LoRA merged."""
    from ..configuration_llm2clip import LLM2CLIPConfig
    from ..model_folders.model_folder import find_model_folder

    found = LLM2CLIPConfig.from_pretrained(find_model_folder(model)).architectures
    if found != ["LLM2CLIPModel"]:
        raise ValueError(
            f"{model} holds {found}, and merge=True writes a whole model. Give a whole model, or "
            "merge=False."
        )


def _to_arguments(config: FinetuneConfig) -> TuneArguments:
    from ..training.finetuning.finetune_llm import TuneArguments
    from ..training.finetuning.lora_encoder import LoraArguments

    targets = config.lora_target_modules
    return TuneArguments(
        epochs=config.num_train_epochs,
        steps=config.max_steps,
        pairings=config.num_pairings,
        batch_size=config.per_device_train_batch_size,
        mini_batch_size=config.mini_batch_size,
        lr=config.learning_rate,
        warmup_steps=config.warmup_steps,
        scale=config.scale,
        negatives=_NEGATIVES[config.negatives],
        num_alike=config.num_hard_negatives,
        held_out=config.num_held_out,
        eval_every=config.eval_steps,
        gradient_checkpointing=config.gradient_checkpointing,
        precision=config.precision,
        adapter_dtype=config.lora_dtype,
        save_every=config.save_steps,
        seed=config.seed,
        lora=LoraArguments(
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=targets[0] if targets == ("all-linear",) else list(targets),
        ),
    )
