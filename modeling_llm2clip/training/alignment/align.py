"""Stage 3: align images with captions and write the model (paper, section 3.2).

Cheap checks run first. Then the model parts that the options require are loaded, trained and
merged.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from ...configs.align_config import AlignConfig
from ...configuration_llm2clip import LLM2CLIPConfig
from ...data.atomic_files import hash_file
from ...data.records.record_table import RecordTable
from ...data.records.records import CaptionedImage
from ...data.store.embedding_store import MANIFEST_FILE, EmbeddingStore
from ...data.streams.record_streams import RecordStream
from ...encoding.precision import float32_as_such
from ...evaluation.datasets.classification_dataset import ClassificationDataset
from ...model_folders.fingerprint import fingerprint_model, fingerprint_text, fingerprint_vision
from ...model_folders.golden_embeddings import GOLDEN_FILE
from ...model_folders.model_card import CardResult, read_card_data
from ...model_folders.model_writing import Source, open_source, require_intact, save_trained_model
from ...model_folders.weights import open_model_weights, require_disk_space, warn_of_rounding
from ...processing_llm2clip import LLM2CLIPProcessor
from ...scheduling.graceful_stop import StopRequest, stop_on_signals
from ...scheduling.processes import choose_device
from ..losses.choose_loss import build_loss, require_dims
from ..losses.loss import Loss, identify_callable
from ..run_folder import (
    INHERITED_FILE,
    add_results,
    lock_run,
    read_results,
    require_output,
    require_same_run,
    write_run_record,
)
from ..trainer_mixins import (
    computes_in_bfloat16,
    count_warmup_steps,
    deterministic_kernels,
    is_sharded,
    raise_if_stopped,
    require_compilable,
    run_once_per_machine,
    warn_of_padding,
)
from .align_checks import (
    check_batch,
    check_data,
    check_own_parts,
    check_processes,
    check_stream,
    open_stores,
    require_same_space,
)
from .alignment_data import ImageTransform, make_random_crop
from .alignment_fit import AlignmentFit, Choice, collect_weights, refit
from .alignment_model import LOSS, TOWERS, AlignmentModel
from .alignment_report import make_card_results, make_caution, note_held_out
from .alignment_trainer import (
    AlignmentTrainer,
    OptimizerFactory,
    RunLength,
    choose_batch_size,
    count_steps,
    make_training_arguments,
)
from .best_weights import BEST_FILE, BestWeightsCallback, TrainingObjective, copy_trained
from .held_out import ZeroShotImages, embed_batches, load_labeled_images
from .image_summary import write_image_summary
from .inheritance import copy_text_side, inherit
from .kept_texts import KeptTexts, read_kept_texts
from .projection_init import ProjectionInit, init_projections, repeat_init
from .run_data import RecordData, RunData, StreamData, open_records, open_stream

MODEL_FOLDER = "model"
_NUM_EVALUATIONS = 20
_RATIO_BEFORE_ADAPTER = 0.25


def align(
    source: Source,
    data: Sequence[CaptionedImage] | RecordStream,
    output: str | Path,
    config: AlignConfig | None = None,
    *,
    caption_store: str | Path | EmbeddingStore | None = None,
    image_store: str | Path | EmbeddingStore | None = None,
    inherit_from: str | Path | EmbeddingStore | None = None,
    teacher: str | Path | None = None,
    loss: Loss | None = None,
    image_transform: ImageTransform | None = None,
    optimizer: OptimizerFactory | None = None,
    data_name: str | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Align the images and captions of a model, and write the aligned model.

    `output` also contains `run.json` with the scores on held-out images, `metrics.jsonl`,
    checkpoints, the best weights, and a folder `refit` for the final fit on all images.

    Args:
        source: Folder or Hub id of an LLM2CLIP model, or a loaded (model, processor).
        data: Records, with their images unless there is an `image_store`; or a stream of records,
            which requires `max_steps` and whose first groups are held out.
        output: Folder of the run: a new folder or, with `resume`, the folder of the run to
            continue.
        config: Options; None for the defaults.
        caption_store: Caption embeddings of these records from the model's LLM, as written by
            `extract`. The store is required with `text_training="stored"`, and only allowed then.
        image_store: Image embeddings from the model's frozen vision tower; None to run the tower at
            every step. With `distillation_weight`, the tower is trained and regularized toward the
            stored embeddings or, without a store, toward a frozen copy of the tower.
        inherit_from: Embeddings of the same captions from the text encoder of the CLIP that the
            vision tower was taken from, as written by `extract`. Text adapter and text projection
            learn these embeddings first. The model must have been built with `keep_projection`.
        teacher: Folder or Hub id of the CLIP that the vision tower was taken from. The texts in
            `config.keep_texts` are kept near their embeddings from this CLIP's text encoder. The
            model must have been built with `keep_projection`.
        loss: The loss to minimize, instead of `config.loss`. The other loss options still apply.
        image_transform: Transforms each decoded training image, a PIL image, before the image
            processor, instead of `config.min_crop_area`. It must draw random numbers only from
            torch, whose generator is seeded for each batch, so a resumed run continues identically.
            Held-out images are not transformed. A resumed run needs the same `repr`, so an object
            with Python's default one is refused. Not allowed with an `image_store`.
        optimizer: Makes the optimizer from parameter groups, each with its `lr` and `weight_decay`;
            None for AdamW. It needs a `repr` like `image_transform`.
        data_name: Name of the data on the model card; None for no name.
        resume: Continue from the last checkpoint in `output`. Options, weights, stores, captions,
            images (by name and size) and the number of processes must be unchanged.
        callbacks: Callbacks for the transformers Trainer of each fit.

    Returns:
        `output/model`.

    Raises:
        ValueError: Before any tower is loaded: there is no data, there is too little data for one
            batch, or the groups leave no negatives; the number of processes does not divide the
            global batch size; `output` belongs to another run, or a run is active in it; stores
            belong to another model or other data; or options conflict. Before training: the model
            no longer reproduces its golden embeddings. After training: the loss was always 0.
        FileExistsError: `output/model` exists.
        FloatingPointError: A loss, gradient or weight is not finite. No model is written.
        StageInterrupt: SIGINT or SIGTERM stopped the run after a checkpoint.

    Examples:
        >>> records = load_records("my-images")
        >>> model = align("tuned/model", records, "aligned",
        ...               caption_store="captions")  # doctest: +SKIP
    """
    plan = plan_align(
        output,
        config,
        caption_store=caption_store,
        image_store=image_store,
        inherit_from=inherit_from,
        teacher=teacher,
        loss=loss,
        image_transform=image_transform,
        optimizer=optimizer,
        resume=resume,
    )
    return run_alignment(plan, source, data, data_name=data_name, callbacks=callbacks)


