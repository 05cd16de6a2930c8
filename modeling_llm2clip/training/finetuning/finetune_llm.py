"""Stage 1: fine-tunes the LLM with a LoRA until it separates captions (paper, section 3.1).

Captions of one image are pulled together and captions of different images pushed apart, by the
trainer and the losses of sentence-transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from ...building.lora_merging import merge_lora
from ...configs.finetune_config import FinetuneConfig
from ...configuration_llm2clip import LLM2CLIPConfig
from ...data.atomic_files import hash_file
from ...data.caption_groups import (
    CaptionGroup,
    TextPair,
    group_captions,
    read_text_pairs,
    skip_single_captions,
)
from ...data.records import CaptionedImage
from ...encoding.encode import measure_texts
from ...evaluation.tasks.caption_retrieval import measure_caption_retrieval
from ...model_folders.atomic_folder import clear_leftovers, require_new_folder
from ...model_folders.fingerprint import fingerprint_text
from ...model_folders.lora_base import LORA_WEIGHTS, require_base_weights
from ...model_folders.model_card_data import read_card_data
from ...model_folders.model_writing import find_carried_files, save_model
from ...modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from ...processing_llm2clip import LLM2CLIPProcessor
from ...sentence_transformers_llm2clip import read_instructions
from ..distributed import choose_device, refuse_fsdp_for_lora
from ..graceful_stop import stop_on_signals
from ..run_folder import (
    add_results,
    discard_later_steps,
    find_last_checkpoint,
    read_results,
    read_run_record,
    require_finite,
    require_fresh_or_resumed,
    require_same_run,
    write_run_record,
)
from ..stage_source import Source, StageSource, open_source
from ..trainer_mixins import (
    StopCallback,
    choose_reports,
    count_warmup_steps,
    recompute_activations,
    show_progress,
)
from .finetune_trainer import count_run_steps, make_trainer
from .hard_batches import (
    encode_groups_together,
    find_nearest_groups,
    read_nearest_groups,
    write_nearest_groups,
)
from .lora_encoder import CaptionEncoder, make_lora_config, require_same_meaning, write_lora
from .pair_sampling import FinetuneData, list_texts, prepare_data

LORA_FOLDER = "lora"
MODEL_FOLDER = "model"
_NEAREST_FILE = "nearest_groups.safetensors"
_POOL_OF_HARD_NEGATIVES = 2  # times as many as are sampled: the same images do not always meet


def finetune_llm(
    source: Source,
    data: Sequence[CaptionedImage],
    output: str | Path,
    config: FinetuneConfig | None = None,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Fine-tune the LLM of a model with a LoRA, and write the model with the LoRA merged.

    `output` also gets the LoRA (`lora/`), `run.json` with the caption retrieval accuracy before
    and after, `metrics.jsonl` and checkpoints.

    Args:
        source: Folder or Hub id of an LLM2CLIP model, or a loaded (model, processor).
        data: Records with at least two captions per image; the images are not read.
        output: Folder of the run: new, or that of the same run with `resume`.
        config: Options; None for the defaults.
        resume: Continue from the last checkpoint in `output`.
        callbacks: Callbacks of transformers' Trainer.

    Returns:
        `output/model`, or `output/lora` with `merge=False`.

    Raises:
        ValueError: Before anything is computed: images with one caption, data that cannot fill a
            batch, a text-only model that is to be merged, an `output` of another run, a LoRA in
            `init_lora` of another shape or LLM.
        FileExistsError: `output/model` exists.
        FloatingPointError: A loss, gradient or weight is not finite; it is not written.
        StageInterrupt: SIGINT or SIGTERM stopped the run after a checkpoint.

    Examples:
        >>> records = load_records("my-images")
        >>> tuned = finetune_llm("my-model", records, "tuned")  # doctest: +SKIP
    """
    config, output = config or FinetuneConfig(), Path(output)
    refuse_fsdp_for_lora()
    model_folder = output / MODEL_FOLDER
    if config.merge:
        clear_leftovers(model_folder)
        require_new_folder(model_folder)
    require_fresh_or_resumed(output, resume=resume)
    choose_reports(config.report_to)
    device = choose_device(config.device)
    with open_source(source, output) as found:
        if config.merge:
            _require_whole_model(found)
        plan = _plan(found, data, output, config, resume=resume)
        processor = LLM2CLIPProcessor.from_pretrained(found.folder)
        model = LLM2CLIPTextModel.from_pretrained(found.folder).to(device)
        _train(model, processor, plan, callbacks)
        state = PartialState()
        if config.merge and state.is_main_process:
            _write_merged(found.folder, output / LORA_FOLDER, model_folder)
        state.wait_for_everyone()
    return model_folder if config.merge else output / LORA_FOLDER


