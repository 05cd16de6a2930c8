"""Where a run starts: the model as it is, or the closed form of its stored embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .align_arguments import AlignArguments
from .alignment_data import AlignmentDataset
from .alignment_model import HEADS, AlignmentModel
from .cca_init import ClosedForm, fit_temperature, init_projections_by_cca
from .held_out import HeldOutImages

# So many pairs fix a linear fit of embeddings of a few thousand elements, and fit into memory.
_MOST_PAIRS = 50_000
# A trained start is only refined; random weights have far to go.
_LR_FROM_TRAINED = 1e-4
_LR_FROM_RANDOM = 1e-3


@dataclass(frozen=True)
class Start:
    """Where a run started, for its record.

    Attributes:
        kind: `"as-is"` or `"canonical-correlation"`.
        closed_form: how it was fitted, where it was.
        is_trained: whether the projections were trained or fitted, rather than random.
        has_new_adapter: whether the blocks of the text adapter were made the identity.
    """

    kind: str
    closed_form: dict[str, Any] | None
    is_trained: bool
    has_new_adapter: bool

    @property
    def default_lr(self) -> float:
        """Peak learning rate that suits this start."""
        return _LR_FROM_TRAINED if self.is_trained else _LR_FROM_RANDOM


def make_start(
    model: AlignmentModel,
    dataset: AlignmentDataset,
    items: Sequence[int],
    held_out: HeldOutImages | None,
    arguments: AlignArguments,
) -> Start:
    """Choose the start, and set the model's head to it in place.

    Args:
        items: of the dataset, those that are trained on.
        held_out: fits the temperature, and decides for `"auto"` between a trained model as it is
            and the closed form; None where nothing is held out: then a trained model stays.
    """
    trained = model.config.projections_trained
    as_is = Start("as-is", None, trained, has_new_adapter=False)
    wanted = arguments.start
    if wanted == "auto":
        is_possible = dataset.is_stored and model.visual_projection.bias is not None
        wanted = "canonical-correlation" if is_possible else "as-is"
        if trained and held_out is None:
            wanted = "as-is"
    if wanted == "as-is":
        return as_is
    before: dict[str, Tensor] = {}
    loss_before = None
    if arguments.start == "auto" and trained and held_out is not None:
        before = {name: value.clone() for name, value in _list_head(model).items()}
        loss_before = _measure(model, held_out)
    fitted = init_projections_by_cca(model, *_pair_embeddings(dataset, items, arguments.seed))
    loss = _set_temperature(model, held_out) if held_out is not None else None
    if loss is not None and loss_before is not None and loss_before <= loss:
        _restore(model, before)
        return as_is
    return Start(
        "canonical-correlation",
        _describe(fitted),
        is_trained=True,
        has_new_adapter=not model.config.text_adapter_trained,
    )


def _describe(fitted: ClosedForm) -> dict[str, Any]:
    return {name: value for name, value in asdict(fitted).items() if value is not None}


def _list_head(model: AlignmentModel) -> dict[str, Tensor]:
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if name.split(".")[0] in HEADS
    }


@torch.no_grad()
def _restore(model: AlignmentModel, head: dict[str, Tensor]) -> None:
    for name, value in _list_head(model).items():
        value.copy_(head[name])


def _measure(model: AlignmentModel, held_out: HeldOutImages) -> float:
    embeds = held_out.embed(model, torch.device("cpu"), nullcontext)
    return held_out.score(*embeds).loss


@torch.no_grad()
def _set_temperature(model: AlignmentModel, held_out: HeldOutImages) -> float:
    images, texts, _ = held_out.embed(model, torch.device("cpu"), nullcontext)
    log_scale, loss = fit_temperature(images, texts, held_out.group_ids)
    model.logit_scale.log_scale.fill_(log_scale)
    return loss


def _pair_embeddings(
    dataset: AlignmentDataset, items: Sequence[int], seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Captions beside their images, and what these show; evenly drawn where there are very many."""
    generator = torch.Generator().manual_seed(seed)
    captions: list[int] = []
    images: list[int] = []
    groups: list[int] = []
    for number in torch.randperm(len(items), generator=generator).tolist():
        item = items[number]
        rows = dataset.caption_rows(item).tolist()
        captions += rows
        images += [dataset.image_row(item)] * len(rows)
        groups += [int(dataset.group_ids[item])] * len(rows)
        if len(captions) >= _MOST_PAIRS:
            break
    assert dataset.caption_store is not None and dataset.image_store is not None
    return (
        dataset.caption_store.read(captions),
        dataset.image_store.read(images),
        torch.tensor(groups),
    )
