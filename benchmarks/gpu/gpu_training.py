"""Sections of `gpu.py` that train: `align` from stores, and `finetune-llm`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.full_width import PROMPT_TOKENS, draw_texts
from benchmarks.gpu.goals import ALIGN_OF_BARE_LOOP, ALIGN_STEPS, FINETUNE_GB, FINETUNE_TOKENS
from modeling_llm2clip.configs.align_config import AlignConfig
from modeling_llm2clip.configs.finetune_config import FinetuneConfig
from modeling_llm2clip.data.records.record_loading import load_records
from modeling_llm2clip.data.records.records import CaptionedImage
from modeling_llm2clip.training.alignment.align import align
from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
from modeling_llm2clip.training.finetuning.finetune_llm import finetune_llm
from modeling_llm2clip.training.losses.pairs import ContrastiveLoss

_MOST_STEPS = 10**6


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


def prepare_align(bench: Bench, llm: str, count: int) -> Path:
    """Write records, a model with the heads of a size, and stores of its widths.

    Args:
        bench: The run.
        llm: Size of the LLM, of which one layer is enough.
        count: Number of records.
    """
    from benchmarks.scale.scale_records import write_records
    from benchmarks.scale.scale_stages import write_stores

    folder = bench.folder / f"align-{llm}"
    if not folder.is_dir():
        model = bench.model(llm, layers=1)
        write_records(folder / str(count), count)
        (folder / "model").symlink_to(model)
        config = AlignmentModel.config_class.from_pretrained(model)
        widths = {
            "caption_embeds": config.text_width,
            "vision_embeds": config.vision_config.hidden_size,
        }
        write_stores(folder, count, widths)
    return folder


def run_align(bench: Bench, llm: str, batch: int, steps: int, *callbacks: Any) -> None:
    """Align from both stores.

    Args:
        bench: The run.
        llm: Size of the LLM, whose heads are trained.
        batch: Pairs in a step.
        steps: Number of steps.
        callbacks: Of the Trainer.
    """
    # 32 of the largest steps: a run goes through few epochs, as one of millions of records does.
    count = bench.choose(256, 131_072)
    folder = prepare_align(bench, llm, count)
    config = AlignConfig(
        max_steps=steps, global_batch_size=batch, held_out_ratio=0.0, projection_init="model",
        save_steps=_MOST_STEPS, device=str(bench.device), report_to=("none",),
    )  # fmt: skip
    number = sum(1 for _ in bench.folder.glob("aligned-*"))
    align(
        folder / "model", load_records(folder / str(count), require_images=False),
        bench.folder / f"aligned-{number}", config, callbacks=callbacks,
        caption_store=folder / f"captions-{count}", image_store=folder / f"images-{count}",
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
        pairs = bench.choose(4, 256)
        skipped, steps = bench.choose(1, 3), bench.choose(2, 20 if llm == "1B" else 8)
        texts = draw_texts("mixed", 2 * (bench.choose(16, 64) + pairs * (skipped + steps)))
        records = [
            CaptionedImage(None, str(number), str(number), captions=tuple(texts[2 * number :][:2]))
            for number in range(len(texts) // 2)
        ]
        clock = StepClock(
            bench, skipped, torch.cuda.reset_peak_memory_stats if bench.on_gpu else int
        )
        config = FinetuneConfig(
            max_steps=skipped + steps, per_device_train_batch_size=pairs, merge=False,
            num_held_out=bench.choose(4, 32), save_steps=_MOST_STEPS, device=str(bench.device),
            report_to=("none",),
        )  # fmt: skip
        finetune_llm(
            bench.model(llm), records, bench.folder / f"tuned-{llm}", config, callbacks=[clock]
        )
        mean_tokens = sum(len(text.split()) + PROMPT_TOKENS for text in texts) / len(texts)
        rate = clock.steps_per_second * 2 * pairs * mean_tokens
        name = f"finetune-llm {llm}, {pairs} pairs"
        bench.note_speed(name, rate, "real tokens/s", goal=FINETUNE_TOKENS[llm])
        if bench.on_gpu:
            peak = torch.cuda.max_memory_allocated() / 1e9
            bench.note_speed(f"{name}, peak", peak, "GB", goal=FINETUNE_GB, lower=True)