def check_finetuning(records: Sequence[CaptionedImage], config: FinetuneConfig) -> None:
    """Refuse options and data that `finetune_llm` would refuse, without a model.

    Args:
        records: Records to train on.
        config: Options of the run.

    Raises:
        ValueError: Images with one caption, data that cannot fill a batch, text pairs or a LoRA
            that cannot be read, or a warm-up longer than the run.
    """
    _prepare(records, config)


def describe_finetuning(output: Path) -> list[str]:
    """Describe a finished run in lines for a terminal.

    Args:
        output: Folder of the run.
    """
    record = read_run_record(output)
    results, inputs = record["results"], record["inputs"]
    lines = []
    if skipped := inputs["num_single_captions_skipped"]:
        lines.append(f"Skipped {skipped} images with one caption only.")
    lines += [
        f"Wrote {output / LORA_FOLDER}. Caption retrieval accuracy on {results['num_held_out']} "
        f"held-out images: {results['cra_before']:.1%} -> {results['cra_after']:.1%}.",
        f"{results['num_truncated']} of {results['num_texts']} texts are longer than "
        f"{inputs['fingerprint']['max_text_length']} tokens and were truncated.",
    ]
    if record["config"]["merge"]:
        lines.append(f"Wrote {output / MODEL_FOLDER}.")
    return lines


@dataclass(frozen=True)
class _Prepared:
    """What a run is trained on, and how long."""

    groups: list[CaptionGroup]
    text_pairs: list[tuple[list[TextPair], float]]
    data: FinetuneData
    schedule: dict[str, int]
    num_skipped: int


@dataclass(frozen=True)
class _Plan:
    """A run that has passed every check that needs no LLM."""

    output: Path
    config: FinetuneConfig
    resume: bool
    inputs: dict[str, Any]
    data: FinetuneData


def _plan(
    source: StageSource,
    records: Sequence[CaptionedImage],
    output: Path,
    config: FinetuneConfig,
    *,
    resume: bool,
) -> _Plan:
    """Check and prepare everything that needs no LLM."""
    prepared = _prepare(records, config)
    inputs = {
        **_identify(source, prepared.groups, prepared.text_pairs, config.init_lora),
        "schedule": prepared.schedule,
        "num_single_captions_skipped": prepared.num_skipped,
    }
    require_same_run(output, config, inputs, resume=resume)
    if config.init_lora is not None:
        file = config.init_lora / LORA_WEIGHTS
        require_base_weights(file, inputs["fingerprint"]["weights"])
    return _Plan(output, config, resume, inputs, prepared.data)


def _prepare(records: Sequence[CaptionedImage], config: FinetuneConfig) -> _Prepared:
    """Check and prepare everything that needs no model at all."""
    num_skipped = 0
    if config.skip_single_captions:
        records, num_skipped = skip_single_captions(records)
    groups = group_captions(records)
    text_pairs = [(read_text_pairs(file), weight) for file, weight in config.text_pairs]
    data = prepare_data(groups, text_pairs, config)
    num_steps = count_run_steps(data, config)[0]
    warmup_steps = count_warmup_steps(config.warmup_steps, num_steps)
    if config.init_lora is not None:
        require_same_meaning(config.init_lora, make_lora_config(config))
    schedule = {"steps": num_steps, "warmup_steps": warmup_steps}
    return _Prepared(groups, text_pairs, data, schedule, num_skipped)


