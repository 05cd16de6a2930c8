"""Initialize the projections from the model or by canonical correlation analysis (CCA).

CCA finds the directions in which captions and images agree most, in closed form. Its quality
depends on the regularization of each side. The best regularization depends on the data, so it is
chosen by cross-validation. With a thousand dimensions per side, cross-validation takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..._suggestions import counted
from ...configs.align_config import AlignConfig
from ...encoding.devices import has_float64, has_room
from ...modeling_llm2clip import LLM2CLIPModel
from ..losses.loss import LossInputs, list_fitted
from ..run_folder import INHERITED_FILE
from .alignment_data import list_pairs
from .alignment_model import AlignmentModel, skip_identity_blocks
from .held_out import HeldOutImages, embed_batches, fit_start
from .run_data import RecordData, RunData

# Enough pairs for a linear fit of a few thousand dimensions, and few enough for memory.
_MAX_PAIRS = 50_000
# Limited because the inner layer of an adapter is several times as wide as its output.
_ROWS_OF_ADAPTER = 4096
# The closed form holds both sides, their copies in a fold, and one side centered in float64.
_BYTES_PER_NUMBER = 32
# Learning rates: trained projections are only refined; random weights need larger steps.
RATE_FROM_TRAINED = 1e-4
_RATE_FROM_RANDOM = 1e-3
# Candidate shrinkages, as shares of the mean variance added to every variance; two per decade.
SHRINKAGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_FIRST_TRIED = (2, 4)  # good values are usually nearby: 0.1 for texts, 1 for images
_NUM_FOLDS = 4
# Enough pairs to estimate ranks well, at a small cost compared to the fit.
_MAX_PAIRS_COMPARED = 1_000


@dataclass(frozen=True)
class ProjectionInit:
    """Record of the initialization of a run's projections.

    Attributes:
        method: `model`, `cca` or `inherited`.
        cca: Record of the CCA fit; None for the other methods.
        is_trained: True if the projections were trained or fitted, False if they are random.
        has_new_adapter: True if the blocks of the text adapter were set to the identity.
        log_scale: Logarithm of the inverse temperature, fitted on held-out images; None if the
            temperature was not fitted.
        inheritance: Record of how the text side learned a teacher's embeddings; None without a
            teacher.
        loss_parameters: Loss parameters that were fitted together with the temperature, by name.
    """

    method: str
    cca: dict[str, Any] | None
    is_trained: bool
    has_new_adapter: bool
    log_scale: float | None = None
    inheritance: Mapping[str, Any] | None = None
    loss_parameters: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def default_learning_rate(self) -> float:
        return RATE_FROM_TRAINED if self.is_trained else _RATE_FROM_RANDOM


@torch.no_grad()
def init_projections(
    model: AlignmentModel,
    data: RunData,
    config: AlignConfig,
    inheritance: Mapping[str, Any] | None = None,
) -> ProjectionInit:
    """Choose an initialization; set projections, loss parameters and temperature in place."""
    if inheritance is None:
        start = _choose_start(model, data, config)
    else:
        is_new = "text_adapter" in model.config.random_heads and not inheritance["best_step"]
        start = ProjectionInit(
            "inherited", None, is_trained=True, has_new_adapter=is_new, inheritance=inheritance
        )
    if data.held_out is None or (start.method == "model" and not list_fitted(model.loss)):
        return start
    # Random projections keep their scale: they would not learn at the temperature of lowest loss.
    fit = fit_start(model.loss, _embed(model, data.held_out), keep_scale=not start.is_trained)
    start = replace(start, log_scale=fit.log_scale, loss_parameters=fit.parameters)
    _set_loss_fit(model, start)
    return start


def _set_loss_fit(model: AlignmentModel, start: ProjectionInit) -> None:
    fitted = list_fitted(model.loss)
    for name, values in start.loss_parameters.items():
        fitted[name].copy_(torch.tensor(values))
    if start.log_scale is not None:
        model.logit_head.log_scale.fill_(start.log_scale)


def _choose_start(model: AlignmentModel, data: RunData, config: AlignConfig) -> ProjectionInit:
    held_out, trained = data.held_out, model.config.projections_trained
    unchanged = ProjectionInit("model", None, trained, has_new_adapter=False)
    has_bias = model.visual_projection.bias is not None
    is_possible = data.dataset.is_stored and has_bias and not config.lock_text
    is_of_use = not trained or held_out is not None or config.max_steps == 0
    is_auto = config.projection_init == "auto"
    if config.projection_init == "model" or (is_auto and not (is_possible and is_of_use)):
        if config.max_steps == 0:
            raise ValueError(
                "max_steps=0 writes the closed form, but this model cannot hold it because its "
                "image projection has no bias. Build the model with visual_projection_bias=True, "
                "or train it. For a model with the image projection of its CLIP "
                "(keep_projection), set inherit_from."
            )
        return unchanged
    before = {name: value.detach().clone() for name, value in model.head.items()}
    losses = []
    if is_auto and trained and held_out is not None:
        losses = [fit_start(model.loss, _embed(model, held_out)).loss]
    fitted = _fit_cca(model, data, config)
    if losses and held_out is not None:
        if losses[0] <= fit_start(model.loss, _embed(model, held_out)).loss:
            model.load_state_dict(before, strict=False)
            return unchanged
    is_new = "text_adapter" in model.config.random_heads
    return ProjectionInit("cca", fitted, is_trained=True, has_new_adapter=is_new)


@torch.no_grad()
def repeat_init(
    model: AlignmentModel, data: RunData, config: AlignConfig, chosen: ProjectionInit, run: Path
) -> ProjectionInit:
    """Repeat in place, on other images, the initialization that `init_projections` chose.

    Inherited weights are read from the folder of the run.
    """
    if chosen.inheritance is not None:
        model.load_state_dict(load_file(run / INHERITED_FILE), strict=False)
    _set_loss_fit(model, chosen)
    if chosen.cca is None:
        return chosen
    shrinkages = (chosen.cca["text_shrinkage"], chosen.cca["image_shrinkage"])
    return replace(chosen, cca=_fit_cca(model, data, config, shrinkages))


def _fit_cca(
    model: AlignmentModel,
    data: RunData,
    config: AlignConfig,
    shrinkages: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Fit the projections by CCA to captions and their images, sampling from large datasets."""
    assert isinstance(data, RecordData)  # a stream has no image store
    dataset, generator = data.dataset, torch.Generator().manual_seed(config.seed)
    # Every item has at least one caption, so this many items suffice.
    chosen = data.items[torch.randperm(data.num_items, generator=generator)[:_MAX_PAIRS].numpy()]
    short, long = dataset.records.count_texts(chosen)
    ends = np.cumsum(short + long)
    num_items = int(np.searchsorted(ends, _MAX_PAIRS)) + 1  # and the item that reaches the limit
    pairs, numbers = list_pairs((short + long)[:num_items], chosen[:num_items])
    embeds = dataset.read_pairs(pairs, numbers)
    return init_projections_by_cca(
        model,
        embeds["caption_embeds"],
        embeds["vision_embeds"],
        dataset.read_group_ids(pairs),
        text_keys=dataset.read_text_keys(pairs, numbers),
        shrinkages=shrinkages,
    )