@dataclass(frozen=True)
class AlignPlan:
    """Output, options, stores and loss of an alignment, checked for consistency."""

    output: Path
    config: AlignConfig
    loss: Loss
    resume: bool
    captions: EmbeddingStore | None
    images: EmbeddingStore | None
    teacher: EmbeddingStore | None
    labeled: ClassificationDataset | None
    kept: KeptTexts | None
    image_transform: ImageTransform | None
    optimizer: OptimizerFactory | None


def plan_align(
    output: str | Path,
    config: AlignConfig | None = None,
    *,
    caption_store: str | Path | EmbeddingStore | None = None,
    image_store: str | Path | EmbeddingStore | None = None,
    inherit_from: str | Path | EmbeddingStore | None = None,
    teacher: str | Path | None = None,
    loss: Loss | None = None,
    image_transform: ImageTransform | None = None,
    optimizer: OptimizerFactory | None = None,
    resume: bool = False,
) -> AlignPlan:
    """Run all checks that need neither the data nor the model of an alignment."""
    config, output = config or AlignConfig(), Path(output)
    stores = open_stores(config, caption_store, image_store, inherit_from)
    check_own_parts(config, image_transform, optimizer, has_images=image_store is not None)
    chosen = build_loss(config, loss)
    parameters = chosen.parameters() if isinstance(chosen, nn.Module) else ()
    if is_sharded() and any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            f"{type(chosen).__name__} has parameters, and FSDP does not train the parameters of a "
            "loss. Use the DDP configuration."
        )
    require_output(output, resume=resume, model=output / MODEL_FOLDER)
    labeled = None if config.zero_shot is None else load_labeled_images(config.zero_shot)
    return AlignPlan(
        output, config, chosen, resume, *stores, labeled,
        read_kept_texts(config, teacher, labeled), image_transform, optimizer,
    )  # fmt: skip