def _identify(
    source: StageSource,
    groups: Sequence[CaptionGroup],
    text_pairs: Sequence[tuple[list[TextPair], float]],
    init_lora: Path | None,
) -> dict[str, Any]:
    """What the numbers of a run depend on beside its options."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(json.dumps([group.group_id, group.captions]).encode())
    for pairs, weight in text_pairs:
        digest.update(json.dumps([weight, [asdict(pair) for pair in pairs]]).encode())
    return {
        "source": source.name,
        "fingerprint": fingerprint_text(source.folder),
        "init_lora_weights": None if init_lora is None else hash_file(init_lora / LORA_WEIGHTS),
        "data": digest.hexdigest(),
        "num_processes": PartialState().num_processes,
    }


def _train(
    model: LLM2CLIPTextModel,
    processor: LLM2CLIPProcessor,
    plan: _Plan,
    callbacks: Sequence[TrainerCallback],
) -> None:
    """Train the LoRA and write it to `output/lora`."""
    output, config, data = plan.output, plan.config, plan.data
    counts = {**data.counts, **_count_truncated(processor, data)}
    encoder = _make_encoder(model, processor, config)
    last = find_last_checkpoint(output) if plan.resume else None
    state = PartialState()
    state.wait_for_everyone()  # every process has checked the folder before it is filled
    if state.is_main_process:
        if last is None:
            write_run_record(output, config, plan.inputs, model=model)
        discard_later_steps(output, last)
    with stop_on_signals() as stop:
        before = _measure_before(encoder, data, output, resumed=last is not None)
        nearest = _find_nearest(encoder, data, output, config, resumed=last is not None)
        trainer = make_trainer(encoder, data, nearest, output, config, callbacks)
        show_progress(trainer, "finetune-llm")
        trainer.add_callback(StopCallback(stop))
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    step, num_steps = trainer.state.global_step, trainer.args.max_steps
    if step < num_steps:  # a callback of the user may have stopped the run, too
        stop.raise_interrupt(
            f"Stopped after step {step} of {num_steps}; the checkpoint is in {output}.",
            resume=True,
            is_main_process=state.is_main_process,
        )
    require_finite(encoder.trained_weights, step=step)
    after = measure_caption_retrieval(encoder.encode, data.held_out)
    if state.is_main_process:
        write_lora(
            encoder,
            output / LORA_FOLDER,
            dtype=getattr(torch, config.lora_dtype),
            base_weights=plan.inputs["fingerprint"]["weights"],
        )
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


def _count_truncated(processor: LLM2CLIPProcessor, data: FinetuneData) -> dict[str, int]:
    """Count all different texts, trained on and measured on, and those that are truncated."""
    texts = list_texts(data)
    return {"num_texts": len(texts), "num_truncated": int(measure_texts(processor, texts)[1].sum())}


def _measure_before(
    encoder: CaptionEncoder, data: FinetuneData, output: Path, *, resumed: bool
) -> float:
    """The accuracy before training; a resumed run takes what it measured the first time."""
    if resumed:
        return float(read_results(output)["cra_before"])
    before = measure_caption_retrieval(encoder.encode, data.held_out)
    if PartialState().is_main_process:
        add_results(output, cra_before=before)
    return before


def _find_nearest(
    encoder: CaptionEncoder,
    data: FinetuneData,
    output: Path,
    config: FinetuneConfig,
    *,
    resumed: bool,
) -> dict[str, list[str]]:
    """The nearest groups of each group, once per run: all processes encode, one compares."""
    if not config.num_hard_negatives:
        return {}
    file, state = output / _NEAREST_FILE, PartialState()
    if not resumed:
        embeddings = encode_groups_together(encoder.encode, data.to_train)
        if state.is_main_process:
            wanted = _POOL_OF_HARD_NEGATIVES * config.num_hard_negatives
            top_k = min(wanted, len(data.to_train) - 1)
            write_nearest_groups(find_nearest_groups(embeddings, top_k).cpu(), file)
    state.wait_for_everyone()
    return read_nearest_groups(file, data.to_train)


def _require_whole_model(source: StageSource) -> None:
    """Raise ValueError for a text-only model, which cannot be written with the LoRA merged."""
    found = LLM2CLIPConfig.from_pretrained(source.folder).architectures
    if found != ["LLM2CLIPModel"]:
        raise ValueError(
            f"{source.name} is {found}, and merging writes a whole model. Give the whole model, or "
            "merge=False, which writes the LoRA alone."
        )


def _write_merged(source: Path, lora: Path, folder: Path) -> None:
    """Write the model with the LoRA added to the weights of its LLM.

    The embeddings are those of the unmerged LLM up to the rounding of one sum per weight.
    Instructions, licenses and the record of a conversion are taken over.
    """
    model = LLM2CLIPModel.from_pretrained(source)
    merge_lora(model.text_model, lora)
    save_model(
        model,
        LLM2CLIPProcessor.from_pretrained(source),
        folder,
        instructions=read_instructions(source),
        card=replace(read_card_data(source), results=()),  # measured with other weights
        files=find_carried_files(source, trained_since=True),
    )