def _embed(model: AlignmentModel, held_out: HeldOutImages) -> LossInputs:
    return embed_batches(model, held_out.iterate_batches(), model.device)


@torch.no_grad()
def init_projections_by_cca(
    model: LLM2CLIPModel,
    caption_embeds: Tensor,
    vision_embeds: Tensor,
    groups: Tensor,
    *,
    text_keys: Tensor | None = None,
    shrinkages: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Fit both projections by CCA in place; return the record of the fit.

    The rows of the embeddings, (N, D) and (N, D') float32, are pairs. Pairs of one group are never
    each other's negatives, and cross-validation never separates them. Pairs with equal text keys
    are not negatives either. The shrinkages, for texts and images, are shares of the mean variance
    that are added to every variance; by default, cross-validation chooses them.

    The blocks of an untrained text adapter are set to the identity. A trained adapter is kept, and
    the projections are fitted to its output. Each projection gets the scale of an ordinary
    initialization: the scale is free because embeddings are normalized, and an optimizer's first
    steps would overwrite much smaller weights.
    """
    if model.visual_projection.bias is None:
        raise ValueError(
            "projection_init=cca needs an image projection with a bias. Build the model with "
            "visual_projection_bias=True, or choose projection_init=model."
        )
    num_groups = len(groups.unique())
    if num_groups < 2:
        raise ValueError(
            f"CCA needs at least two groups, got {num_groups} in {counted(len(groups), 'pair')}."
        )
    require_varied(captions=caption_embeds, images=vision_embeds)
    if "text_adapter" in model.config.random_heads:
        make_identity(model.text_adapter)
    text = apply_adapter(model, caption_embeds)
    vision = vision_embeds.to(text.device).float()
    num_directions = model.config.projection_dim
    rank = None
    if shrinkages is None:
        columns = [groups] if text_keys is None else [groups, text_keys]
        ids = torch.stack(columns, dim=1).to(text.device)
        shrinkages, rank = _choose_shrinkages(text, vision, ids, num_directions)
    fitted = _Correlation(text, vision)
    for projection, side, rotated in zip(
        (model.text_projection, model.visual_projection),
        (fitted.text, fitted.vision),
        fitted.solve(*shrinkages, num_directions),
        strict=True,
    ):
        weight = (side.directions @ rotated).T
        fill_projection(projection, weight, -(weight @ side.mean.double()))
    return {
        "text_shrinkage": shrinkages[0],
        "image_shrinkage": shrinkages[1],
        **({} if rank is None else {"mean_reciprocal_rank": rank}),
        "num_pairs": len(text),
    }


def require_varied(**sides: Tensor) -> None:
    """Raise ValueError, naming the side, if its embeddings are all equal or not all finite."""
    for name, embeds in sides.items():
        if not embeds.isfinite().all() or (embeds == embeds[:1]).all():
            raise ValueError(
                f"The embeddings of all {len(embeds)} {name} are equal, or some are not finite, so "
                "nothing can be fitted. Check the model that made the store (llm2clip doctor), "
                "then extract again."
            )


def make_identity(text_adapter: Any) -> None:
    """Set the blocks of a text adapter to the identity, in place."""
    for block in text_adapter.blocks:
        block.down.weight.zero_()
        block.down.bias.zero_()


def apply_adapter(model: LLM2CLIPModel, caption_embeds: Tensor) -> Tensor:
    """Apply the text adapter in chunks; return (N, D) float32 for the closed form.

    The result is on the model's device, or on the CPU if the device lacks float64 or memory.
    """
    device = model.text_projection.weight.device
    size = _BYTES_PER_NUMBER * caption_embeds.numel()
    solver_device = (
        device if has_float64(device) and has_room(device, size) else torch.device("cpu")
    )
    with skip_identity_blocks(model):
        parts = caption_embeds.split(_ROWS_OF_ADAPTER)
        return torch.cat(
            [model.text_adapter(part.to(device)).float().to(solver_device) for part in parts]
        )


def fill_projection(projection: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Set a projection's weight, (directions, D), and bias, scaled as in default initialization."""
    scale = (weight.shape[1] * weight.square().mean()).rsqrt()
    projection.weight.zero_()  # there may be fewer directions than output dimensions
    projection.weight[: len(weight)] = (scale * weight).to(projection.weight)
    projection.bias.zero_()
    projection.bias[: len(weight)] = (scale * bias).to(projection.bias)


class _Correlation:
    """The covariances of pairs, decomposed once for any number of shrinkages.

    Both sides are rotated into their principal directions, which makes their covariances diagonal.
    """

    def __init__(self, text: Tensor, vision: Tensor) -> None:
        self.text, self.vision = Side(text), Side(vision)
        cross = self.text.rotate(text).double().T @ self.vision.rotate(vision).double()
        self._cross = cross / len(text)

    def solve(
        self, text_shrinkage: float, image_shrinkage: float, num_directions: int
    ) -> tuple[Tensor, Tensor]:
        """Return weights for rotated embeddings, (D, directions) and (D', directions) float64.

        Each direction is weighted by its correlation.
        """
        text_scale = self.text.whiten(text_shrinkage)[:, None]
        vision_scale = self.vision.whiten(image_shrinkage)[:, None]
        left, right = _split_by_correlation(
            text_scale * self._cross * vision_scale.T, num_directions
        )
        return text_scale * left, vision_scale * right


class Side:
    """Mean, principal directions and variances of one side's embeddings, (N, D)."""

    def __init__(self, embeds: Tensor) -> None:
        self.mean = embeds.mean(0)
        centered = (embeds - self.mean).double()
        variances, self.directions = torch.linalg.eigh(centered.T @ centered / len(centered))
        self._variances = variances.clamp(min=0)

    def rotate(self, embeds: Tensor) -> Tensor:
        """Subtract the mean and rotate into the principal directions, (M, D) float32."""
        rotated: Tensor = (embeds - self.mean) @ self.directions.float()
        return rotated

    def whiten(self, shrinkage: float) -> Tensor:
        mean = self._variances.mean().clamp(min=torch.finfo(torch.float64).tiny)
        scale: Tensor = (self._variances + shrinkage * mean).rsqrt()
        return scale


def _split_by_correlation(whitened: Tensor, num_directions: int) -> tuple[Tensor, Tensor]:
    """Return the singular directions of both sides times their singular values, largest first."""
    # An eigendecomposition of the smaller Gram matrix is several times as fast as an SVD.
    if whitened.shape[0] > whitened.shape[1]:
        right, left = _split_by_correlation(whitened.T, num_directions)
        return left, right
    squares, left = torch.linalg.eigh(whitened @ whitened.T)
    squares = squares.flip(0)[:num_directions].clamp(min=0)
    left = left.flip(1)[:, :num_directions]
    return left * squares.sqrt(), whitened.T @ left


def _choose_shrinkages(
    text: Tensor, vision: Tensor, ids: Tensor, num_directions: int
) -> tuple[tuple[float, float], float]:
    """Hill-climb on the grid of shrinkages to the best mean reciprocal rank in cross-validation.

    Choosing by the lowest loss would give more shrinkage than is best for retrieval.
    """
    folds = list(_make_folds(text, vision, ids))
    ranks: dict[tuple[int, int], float] = {}

    def measure(choice: tuple[int, int]) -> float:
        if choice not in ranks:
            shrinkages = SHRINKAGES[choice[0]], SHRINKAGES[choice[1]]
            ranks[choice] = sum(_measure_fold(*fold, shrinkages, num_directions) for fold in folds)
            ranks[choice] /= len(folds)
        return ranks[choice]

    best = _FIRST_TRIED
    while True:
        steps = ((1, 0), (-1, 0), (0, 1), (0, -1))
        around = [(best[0] + text_step, best[1] + image_step) for text_step, image_step in steps]
        inside = [p for p in around if all(0 <= index < len(SHRINKAGES) for index in p)]
        highest = max(inside, key=measure)
        if measure(highest) <= measure(best):
            return (SHRINKAGES[best[0]], SHRINKAGES[best[1]]), ranks[best]
        best = highest


def _measure_fold(
    fitted: _Correlation,
    text: Tensor,
    vision: Tensor,
    ids: Tensor,
    shrinkages: tuple[float, float],
    num_directions: int,
) -> float:
    text_weight, vision_weight = fitted.solve(*shrinkages, num_directions)
    text_embeds = F.normalize(text @ text_weight.float(), dim=-1)
    image_embeds = F.normalize(vision @ vision_weight.float(), dim=-1)
    return _mean_reciprocal_rank(image_embeds @ text_embeds.T, ids)


def _mean_reciprocal_rank(similarities: Tensor, ids: Tensor) -> float:
    """Rank each row's best match in its group among its negatives; average both directions."""
    equal = ids[:, None] == ids[None, :]
    same, is_negative = equal[..., 0], ~equal.any(dim=-1)
    reciprocals = []
    for scores in (similarities, similarities.T):
        best = scores.masked_fill(~same, -torch.inf).amax(dim=1, keepdim=True)
        ranks = 1 + (~(scores < best) & is_negative).sum(dim=1)  # NaN scores rank last
        reciprocals.append(float(ranks.double().reciprocal().mean()))
    return sum(reciprocals) / 2


def _make_folds(
    text: Tensor, vision: Tensor, ids: Tensor
) -> Iterator[tuple[_Correlation, Tensor, Tensor, Tensor]]:
    """Yield the correlation fitted to each training split, and the rotated pairs of its test split.

    No group is in both splits.
    """
    numbers = ids[:, 0].unique(return_inverse=True)[1]
    num_groups = int(numbers.max()) + 1
    num_folds = min(_NUM_FOLDS, num_groups)
    generator = torch.Generator().manual_seed(0)  # affects only the assignment to folds
    order = torch.randperm(num_groups, generator=generator).to(ids.device)
    fold_of_row = (order % num_folds)[numbers]
    for number in range(num_folds):
        rows = (fold_of_row == number).nonzero().flatten()
        chosen = torch.randperm(len(rows), generator=generator)[:_MAX_PAIRS_COMPARED]
        rows, others = rows[chosen.to(rows.device)], fold_of_row != number
        fitted = _Correlation(text[others], vision[others])
        yield fitted, fitted.text.rotate(text[rows]), fitted.vision.rotate(vision[rows]), ids[rows]
