"""Stage 1: fine-tune the LLM with a LoRA so it separates captions (paper, section 3.1).

The trainer and losses of sentence-transformers pull captions of the same image together and push
captions of different images apart.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import TrainerCallback

from ..._suggestions import counted
from ...base_llm2clip import read_instructions
from ...building.lora_merging import merge_lora, require_base_weights
from ...configs.finetune_config import FinetuneConfig
from ...configuration_llm2clip import LLM2CLIPConfig
from ...data.atomic_files import hash_file
from ...data.captions.caption_groups import (
    CaptionGroup,
    CaptionGroups,
    group_captions,
    skip_single_captions,
)
from ...data.key_arrays import Array
from ...data.records.data_hashes import hash_records
from ...data.records.record_table import RecordTable
from ...data.records.records import CaptionedImage
from ...encoding.encode import encode_texts
from ...encoding.layer_compilation import compile_layers
from ...encoding.precision import load_on_device
from ...evaluation.tasks.retrieval import measure_caption_retrieval
from ...model_folders.fingerprint import fingerprint_text
from ...model_folders.golden_embeddings import compare_golden, require_golden
from ...model_folders.model_card import read_card_of_trained
from ...model_folders.model_folder import LORA_WEIGHTS
from ...model_folders.model_writing import (
    Source,
    StageSource,
    find_carried_files,
    open_source,
    save_model,
)
from ...model_folders.weights import open_model_weights, require_disk_space
from ...modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from ...processing_llm2clip import LLM2CLIPProcessor
from ...scheduling.graceful_stop import stop_on_signals
from ...scheduling.processes import choose_device
from ..run_folder import (
    NEAREST_FILE,
    add_results,
    discard_later_steps,
    find_last_checkpoint,
    lock_run,
    read_results,
    read_run_record,
    require_finite_weights,
    require_output,
    require_same_run,
    write_run_record,
)
from ..trainer_mixins import (
    StopCallback,
    choose_reports,
    computes_in_bfloat16,
    count_warmup_steps,
    deterministic_kernels,
    find_without_gradient,
    raise_if_stopped,
    recompute_activations,
    refuse_fsdp_for_lora,
    require_compilable,
    require_gradients,
    run_once_per_machine,
    show_progress,
    warn_of_padding,
)
from .finetune_data import FinetuneData, count_rows, count_truncated, prepare_data
from .finetune_trainer import (
    CaptionEncoder,
    count_run_steps,
    make_lora_config,
    make_trainer,
    require_same_meaning,
    write_lora,
)
from .nearest_groups import require_search, write_nearest_groups

WORSE = (
    "Warning: training lowered this accuracy. Train for more steps (--max-steps), lower the "
    "learning rate (--learning-rate), or keep the original LLM."
)
WORSE_BY_MERGING = (
    "Warning: merging rounds the weights, which lowered this accuracy below where it started. "
    "Merge into a float32 model (llm2clip export --dtype float32)."
)
UNNAMED = "unnamed data"
LORA_FOLDER = "lora"
MODEL_FOLDER = "model"
_POOL_OF_HARD_NEGATIVES = 2  # candidates per sampled negative, so batches vary


def finetune_llm(
    source: Source,
    data: Sequence[CaptionedImage],
    output: str | Path,
    config: FinetuneConfig | None = None,
    *,
    data_name: str | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Fine-tune a model's LLM with a LoRA, and write the model with the LoRA merged.

    `output` also contains the LoRA (`lora/`), `run.json` with the caption retrieval accuracy before
    and after, `metrics.jsonl` and checkpoints. The accuracy after training is measured on the files
    as written: the merged model in its folder's dtype, or the LoRA.

    Args:
        source: Folder or Hub id of an LLM2CLIP model, or a loaded (model, processor).
        data: Records with at least two captions per image; the images are not read.
        output: Folder of the run: a new folder or, with `resume`, the folder of the run to
            continue.
        config: Options; None for the defaults.
        data_name: Name of the data for the model card; None for unnamed data.
        resume: Continue from the last checkpoint in `output`.
        callbacks: Callbacks for transformers' Trainer.

    Returns:
        `output/model`, or `output/lora` with `merge=False`.

    Raises:
        ValueError: Before anything is computed: an image has only one caption, the data cannot fill
            a batch, the model to merge into is text-only, `output` is in use or contains another
            run, or `init_lora` is for another shape or LLM.
        FileExistsError: `output/model` exists.
        FloatingPointError: A loss, gradient or weight is not finite. No model is written.
        StageInterrupt: SIGINT or SIGTERM stopped the run after a checkpoint.

    Examples:
        >>> records = load_records("my-images")
        >>> tuned = finetune_llm("my-model", records, "tuned")  # doctest: +SKIP
    """
    config, output = config or FinetuneConfig(), Path(output)
    refuse_fsdp_for_lora()
    model_folder = output / MODEL_FOLDER
    require_output(output, resume=resume, model=model_folder if config.merge else None)
    choose_reports(config.report_to)
    device = choose_device(config.device)
    require_compilable(config, device)
    with (
        deterministic_kernels(config, device),
        lock_run(output),
        open_source(source, output) as model_source,
    ):
        _require_tunable(model_source, config)
        # Deleted before the model is written, because a run with a model is never resumed.
        with _open_scratch(output) as scratch:
            records = RecordTable.from_records(data)
            prepared, decided = _prepare(records, config, scratch)
            base_dtype = choose_base_dtype(config.precision, device)
            inputs = {**_identify(model_source, records, config), **decided}
            if base_dtype is not None:
                inputs["base_dtype"] = str(base_dtype).removeprefix("torch.")
            require_same_run(output, config, inputs, resume=resume)
            if config.merge:  # fail before hours of training, not after
                require_disk_space(open_model_weights(model_source.folder), output)
                read_card_of_trained(model_source.folder, [])
            if config.init_lora is not None:
                lora = config.init_lora / LORA_WEIGHTS
                require_base_weights(lora, inputs["fingerprint"]["weights"])
            processor = LLM2CLIPProcessor.from_pretrained(model_source.folder)
            model = load_on_device(
                LLM2CLIPTextModel, model_source.folder, device, dtype=base_dtype or "auto"
            )
            require_golden(model_source.folder, model, processor)
            if config.precision == "float32":
                model.float()  # half-precision weights would otherwise stay in half precision
            encoder = _make_encoder(model, processor, config)
            last = find_last_checkpoint(output) if resume else None
            _train(encoder, prepared, output, config, inputs, last, callbacks)
            del model, encoder  # make room for the merged model
        state = PartialState()
        if config.merge and state.is_main_process:
            _write_merged(model_source.folder, output, prepared.held_out, device, data_name)
        state.wait_for_everyone()
    return model_folder if config.merge else output / LORA_FOLDER


