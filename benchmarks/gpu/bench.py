"""What the sections of `gpu.py` share: device, models, clocks, and the rows that they write."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.full_width import draw_texts, write_model
from modeling_llm2clip.encoding.devices import count_free_bytes

_EVERY_LAYER = 10**6
# A run fails below this share of the speed that was recorded on the same device.
_LEAST_OF_RECORDED = 0.8
_USED_OF_FREE = 0.8  # the rest is for temporaries and fragments


def fit_batch(free: float, held: float, each: float, most: int) -> int:
    """Return the largest power of two of samples, from 2 to `most`, that fits.

    Args:
        free: Free memory, GiB.
        held: GiB of weights, gradients and moments.
        each: GiB that the backward pass keeps of a sample.
        most: Samples that are wanted.
    """
    fitting = int(min(most, (_USED_OF_FREE * free - held) / each))
    return 1 << max(2, fitting).bit_length() - 1


@dataclass
class Bench:
    """One run.

    Attributes:
        device: What is measured.
        tiny: Whether everything is small, to see that it works.
        folder: An empty folder for models and stores.
        recorded: Rows of an earlier run on the same device, by name.
        rows: What was measured.
        failures: What a run must not end with, by row or section.
    """

    device: torch.device
    tiny: bool
    folder: Path
    recorded: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def kept_rows(self) -> dict[str, Any]:
        """Rows to record: a failed one never replaces the row of an earlier run."""
        failed = {name: self.recorded[name] for name in self.failures if name in self.recorded}
        return {**self.recorded, **self.rows, **failed}

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def llms(self) -> dict[str, str]:
        """Sizes of LLMs by their names in rows."""
        return {"1B": "tiny"} if self.tiny else {"1B": "1B", "8B": "8B"}

    @property
    def vision(self) -> str:
        return "tiny" if self.tiny else "L/14-336"

    def choose(self, tiny: int, full: int) -> int:
        """Choose a number by the size of the run."""
        return tiny if self.tiny else full

    def fit(self, tiny: int, most: int, *, held: float, each: float) -> int:
        """Choose a number of samples by the size of the run and by the free memory."""
        gc.collect()
        if self.tiny or not self.on_gpu:
            return self.choose(tiny, most)
        torch.cuda.empty_cache()
        return fit_batch(count_free_bytes(self.device) / 2**30, held, each, most)

    def begin_peak(self) -> None:
        """Forget the highest memory so far."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def note_peak(self, name: str, goal: float) -> None:
        """Note the highest memory since `begin_peak`; a CPU has none."""
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated() / 1e9
            self.note_speed(f"{name}, peak", peak, "GB", goal=goal, lower=True)

    def model(
        self, llm: str, *, layers: int = _EVERY_LAYER, vision_layers: int | None = None
    ) -> Path:
        """Return the folder of a model with random weights: a 1B in float32, an 8B in bfloat16.

        `build` and `convert` write float32 by default, which an 8B with its copies does not fit in.
        """
        most = layers if vision_layers is None else vision_layers
        folder = self.folder / f"{llm}-{layers}-{most}"
        if not folder.is_dir():
            dtype = torch.bfloat16 if llm == "8B" else torch.float32
            sizes = self.llms[llm], self.vision
            write_model(folder, *sizes, self.device, dtype, layers=(layers, most))
        return folder

    def captions(self, kind: str, tiny: int, full: int) -> list[str]:
        """Draw captions."""
        return draw_texts(kind, self.choose(tiny, full))

    def time(self, work: Callable[[], object], *, rounds: int = 5) -> float:
        """Return the median seconds of some rounds, after two that do not count."""
        for _ in range(1 if self.tiny else 2):
            work()
        return statistics.median(self._time_once(work) for _ in range(2 if self.tiny else rounds))

    def _time_once(self, work: Callable[[], object]) -> float:
        if not self.on_gpu:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def wait(self) -> float:
        """Wait for the device, and return the time."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def note_speed(
        self, name: str, value: float, unit: str, *, goal: float | None = None, lower: bool = False
    ) -> None:
        """Note a speed; it is said to miss its goal, and fails far below what was recorded.

        Args:
            name: Of the row, which begins with its section.
            value: Measured.
            unit: Of the value.
            goal: What it should reach on an H100.
            lower: Whether lower values are better.
        """
        row: dict[str, Any] = {"value": float(f"{value:.4g}"), "unit": unit}
        text = f"{name}: {value:,.4g} {unit}"
        if goal is not None and not self.tiny:
            row |= {"goal": goal, "met": value <= goal if lower else value >= goal}
            text += f", goal {goal:,g}" + ("" if row["met"] else " MISSED")
        before = self.recorded.get(name, {}).get("value")
        if before and not self.tiny:
            share = before / value if lower else value / before
            if share < _LEAST_OF_RECORDED:
                self.failures[name] = f"{share:.0%} of the recorded {before:,g} {unit}"
        self._add(name, row, text)

    def note_parity(self, name: str, value: float, limit: float, *, at_least: bool) -> None:
        """Note how near results are; the run fails beyond the limit."""
        holds = value >= limit if at_least else value <= limit
        bound = "at least" if at_least else "at most"
        if not holds:
            self.failures[name] = f"{value:.6g}, {bound} {limit:g} is needed"
        row = {"value": value, "limit": limit, "holds": holds}
        self._add(name, row, f"{name}: {value:.6g} ({bound} {limit:g})")

    def note(self, name: str, value: object, unit: str) -> None:
        """Note a number that has no goal."""
        self._add(name, {"value": value, "unit": unit}, f"{name}: {value} {unit}")

    def _add(self, name: str, row: dict[str, Any], text: str) -> None:
        self.rows[name] = row
        print(text, flush=True)
