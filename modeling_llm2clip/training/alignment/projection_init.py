"""Where the projections start: as they are in the model, or from canonical correlation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...configs.align_config import AlignConfig
from ...data.records.record_table import Array
from .alignment_data import AlignmentDataset, list_pairs
from .alignment_model import AlignmentModel
from .cca_init import FittedCCA, init_projections_by_cca
from .held_out import HeldOutImages, fit_temperature
from .run_data import RecordData, RunData

# These many pairs determine a linear fit of embeddings of a few thousand elements, and fit memory.
_MAX_PAIRS = 50_000
# Trained projections are only refined; random weights have a long way to go.
_RATE_FROM_TRAINED = 1e-4
_RATE_FROM_RANDOM = 1e-3


@dataclass(frozen=True)
class ProjectionInit:
    """Where the projections of a run started, for its record.

    Attributes:
        method: model or cca.
        cca: How the canonical correlation was fitted; None with `method="model"`.
        is_trained: Whether the projections were trained or fitted, rather than random.
        has_new_adapter: Whether the blocks of the text adapter were made the identity.
        log_scale: Logarithm of the inverse temperature that suits held-out images; None where it
            was not fitted.
    """

    method: str
    cca: dict[str, Any] | None
    is_trained: bool
    has_new_adapter: bool
    log_scale: float | None = None

    @property
    def default_learning_rate(self) -> float:
        """Peak learning rate that suits this start."""
        return _RATE_FROM_TRAINED if self.is_trained else _RATE_FROM_RANDOM


def init_projections(
    model: AlignmentModel,
    data: RunData,
    config: AlignConfig,
) -> ProjectionInit:
    """Choose where the projections start, and set them in place."""
    held_out, trained = data.held_out, model.config.projections_trained
    unchanged = ProjectionInit("model", None, trained, has_new_adapter=False)
    wanted: str = config.projection_init
    if wanted == "auto":
        is_possible = data.is_stored and model.visual_projection.bias is not None
        wanted = "cca" if is_possible and not (trained and held_out is None) else "model"
    if wanted == "model":
        if config.max_steps == 0 and not trained:
            raise ValueError(
                "max_steps=0 writes the closed form, and this model's random projections cannot "
                "have it: it needs a bias in the image projection. Build the model with "
                "visual_projection_bias=True, or train it."
            )
        return unchanged
    before: dict[str, Tensor] = {}
    loss_before = None
    if config.projection_init == "auto" and trained and held_out is not None:
        before = {name: value.detach().clone() for name, value in model.head.items()}
        loss_before = _fit_temperature(model, held_out)[1]
    fitted = _fit_cca(model, data, config)
    log_scale = loss = None
    if held_out is not None:
        log_scale, loss = _fit_temperature(model, held_out)
        _set_temperature(model, log_scale)
    if loss is not None and loss_before is not None and loss_before <= loss:
        model.load_state_dict(before, strict=False)
        return unchanged
    return ProjectionInit(
        "cca",
        _describe(fitted),
        is_trained=True,
        has_new_adapter=not model.config.text_adapter_trained,
        log_scale=log_scale,
    )


def repeat_init(
    model: AlignmentModel, data: RunData, config: AlignConfig, chosen: ProjectionInit
) -> ProjectionInit:
    """Start on other images as a run chose to start, and set the projections in place."""
    if chosen.cca is None:
        return chosen
    shrinkages = (chosen.cca["text_shrinkage"], chosen.cca["image_shrinkage"])
    fitted = _fit_cca(model, data, config, shrinkages)
    if chosen.log_scale is not None:
        _set_temperature(model, chosen.log_scale)
    return replace(chosen, cca=_describe(fitted))


def _fit_cca(
    model: AlignmentModel,
    data: RunData,
    config: AlignConfig,
    shrinkages: tuple[float, float] | None = None,
) -> FittedCCA:
    assert isinstance(data, RecordData)  # a stream is not stored
    *pairs, text_keys = _pair_embeddings(data.dataset, data.items, config.seed)
    return init_projections_by_cca(model, *pairs, text_keys=text_keys, shrinkages=shrinkages)


def _set_temperature(model: AlignmentModel, log_scale: float) -> None:
    with torch.no_grad():
        model.logit_head.log_scale.fill_(log_scale)


def _describe(fitted: FittedCCA) -> dict[str, Any]:
    return {name: value for name, value in asdict(fitted).items() if value is not None}


def _fit_temperature(model: AlignmentModel, held_out: HeldOutImages) -> tuple[float, float]:
    """Find the temperature that suits the held-out pairs best, and their loss at it."""
    return fit_temperature(model.loss, held_out.embed(model, model.device, nullcontext))


def _pair_embeddings(
    dataset: AlignmentDataset, items: Sequence[int] | Array, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Captions, their images, groups and text keys; a random sample of very many pairs."""
    generator = torch.Generator().manual_seed(seed)
    # Every item has at least one caption, so that more items are not needed.
    sampled = torch.randperm(len(items), generator=generator)[:_MAX_PAIRS].numpy()
    chosen = np.asarray(items)[sampled]
    short, long = dataset.records.count_texts(chosen)
    ends = np.cumsum(short + long)
    num_items = int(np.searchsorted(ends, _MAX_PAIRS)) + 1  # the one that reaches the limit, too
    pairs, numbers = list_pairs((short + long)[:num_items], chosen[:num_items])
    embeds = dataset.read_pairs(pairs, numbers)
    return (
        embeds["caption_embeds"],
        embeds["vision_embeds"],
        dataset.read_group_ids(pairs),
        dataset.read_text_keys(pairs, numbers),
    )