def _require_tunable(source: StageSource, config: FinetuneConfig) -> None:
    """Refuse a model whose embeddings must not change, or a partial model with merge=True."""
    saved = LLM2CLIPConfig.from_pretrained(source.folder)
    if saved.text_adapter_layers is None or saved.text_dense_width is not None:
        raise ValueError(
            f"{source.name} keeps a text embedder unchanged, but a LoRA would change its "
            "embeddings and would not fit its Dense modules. Align it without fine-tuning."
        )
    if config.merge and saved.architectures != ["LLM2CLIPModel"]:
        raise ValueError(
            f"{source.name} is {saved.architectures}, but merging needs a whole model. Pass the "
            "whole model, or merge=False to write only the LoRA."
        )


def choose_base_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Choose the dtype of the frozen weights; None keeps the stored dtype.

    A run in bfloat16 only needs bfloat16 weights, which take half the memory of float32 weights and
    are not cast at every step.
    """
    return torch.bfloat16 if computes_in_bfloat16(precision, device) else None


def check_finetuning(records: Sequence[CaptionedImage], config: FinetuneConfig) -> int:
    """Refuse options and data that `finetune_llm` would refuse; return the number of steps.

    No model is needed and nothing is written: texts are counted by their keys. No batch is sampled,
    so data whose texts repeat too often for one is refused only by `finetune_llm`.
    """
    groups, _ = _group(RecordTable.from_records(records), config)
    return _plan_steps(*count_rows(groups, config), config)["steps"]


def describe_finetuning(output: Path) -> list[str]:
    record = read_run_record(output)
    results, inputs = record["results"], record["inputs"]
    before, after = results["cra_before"], results["cra_after"]
    warning = WORSE if results.get("cra_unmerged", after) < before else WORSE_BY_MERGING
    lines = []
    if skipped := inputs["num_single_captions_skipped"]:
        lines.append(f"Skipped {counted(skipped, 'image')} with only one caption.")
    lines += [
        f"Wrote {output / LORA_FOLDER}. Caption retrieval accuracy on {results['num_held_out']} "
        f"held-out images: {before:.1%} -> {after:.1%}.",
        *([warning] if after < before else []),
        f"Truncated {results['num_truncated']:,} of {counted(results['num_texts'], 'text')} to "
        f"{inputs['fingerprint']['max_text_length']} tokens.",
    ]
    if search := results.get("hard_negatives", {}).get("recall_sample"):
        recall = results["hard_negatives"]["recall"]
        lines.append(
            f"Hard negatives come from an approximate search that finds {recall:.1%} of the "
            f"nearest images (recall on a sample of {search})."
        )
    if record["config"]["merge"]:
        lines.append(
            f"Wrote {output / MODEL_FOLDER}, which was measured above. After rounding, "
            f"{results['share_changed_by_merging']:.1%} of the entries that the LoRA changes still "
            f"differ from the original; without merging, the accuracy was "
            f"{results['cra_unmerged']:.1%}."
        )
    return lines


def _prepare(
    records: RecordTable, config: FinetuneConfig, scratch: Path
) -> tuple[FinetuneData, dict[str, Any]]:
    """Check and prepare everything that needs no model; return the data and run record values."""
    groups, num_skipped = _group(records, config)
    data = prepare_data(groups, config, scratch)
    schedule = _plan_steps(data.num_trained, [*data.tables.num_rows.values()], config)
    return data, {"schedule": schedule, "num_single_captions_skipped": num_skipped}


def _group(records: RecordTable, config: FinetuneConfig) -> tuple[CaptionGroups, int]:
    """Group the captions, and count the groups that were skipped."""
    if config.skip_single_captions:
        return skip_single_captions(records)
    return group_captions(records), 0


def _plan_steps(num_groups: int, num_rows: Sequence[int], config: FinetuneConfig) -> dict[str, int]:
    """Check the options that depend on the amount of data; return the learning rate schedule."""
    if config.num_hard_negatives:
        require_search(num_groups)
    num_steps = count_run_steps(num_rows, config)[0]
    warmup_steps = count_warmup_steps(config.warmup_steps, num_steps)
    if config.init_lora is not None:
        require_same_meaning(config.init_lora, make_lora_config(config))
    return {"steps": num_steps, "warmup_steps": warmup_steps}


@contextmanager
def _open_scratch(output: Path) -> Iterator[Path]:
    """Make a temporary folder for the pairs, shared by all processes on a machine.

    The temporary folder is in the locked run folder, so leftovers there can only come from a killed
    attempt of this run.
    """
    with ExitStack() as stack:

        def make() -> Path:
            # `.tmp` marks it as unfinished, so a folder that has only this still counts as new.
            scratch = output / f"pairs-{PartialState().process_index}.tmp"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            return scratch

        yield run_once_per_machine(make)
        PartialState().wait_for_everyone()  # before the folder is deleted


def _identify(source: StageSource, records: RecordTable, config: FinetuneConfig) -> dict[str, Any]:
    """Identify all inputs that affect the results of a run, other than its options."""
    init_lora = config.init_lora
    return {
        "source": source.name,
        "fingerprint": fingerprint_text(source.folder),
        "init_lora_weights": None if init_lora is None else hash_file(init_lora / LORA_WEIGHTS),
        "data": hash_records(records),
        "text_pair_files": [hash_file(Path(file)) for file, _ in config.text_pairs],
        "num_processes": PartialState().num_processes,
        "in_bfloat16": computes_in_bfloat16(config.precision, choose_device(config.device)),
    }


def _train(
    encoder: CaptionEncoder,
    data: FinetuneData,
    output: Path,
    config: FinetuneConfig,
    inputs: dict[str, Any],
    last: Path | None,
    callbacks: Sequence[TrainerCallback],
) -> None:
    """Train the LoRA, from the last checkpoint if there is one, and write it to `output/lora`."""
    state = PartialState()
    counts = dict(data.counts)
    if state.is_main_process:
        warn_of_padding(encoder.llm2clip.device, config.precision)
        counts |= count_truncated(encoder.processor, data, show_progress=True)
    require_gradients(
        find_without_gradient(encoder.llm2clip, encoder.sum_of_two),
        cause=f"lora_target_modules={' '.join(config.lora_target_modules)}",
        remedy="List all other layers in --lora-target-modules.",
    )
    if config.compile:  # before anything is measured
        compile_layers(encoder.llm2clip)
    state.wait_for_everyone()  # all processes check the folder before one writes to it
    if state.is_main_process:
        if last is None:
            write_run_record(output, config, inputs, model=encoder.llm2clip)
        discard_later_steps(output, last)
    with stop_on_signals() as stop:
        if last is None:
            before = measure_caption_retrieval(encoder.encode, data.held_out)
            if state.is_main_process:
                add_results(output, cra_before=before)
        else:
            before = read_results(output)["cra_before"]
        nearest = _find_nearest(encoder, data, output, config, resumed=last is not None)
        trainer = make_trainer(encoder, data, nearest, output, config, callbacks)
        show_progress(trainer, "finetune-llm")
        trainer.add_callback(StopCallback(stop))
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    raise_if_stopped(trainer, output, stop)
    step = trainer.state.global_step
    require_finite_weights(encoder.trained_weights, step=step)
    if state.is_main_process:
        write_lora(
            encoder,
            output / LORA_FOLDER,
            dtype=getattr(torch, config.lora_dtype),
            base_weights=inputs["fingerprint"]["weights"],
        )
    state.wait_for_everyone()
    encoder.load_lora(output / LORA_FOLDER)  # measure the LoRA as written, in its dtype
    after = measure_caption_retrieval(encoder.encode, data.held_out)
    if state.is_main_process:
        add_results(output, steps=step, cra_before=before, cra_after=after, **counts)
    state.wait_for_everyone()


def _make_encoder(
    model: LLM2CLIPTextModel, processor: LLM2CLIPProcessor, config: FinetuneConfig
) -> CaptionEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = CaptionEncoder(model, processor, make_lora_config(config))
    if config.init_lora is not None:
        encoder.load_lora(config.init_lora)
    if config.gradient_checkpointing:
        recompute_activations(model.text_model)
    return encoder


def _find_nearest(
    encoder: CaptionEncoder,
    data: FinetuneData,
    output: Path,
    config: FinetuneConfig,
    *,
    resumed: bool,
) -> Array | None:
    """Find each group's nearest groups once per run; all processes encode, one process compares."""
    if not config.num_hard_negatives:
        return None
    file, state = output / NEAREST_FILE, PartialState()
    if not resumed:
        report = write_nearest_groups(
            encoder.encode,
            data.iterate_groups(),
            data.num_trained,
            min(_POOL_OF_HARD_NEGATIVES * config.num_hard_negatives, data.num_trained - 1),
            file,
        )
        if state.is_main_process:
            add_results(output, hard_negatives=report)
    state.wait_for_everyone()
    return np.load(file, mmap_mode="r")  # type: ignore[no-any-return]


