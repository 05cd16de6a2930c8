"""Train the text side to reproduce the vision tower's own text encoder (ProCLIP).

This is stage 1 of arXiv:2510.18795 v3. This stage runs before contrastive training and uses only
stored embeddings: a ridge regression from the caption embeddings to the teacher's embeddings,
followed by gradient descent on `distill`. The image side does not change. Captions that exceed the
teacher's token limit are skipped.

The authors' code (VisionXLab/ProCLIP at 2a41f39, `training/train.py`) starts from random weights.
That code compares a short and a web caption of each image with the teacher, but compares pairwise
distances only between short captions; here, a batch holds any captions. That code sums over a
process's batch; here, the sums are divided by the number of captions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from ..._suggestions import counted
from ...data.store.embedding_store import EmbeddingStore
from ...encoding.devices import runs_ahead
from ...scheduling.graceful_stop import StopRequest
from ..finite_steps import FiniteSteps, spread_nonfinite
from ..losses.terms import distill
from .alignment_data import list_pairs
from .alignment_fit import AlignmentFit
from .alignment_model import AlignmentModel, skip_identity_blocks
from .projection_init import (
    RATE_FROM_TRAINED,
    SHRINKAGES,
    Side,
    apply_adapter,
    fill_projection,
    make_identity,
    require_varied,
)
from .run_data import RecordData

# Enough captions for a linear fit of a few thousand dimensions, and few enough for memory.
_MAX_CAPTIONS_FITTED = 50_000
_MAX_CAPTIONS_MEASURED = 2_000
_FEWEST = 2
_NUM_EVALUATIONS = 20
_WARMUP = 0.1
# Standard deviation of the noise on caption embeddings, relative to their norm. Noise as large as
# `caption_noise` hides the differences between captions and leads away from the closed form.
_NOISE = 0.1
# Used if no captions are held out to choose the shrinkage.
_DEFAULT_SHRINKAGE = 0.1


def inherit(
    fit: AlignmentFit,
    model: AlignmentModel,
    batch_size: int,
    device: torch.device,
    stop: StopRequest,
) -> dict[str, Any] | None:
    """Distill the teacher into the text side in place; return a record, or None without a teacher.

    The weights with the lowest distance on captions of held-out images are kept, or the last
    weights if no images are held out. Every process does the same computation.
    """
    config, teacher = fit.config, fit.teacher
    if teacher is None:
        return None
    assert isinstance(fit.data, RecordData)
    captions = _Captions(fit.data, teacher, batch_size, seed=config.seed)
    before = captions.measure(model)
    shrinkage, fitted = _fit_ridge(model, captions)
    is_main_process = PartialState().is_main_process
    best, best_step = copy_text_side(model), 0
    lowest, steps = fitted, config.inherit_steps
    parts = nn.ModuleList([model.text_adapter, model.text_projection]).to(device)
    optimizer = torch.optim.AdamW(
        parts.parameters(),
        lr=config.learning_rate or RATE_FROM_TRAINED,
        weight_decay=config.weight_decay,
        fused=True,
    )
    finite_steps = FiniteSteps(device, first_step=1)
    skips = finite_steps.attach(optimizer)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(_WARMUP * steps), steps)
    every = max(1, steps // _NUM_EVALUATIONS)
    batches = zip(range(1, steps + 1), captions.iterate(device), strict=False)
    for step, (embeds, targets) in tqdm(
        batches, "inherit", steps, unit=" steps", disable=None if is_main_process else True
    ):
        stop.raise_interrupt(
            "Stopped during the inheritance of the text side, which is not saved.",
            resume=False,
            is_main_process=is_main_process,
        )
        optimizer.zero_grad()
        spread_nonfinite(distill(model.to_text_embeds(embeds), targets)).backward()
        finite_steps.observe(nn.utils.clip_grad_norm_(parts.parameters(), config.max_grad_norm))
        if (is_measured := step % every == 0 or step == steps) or not skips:
            _require_finite(finite_steps, learning_rate=optimizer.defaults["lr"])
        optimizer.step()
        schedule.step()
        if is_measured:
            distance = captions.measure(model)
            if distance < lowest or not captions.is_held_out:
                best, best_step, lowest = copy_text_side(model), step, distance
    parts.to(model.visual_projection.weight.device)
    model.load_state_dict(best, strict=False)
    return {
        "num_captions": captions.num_trained,
        "num_too_long": captions.num_too_long,
        "shrinkage": shrinkage,
        "is_held_out": captions.is_held_out,
        "num_measured": len(captions.measured[0]),
        "distance": {"before": before, "closed_form": fitted, "after": lowest},
        "best_step": best_step,
        "steps": steps,
    }


def _require_finite(steps: FiniteSteps, *, learning_rate: float) -> None:
    if broken := steps.read():
        raise FloatingPointError(
            f"The gradient norm is {broken[1]['norm'].item()} at step {broken[0]} of the "
            f"inheritance. Lower the learning rate ({learning_rate})."
        )


def copy_text_side(model: AlignmentModel) -> dict[str, Tensor]:
    return {
        name: value.detach().cpu().clone()
        for name, value in model.state_dict().items()
        if name.startswith(("text_adapter.", "text_projection."))
    }


class _Captions:
    """Captions that have a teacher embedding, split into training and evaluation captions.

    Attributes:
        fitted: Embeddings of a sample of training captions, from the LLM and from the teacher.
        measured: Such embeddings of held-out captions, or of training captions if no captions are
            held out.
        is_held_out: True if the captions in `measured` are held out.
        num_too_long: Number of captions without a teacher embedding.
        num_trained: Number of training captions with a teacher embedding.
    """

    def __init__(
        self, data: RecordData, teacher: EmbeddingStore, batch_size: int, *, seed: int
    ) -> None:
        dataset = data.dataset
        assert dataset.caption_store is not None
        self._stores, self._batch_size = (dataset.caption_store, teacher), batch_size
        self._seed, self._generator = seed, torch.Generator().manual_seed(seed)
        self.num_too_long = teacher.manifest.num_truncated
        num_rows = teacher.manifest.num_rows
        is_held = torch.zeros(num_rows, dtype=torch.bool)
        if data.held_out is not None:
            items = data.held_out.items
            short, long = dataset.count_texts(items)
            rows = dataset.caption_rows(*list_pairs(short + long, items))
            keys = teacher.read_text_keys(num_rows)  # held-out captions may recur in other shards
            is_held = torch.from_numpy(np.isin(keys, keys[rows]))
        shuffled = torch.randperm(len(is_held), generator=self._generator)
        self._rows = shuffled[~is_held[shuffled]]
        self.fitted = self._read(self._rows[:_MAX_CAPTIONS_FITTED])
        if len(self.fitted[0]) < _FEWEST:
            raise ValueError(
                f"{teacher.folder}: only {counted(len(self.fitted[0]), 'caption')} of "
                f"{len(self._rows):,} to train on fit the teacher's token limit, so there is "
                "nothing to inherit. Add shorter captions."
            )
        held_rows = shuffled[is_held[shuffled]]
        num_held = int(teacher.read(held_rows.numpy()).any(dim=1).sum())
        self.num_trained = num_rows - self.num_too_long - num_held
        held = self._read(held_rows[:_MAX_CAPTIONS_MEASURED])
        self.is_held_out = len(held[0]) > 0
        trained = tuple(part[:_MAX_CAPTIONS_MEASURED] for part in self.fitted)
        self.measured = held if self.is_held_out else trained

    @torch.no_grad()
    def measure(self, model: AlignmentModel) -> float:
        """Measure the mean distance to the teacher, in batches of the training batch size."""
        device, total = model.text_projection.weight.device, 0.0
        parts = (part.to(device).split(self._batch_size) for part in self.measured)
        with skip_identity_blocks(model):
            for embeds, targets in zip(*parts, strict=True):
                total += len(embeds) * float(distill(model.to_text_embeds(embeds), targets))
        return total / len(self.measured[0])

    def iterate(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches endlessly on a device; an asynchronous device also generates the noise."""
        noise = self._generator
        if runs_ahead(device):
            noise = torch.Generator(device).manual_seed(self._seed)
        while True:
            order = torch.randperm(len(self._rows), generator=self._generator)
            for rows in self._rows[order].split(self._batch_size):
                embeds, targets = (part.to(device) for part in self._read(rows))
                if len(embeds):
                    normal = torch.randn(embeds.shape, generator=noise, device=noise.device)
                    length = embeds.norm(dim=1, keepdim=True) * embeds.shape[1] ** -0.5
                    yield embeds + _NOISE * length * normal.to(device), targets

    def _read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        captions, teacher = self._stores
        targets = teacher.read(rows.numpy())
        has_teacher = targets.any(dim=1)
        return captions.read(rows[has_teacher].numpy()), targets[has_teacher]


@torch.no_grad()
def _fit_ridge(model: AlignmentModel, captions: _Captions) -> tuple[float, float]:
    """Fit the text projection by ridge regression; return the shrinkage and teacher distance.

    The blocks of an untrained adapter are set to the identity.
    """
    embeds, targets = captions.fitted
    require_varied(captions=embeds, teacher=targets)
    if "text_adapter" in model.config.random_heads:
        make_identity(model.text_adapter)
    adapted = apply_adapter(model, embeds)
    targets = targets.to(adapted.device)
    side, mean = Side(adapted), targets.mean(0).double()
    cross = side.rotate(adapted).double().T @ (targets - mean) / len(targets)

    def solve(shrinkage: float) -> float:
        weight = (side.directions @ (side.whiten(shrinkage).square()[:, None] * cross)).T
        fill_projection(model.text_projection, weight, mean - weight @ side.mean.double())
        return captions.measure(model)

    shrinkage = _DEFAULT_SHRINKAGE
    if captions.is_held_out:
        shrinkage = min(SHRINKAGES, key=solve)
    return shrinkage, solve(shrinkage)
