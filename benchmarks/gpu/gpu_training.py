"""Sections of `gpu.py` that train: `align` from stores and with a tower, and `finetune-llm`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.full_width import PROMPT_TOKENS, draw_lengths, draw_texts
from benchmarks.gpu.goals import (
    ALIGN_OF_BARE_LOOP,
    ALIGN_STEPS,
    FINETUNE_TOKENS,
    TOWER_IMAGES,
    TRAINING_GB,
)
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.finetune_config import FinetuneConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.finetuning.finetune_llm import finetune_llm
from modeling_llm2clip.training.losses.pairs import ContrastiveLoss

_MOST_STEPS = 10**6
# What a backward pass keeps, estimated: the storages that autograd saved for one more layer of full
# width on a CPU, under autocast. LoRAs are on all linear layers; attention keeps no scores.
_LAYERS = {"1B": 16, "8B": 32}
_KIB_OF_TOKEN = {"1B": 110, "8B": 200}
_KIB_BETWEEN = 8  # layers, of a token: what recomputation keeps
_HELD_GIB = {"1B": 6, "8B": 16}
_MIB_OF_IMAGE, _MIB_BETWEEN, _TOWER_LAYERS, _TOWER_GIB = 29, 2.25, 24, 10


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Times the steps of a run after the first ones.

    Args:
        bench: The run.
        skipped: Steps that do not count.
        on_begin: Called when the counted steps begin.
    """

    def __init__(self, bench: Bench, skipped: int, on_begin: Callable[[], object] = int) -> None:
        self._bench, self._skipped, self._on_begin = bench, skipped, on_begin
        self._begin = self._end = 0.0
        self._steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Note the time at the first and at the last step."""
        if state.global_step == self._skipped:
            self._on_begin()
            self._begin = self._bench.wait()
        elif state.global_step == state.max_steps:
            self._end = self._bench.wait()
            self._steps = state.max_steps - self._skipped

    @property
    def steps_per_second(self) -> float:
        return self._steps / (self._end - self._begin)


def estimate_token_gib(llm: str, *, recomputes: bool) -> float:
    """Estimate the memory that `finetune-llm` keeps of a token, GiB.

    Args:
        llm: Size of the LLM.
        recomputes: Whether layers are recomputed, so one is kept at a time.
    """
    layers, each = _LAYERS[llm], _KIB_OF_TOKEN[llm]
    return (_KIB_BETWEEN * layers + each if recomputes else each * layers) / 2**20


def estimate_image_gib(*, recomputes: bool) -> float:
    """Estimate the memory that the trained tower keeps of an image, GiB.

    Args:
        recomputes: Whether layers are recomputed, so one is kept at a time.
    """
    each, layers = _MIB_OF_IMAGE, _TOWER_LAYERS
    return (_MIB_BETWEEN * layers + each if recomputes else each * layers) / 2**10


def prepare_align(bench: Bench, llm: str, count: int, *, trains_tower: bool) -> Path:
    """Write records, a model with the heads of a size, and stores of its widths.

    Args:
        bench: The run.
        llm: Size of the LLM, of which one layer is enough.
        count: Number of records.
        trains_tower: Whether the vision tower has all layers, instead of one.
    """
    from benchmarks.scale.scale_records import write_records
    from benchmarks.scale.scale_stages import write_stores

    folder = bench.folder / f"align-{llm}-{trains_tower}"
    if not folder.is_dir():
        model = bench.model(llm, layers=1, vision_layers=_TOWER_LAYERS if trains_tower else None)
        write_records(folder / str(count), count)
        (folder / "model").symlink_to(model)
        config = AlignmentModel.config_class.from_pretrained(model)
        widths = {
            "caption_embeds": config.text_width,
            "vision_embeds": config.vision_config.hidden_size,
        }
        write_stores(folder, count, widths)
    return folder


def run_align(
    bench: Bench, llm: str, batch: int, steps: int, *callbacks: Any, **options: Any
) -> None:
    """Align from both stores, or from captions alone if the tower is trained.

    Args:
        bench: The run.
        llm: Size of the LLM, whose heads are trained.
        batch: Pairs in a step.
        steps: Number of steps.
        callbacks: Of the Trainer.
        options: More options of `AlignConfig`.
    """
    trains_tower = "vision_training" in options
    # 32 of the largest steps: a run goes through few epochs, as one of millions of records does.
    count = bench.choose(256, 16_384 if trains_tower else 131_072)
    folder = prepare_align(bench, llm, count, trains_tower=trains_tower)
    config = AlignConfig(
        max_steps=steps, global_batch_size=batch, held_out_ratio=0.0, projection_init="model",
        save_steps=_MOST_STEPS, device=str(bench.device), report_to=("none",), **options,
    )  # fmt: skip
    number = sum(1 for _ in bench.folder.glob("aligned-*"))
    align(
        folder / "model", load_records(folder / str(count), require_images=trains_tower),
        bench.folder / f"aligned-{number}", config, callbacks=callbacks,
        caption_store=folder / f"captions-{count}",
        image_store=None if trains_tower else folder / f"images-{count}",
    )  # fmt: skip


def measure_align(bench: Bench) -> None:
    """Measure steps per second of `align`, beside a bare loop over tensors on the device."""
    for llm in bench.llms:
        for batch in (512, 4096):
            size = bench.choose(batch // 64, batch)
            skipped, steps = bench.choose(2, 30), bench.choose(4, 150)
            clock = StepClock(bench, skipped)
            run_align(bench, llm, size, skipped + steps, clock)
            rate = clock.steps_per_second
            name = f"align {llm}, {batch} pairs"
            bench.note_speed(name, rate, "steps/s", goal=ALIGN_STEPS.get((llm, batch)))
            share = rate * _time_bare_step(bench, llm, size)
            bench.note_speed(f"{name}, of a bare loop", share, "times", goal=ALIGN_OF_BARE_LOOP)


def measure_tower(bench: Bench) -> None:
    """Measure images per second and peak memory of `align` with a trained L/14-336.

    The images are small PNG files, which take less time to decode than photographs.
    """
    for recomputes in (True, False):
        each = estimate_image_gib(recomputes=recomputes)
        size = bench.fit(4, 512, held=_TOWER_GIB, each=each)
        skipped, steps = bench.choose(1, 3), bench.choose(2, 8)
        clock = StepClock(bench, skipped, bench.begin_peak)
        run_align(
            bench, "1B", size, skipped + steps, clock,
            vision_training="full", gradient_checkpointing=recomputes,
        )  # fmt: skip
        name = f"tower L/14-336, {size} images" + (", recomputed" if recomputes else "")
        rate = clock.steps_per_second * size
        bench.note_speed(name, rate, "images/s", goal=TOWER_IMAGES[recomputes])
        bench.note_peak(name, TRAINING_GB)


def _time_bare_step(bench: Bench, llm: str, size: int) -> float:
    """Time forward, backward and optimizer on tensors that are there."""
    config = AlignmentModel.config_class.from_pretrained(bench.model(llm, layers=1))
    with bench.device:
        model = AlignmentModel(config, with_llm=False, with_vision_tower=False)
    model.loss = ContrastiveLoss()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=bench.on_gpu)
    widths = {
        "caption_embeds": config.text_width,
        "vision_embeds": config.vision_config.hidden_size,
    }
    inputs = {name: torch.randn(size, width, device=bench.device) for name, width in widths.items()}
    ids = torch.arange(size, device=bench.device)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.on_gpu):
            loss, _ = model({**inputs, "group_ids": ids, "text_keys": ids})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return bench.time(step, rounds=20)


def measure_finetune(bench: Bench) -> None:
    """Measure real tokens per second and peak memory of `finetune-llm` on mixed captions."""
    for llm in bench.llms:
        for recomputes in (True, False):
            _measure_finetune(bench, llm, recomputes=recomputes)


def _measure_finetune(bench: Bench, llm: str, *, recomputes: bool) -> None:
    lengths = draw_lengths("mixed", 1000)
    each = 2 * sum(lengths) / len(lengths) * estimate_token_gib(llm, recomputes=recomputes)
    pairs = bench.fit(4, 256, held=_HELD_GIB[llm], each=each)
    skipped, steps = bench.choose(1, 3), bench.choose(2, 20 if llm == "1B" else 6)
    texts = draw_texts("mixed", 2 * (bench.choose(16, 64) + pairs * (skipped + steps)))
    records = [
        CaptionedImage(None, str(number), str(number), captions=tuple(texts[2 * number :][:2]))
        for number in range(len(texts) // 2)
    ]
    clock = StepClock(bench, skipped, bench.begin_peak)
    config = FinetuneConfig(
        max_steps=skipped + steps, per_device_train_batch_size=pairs, merge=False,
        num_held_out=bench.choose(4, 32), save_steps=_MOST_STEPS, device=str(bench.device),
        report_to=("none",), gradient_checkpointing=recomputes,
    )  # fmt: skip
    output = bench.folder / f"tuned-{llm}-{recomputes}"
    finetune_llm(bench.model(llm), records, output, config, callbacks=[clock])
    mean_tokens = sum(len(text.split()) + PROMPT_TOKENS for text in texts) / len(texts)
    rate = clock.steps_per_second * 2 * pairs * mean_tokens
    name = f"finetune-llm {llm}, {pairs} pairs" + (", recomputed" if recomputes else "")
    bench.note_speed(name, rate, "real tokens/s", goal=FINETUNE_TOKENS[llm][recomputes])
    bench.note_peak(name, TRAINING_GB)