def _write_merged(
    source: Path,
    output: Path,
    held_out: Sequence[CaptionGroup],
    device: torch.device,
    data_name: str | None,
) -> None:
    """Write the model with the LoRA merged into its LLM, and evaluate the written files.

    The merged weights are rounded to the folder's dtype, which may cost accuracy. Instructions,
    licenses and any conversion record are kept.
    """
    model = LLM2CLIPModel.from_pretrained(source)
    processor = LLM2CLIPProcessor.from_pretrained(source)
    require_golden(source, model.eval(), processor)
    share_changed = merge_lora(model.text_model, output / LORA_FOLDER)

    def measure(folder: Path) -> None:
        model.to("meta")  # a large LLM does not fit into memory twice
        written = LLM2CLIPTextModel.from_pretrained(folder).eval().to(device)
        compare_golden(folder, written, processor)
        encode = partial(encode_texts, written, processor, project=False)
        add_results(
            output,
            cra_unmerged=read_results(output)["cra_after"],
            cra_after=measure_caption_retrieval(encode, held_out),
            share_changed_by_merging=share_changed,
        )

    card = read_card_of_trained(source, [] if data_name is None else [data_name])
    tuned_on = dict.fromkeys((*card.text_training_data, data_name or UNNAMED))
    save_model(
        model,
        processor,
        output / MODEL_FOLDER,
        instructions=read_instructions(source),
        card=replace(card, text_training_data=tuple(tuned_on)),
        files=find_carried_files(source, trained_since=True),
        verify=measure,
    )