def run_alignment(
    plan: AlignPlan,
    source: Source,
    data: Sequence[CaptionedImage] | RecordStream,
    *,
    data_name: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Run the alignment that `plan_align` checked."""
    config, output = plan.config, plan.output
    if isinstance(data, RecordStream):
        check_stream(config, *(store is not None for store in (plan.images, plan.teacher)))
    else:
        data = RecordTable.from_records(data)
        check_data(data, batch_size=config.global_batch_size)
    device = choose_device(config.device)
    require_compilable(config, device)
    with (
        deterministic_kernels(config, device),
        lock_run(output),
        open_source(source, output) as model,
        TemporaryDirectory() as temporary,
    ):
        processor = LLM2CLIPProcessor.from_pretrained(model.folder)
        fingerprint = _require_fitting(model.folder, plan, processor)
        _verify_stores(plan)
        run_data = _open_data(plan, data, processor, Path(temporary))
        zero_shot = None
        if plan.labeled is not None:
            zero_shot = ZeroShotImages(plan.labeled, model.folder, processor)
        fit = AlignmentFit(
            model.folder, run_data, output, config, plan.loss, plan.resume, callbacks, zero_shot,
            plan.teacher, plan.kept, plan.optimizer,
        )  # fmt: skip
        inputs = {
            "source": model.name,
            "fingerprint": fingerprint,
            "caption_store": _identify_store(plan.captions),
            "image_store": _identify_store(plan.images),
            "inherit_from": _identify_store(plan.teacher),
            **_identify(fit, device),
        }
        require_same_run(output, config, inputs, resume=plan.resume)
        if PartialState().is_main_process:  # fails before hours of training, not after
            require_intact(model.folder, with_llm=config.text_training != "stored")
            require_disk_space(open_model_weights(model.folder), output)
        with float32_as_such(), stop_on_signals() as stop:
            if plan.kept is not None:
                fit = replace(fit, kept=plan.kept.embed(model.folder, processor, device))
                torch.cuda.empty_cache()  # stores move to the GPU if they fit in its free memory
            choice, trained = _choose(fit, inputs, stop)
            if trained is None:
                gc.collect()  # a Trainer is part of a reference cycle that holds the first model
                trained = refit(fit, choice, stop)
        if PartialState().is_main_process:
            _write_model(fit, trained, data_name, choice)
        PartialState().wait_for_everyone()
    return output / MODEL_FOLDER


def _open_data(
    plan: AlignPlan,
    data: RecordTable | RecordStream,
    processor: LLM2CLIPProcessor,
    folder: Path,
) -> RunData:
    config, transform = plan.config, plan.image_transform
    if config.min_crop_area is not None:
        transform = make_random_crop(processor, config.min_crop_area)
    if isinstance(data, RecordStream):
        return open_stream(
            data, processor, config, plan.captions, folder, image_transform=transform
        )
    return open_records(
        data, processor, config, plan.captions, plan.images, image_transform=transform
    )


def _require_fitting(folder: Path, plan: AlignPlan, processor: LLM2CLIPProcessor) -> dict[str, Any]:
    """Check that stores and options fit the model; return the model's fingerprint."""
    config = plan.config
    fingerprints: list[Any] = [{}, {}, {}]
    if PartialState().is_main_process:  # fingerprinting reads all weights
        text, vision = fingerprint_text(folder, processor), fingerprint_vision(folder, processor)
        fingerprints = [text, vision, fingerprint_model(folder, without_towers=True)]
    broadcast_object_list(fingerprints)
    for store, fingerprint in zip((plan.captions, plan.images), fingerprints, strict=False):
        if store is not None:
            store.require_fingerprint(fingerprint)
    if plan.teacher is not None:
        require_same_space(plan.teacher.folder, plan.teacher.manifest.fingerprint, folder)
    if plan.kept is not None:
        require_same_space(plan.kept.teacher, plan.kept.fingerprint, folder)
    of_model = LLM2CLIPConfig.from_pretrained(folder, local_files_only=True)
    require_dims(config.matryoshka_dims, width=of_model.projection_dim)
    if config.lock_text and "text_projection" in of_model.random_heads:
        raise ValueError(
            "lock_text freezes the text projection, but this model's is random. Align the model "
            "without lock_text first, or build it on an embedder with keep_embeddings."
        )
    if of_model.text_adapter_layers is None and not config.lock_text:
        raise ValueError(
            "The model keeps an embedder's own embeddings (build --keep-embeddings), but this "
            "alignment would change them. Set lock_text=True."
        )
    return dict(zip(("text", "vision", "head"), fingerprints, strict=True))


def _verify_stores(plan: AlignPlan) -> None:
    """Verify every byte of the stores once per machine, not in every process and worker."""
    for store in (plan.captions, plan.images, plan.teacher):
        if store is not None:
            store.mark_verified(run_once_per_machine(store.verify))


def _choose(
    fit: AlignmentFit, inputs: dict[str, Any], stop: StopRequest
) -> tuple[Choice, dict[str, Tensor] | None]:
    """Train, select weights on held-out images, and record how the run ended.

    Return None instead of weights if a final fit on all images will produce the weights.
    """
    config, output = fit.config, fit.output
    arguments = make_training_arguments(output, config)
    batch_size, num_steps = _check_length(config, arguments.world_size, fit.data)
    PartialState().wait_for_everyone()  # all processes check the folder before one writes to it
    model, adapted = fit.load(arguments.device)
    notes = note_held_out(fit.data, fit.source)
    last = fit.find_checkpoint()
    if last is None:
        inheritance = inherit(fit, model, batch_size, arguments.device, stop)
        start = init_projections(model, fit.data, config, inheritance)
    else:
        start = ProjectionInit(**read_results(output)["start"])
        repeat_init(model, fit.data, config, start, output)
    length = RunLength(
        num_steps=num_steps,
        batch_size=batch_size,
        learning_rate=config.learning_rate or start.default_learning_rate,
        # A new adapter is the identity. It is trained only after the projections have settled.
        adapter_begin=round(_RATIO_BEFORE_ADAPTER * num_steps) if start.has_new_adapter else 0,
    )
    fit.make_ready(model, length, arguments.device)
    if PartialState().is_main_process:
        if config.text_training != "stored":
            warn_of_padding(arguments.device, config.precision)
        write_run_record(output, config, inputs, model=model)
        add_results(output, start=asdict(start))
        if start.inheritance is not None and last is None:
            # Resumed runs and the final fit also start from these weights.
            save_file(copy_text_side(model), output / INHERITED_FILE)
    best = _make_best_weights(fit, length, start, model)
    objective = None
    if best is None and length.num_trained and isinstance(fit.data, RecordData):
        objective = TrainingObjective(fit.data, size=length.batch_size, output=output)
    trainer = fit.train(model, arguments, length, stop, best_weights=best, objective=objective)
    _record_end(trainer, best, output, stop, notes)
    if objective is not None:
        objective.record("after")
    if best is None:
        choice = Choice(start, length, length.num_trained, 1.0)
        return choice, collect_weights(trainer, adapted, output)
    choice = Choice(start, length, best.best_step, best.best_share)
    is_source = best.best_step == 0 and start.cca is None  # the source's own weights are best
    is_refitted = fit.data.dataset.is_stored if config.refit is None else config.refit
    if is_refitted and not is_source:
        return choice, None
    PartialState().wait_for_everyone()  # one process writes the file
    return choice, collect_weights(trainer, adapted, output, best=load_file(best.file))


def _check_length(config: AlignConfig, num_processes: int, data: RunData) -> tuple[int, int]:
    """Check and return the global batch size and the number of steps."""
    batch_size = choose_batch_size(config, data.num_items, num_processes)
    check_processes(config, batch_size, num_processes)
    if data.num_items is not None:
        num_held_out = 0 if data.held_out is None else len(data.held_out.items)
        check_batch(batch_size, data.num_items, num_held_out)
    if num_steps := count_steps(config, data.num_items, batch_size):
        count_warmup_steps(config.warmup_steps, num_steps)
    return batch_size, num_steps


def _make_best_weights(
    fit: AlignmentFit, length: RunLength, start: ProjectionInit, model: AlignmentModel
) -> BestWeightsCallback | None:
    """Make the callback that evaluates on held-out images; None if no images are held out.

    If no tower runs, the callback also tries weights interpolated between the start and the trained
    weights. The callback does not interpolate from random weights, because they do not form a
    working model, or between sharded weights, because each attempt would gather them.
    """
    if fit.data.held_out is None:
        return None
    is_tried = (
        fit.data.dataset.is_stored
        and start.is_trained
        and not is_sharded()
        and fit.config.choose_by != "last_step"
    )
    return BestWeightsCallback(
        fit.data.held_out,
        fit.output,
        eval_steps=fit.config.eval_steps or max(1, length.num_steps // _NUM_EVALUATIONS),
        patience=fit.config.early_stopping_patience,
        patience_begin=length.adapter_begin,
        start=copy_trained(model) if is_tried else None,
        zero_shot=fit.zero_shot,
        choose_by=fit.config.choose_by,
    )


def _record_end(
    trainer: AlignmentTrainer,
    best: BestWeightsCallback | None,
    output: Path,
    stop: StopRequest,
    notes: dict[str, Any],
) -> None:
    """Record the results of a finished run; raise StageInterrupt if it was stopped."""
    state, data = trainer.state, trainer.data
    if best is not None:
        notes = {**notes, "num_shared_captions": data.count_shared_captions()}
    if isinstance(data, StreamData):
        report = data.collect_report()
        if trainer.args.should_save:
            add_results(output, stream=report)
    if best is None or not best.has_stopped_early:
        raise_if_stopped(trainer, output, stop)
    if best is not None and best.choose_by == "last_step" and best.best_step < state.global_step:
        state.max_steps = state.global_step  # a callback of the caller ended the run
        best.on_step_end(trainer.args, state, trainer.control)
    losses = [line["loss"] for line in state.log_history if "loss" in line]
    if losses and not any(losses):
        raise ValueError(
            f"The loss was 0 in all {state.global_step} steps because no image had a negative, so "
            "nothing was learned. Check the group_ids of the data, or increase the batch size."
        )
    if not trainer.args.should_save:
        return
    add_results(
        output,
        steps=state.global_step,
        final_loss=losses[-1] if losses else None,
        held_out=None if best is None else {**best.as_record(), **notes},
    )


def _measure_written(
    fit: AlignmentFit, data_name: str | None, folder: Path
) -> tuple[Sequence[CardResult], str | None]:
    """Evaluate a written model, with the rounded weights if the model is in half precision.

    A refitted model has trained on the held-out images, so the scores from before the refit remain
    the estimate of its quality.
    """
    output, held_out, device = fit.output, fit.data.held_out, choose_device(fit.config.device)
    written = fit.load_parts(folder, device)
    if fit.zero_shot is not None:
        written.trains_vision = fit.config.vision_training != "frozen"
        written.trains_text = fit.config.text_training == "lora"
        accuracy = fit.zero_shot.measure(written)
        add_results(output, zero_shot={**fit.zero_shot.identify(), "accuracy": accuracy})
    add_results(
        output,
        training_images=write_image_summary(
            fit.source, folder, fit.data, fit.config, name=data_name
        ),
    )
    results = read_results(output)
    is_rounded = LLM2CLIPConfig.from_pretrained(folder).dtype != torch.float32
    if held_out is not None and is_rounded and "refit" not in results:
        best = load_file(output / BEST_FILE)
        of_loss = {name: best[name] for name in best if name.startswith(f"{LOSS}.")}
        written.load_state_dict(of_loss, strict=False)
        inputs = embed_batches(written, held_out.iterate_batches(), device)
        record, scores = results["held_out"], held_out.score(written.loss, inputs)
        results["held_out"] = {**record, "best": asdict(scores), "in_training": record["best"]}
        add_results(output, held_out=results["held_out"])
    return make_card_results(results, data_name), make_caution(results)


def _write_model(
    fit: AlignmentFit, trained: dict[str, Tensor], data_name: str | None, choice: Choice
) -> None:
    kept = None
    if choice.step:
        kept = None if fit.kept is None else fit.kept.describe()
    elif choice.start.method == "model":  # the text side is the source's own
        kept = read_card_data(fit.source).kept_texts
    store = fit.data.dataset.caption_store
    folder = save_trained_model(
        fit.source,
        trained,
        fit.output / MODEL_FOLDER,
        training_data=[] if data_name is None else [data_name],
        languages=[] if store is None else sorted(set(store.langs)),
        kept_texts=kept,
        measure=partial(_measure_written, fit, data_name),
    )
    add_results(fit.output, has_golden_embeddings=(folder / GOLDEN_FILE).is_file())
    if choice.step:
        add_results(fit.output, share_changed_by_training=_measure_rounding(fit, trained))


def _measure_rounding(fit: AlignmentFit, trained: Mapping[str, Tensor]) -> dict[str, float]:
    """Measure each trained tower's share of weights that differ from the source after rounding."""
    source, shares = open_model_weights(fit.source), {}
    for tower in TOWERS:
        rounded = [
            (source[name], weight)
            for name, weight in trained.items()
            if name.startswith(f"{tower}.") and source[name].dtype != torch.float32
        ]
        if rounded:
            dtype, what = rounded[0][0].dtype, f"The training of the {tower}"
            counts = (
                (int((old.read() != new.to(old.dtype)).sum()), new.numel()) for old, new in rounded
            )
            shares[tower] = warn_of_rounding(
                counts, dtype, what=what, of_what="the entries of the weights that it trained"
            )
    return shares


def _identify(fit: AlignmentFit, device: torch.device) -> dict[str, Any]:
    """Describe what a run's results depend on: data, loss, processes and precision."""
    return {
        **fit.data.identify(),
        **({} if fit.zero_shot is None else {"zero_shot": fit.zero_shot.identify()}),
        **({} if fit.kept is None else {"keep_texts": fit.kept.identify()}),
        "loss_class": identify_callable(fit.loss),
        **{
            name: re.sub(" at 0x[0-9a-f]+", "", repr(passed))  # settings, without addresses
            for name, passed in (
                ("image_transform", fit.data.dataset.image_transform),
                ("optimizer", fit.optimizer),
            )
            if passed is not None
        },
        "num_processes": PartialState().num_processes,
        "is_sharded": is_sharded(),
        "in_bfloat16": computes_in_bfloat16(fit.config.precision, device),
        **({"frozen_towers": "bfloat16"} if fit.rounds_towers(device) else {}),
        **({"float32_products": "ieee"} if device.type == "cuda" else {}),
    }


def _identify_store(store: EmbeddingStore | None) -> dict[str, str] | None:
    """Identify a store by its folder and its manifest, which holds the hash of every file."""
    if store is None:
        return None
    return {"folder": str(store.folder), "manifest": hash_file(store.folder / MANIFEST_FILE)}
