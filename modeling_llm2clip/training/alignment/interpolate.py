"""Weights between those before and after a training (WiSE-FT, arXiv:2109.01903).

What a training of the vision tower wins and what it forgets change at different rates, so that some
share of the way often keeps most of both. Nothing is trained here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from ..._suggestions import counted
from ...configs.align_config import InterpolateConfig
from ...data.records.record_table import RecordTable
from ...data.records.records import CaptionedImage
from ...data.store.embedding_store import EmbeddingStore
from ...encoding.float32 import float32_as_such
from ...model_folders.atomic_folder import require_new_folder
from ...model_folders.fingerprint import fingerprint_text
from ...model_folders.model_card import CardResult
from ...model_folders.model_folder import find_model_folder
from ...model_folders.model_writing import save_trained_model
from ...processing_llm2clip import LLM2CLIPProcessor
from ...scheduling.processes import choose_device
from ..losses.contrastive import ContrastiveLoss
from .alignment_data import AlignmentDataset
from .alignment_fit import name_as_saved
from .alignment_model import AlignmentModel
from .best_weights import rank_scores, set_between
from .held_out import HeldOutImages, HeldOutScores, embed_batches
from .zero_shot import ZeroShotImages, load_labeled_images

_TOWER = "vision_model."


@dataclass(frozen=True)
class Interpolation:
    """Scores of the weights between two models.

    Attributes:
        scores: Scores by share of the way, from 0 (before) to 1 (after).
        chosen: The share that was written.
        labeled: Name of the labeled images; None without any.
    """

    scores: Mapping[float, HeldOutScores]
    chosen: float
    labeled: str | None = None

    def list_card_results(self) -> list[CardResult]:
        """List the scores of the written model for its card."""
        found = self.scores[self.chosen]
        dataset = f"{counted(found.num_images, 'image')} that chose the weights"
        recalls = {name: value for name, value in asdict(found).items() if name.endswith("_r1")}
        results = [CardResult("retrieval", dataset, recalls)]
        if found.zero_shot is not None and self.labeled is not None:
            results.append(CardResult("classification", self.labeled, {"top_1": found.zero_shot}))
        return results

    def __str__(self) -> str:
        """Show a line per share."""
        lines = [f"{'share':>6} {'loss':>7} {'t2i R@1':>8} {'i2t R@1':>8}"]
        lines[0] += " zero-shot" * (self.labeled is not None)
        for share, scores in self.scores.items():
            line = f"{share:6.0%} {scores.loss:7.3f} {scores.t2i_r1:8.1%} {scores.i2t_r1:8.1%}"
            line += "" if scores.zero_shot is None else f" {scores.zero_shot:9.1%}"
            lines.append(line + "  chosen" * (share == self.chosen))
        return "\n".join(lines)


def interpolate(
    before: str | Path,
    after: str | Path,
    data: Sequence[CaptionedImage],
    output: str | Path,
    config: InterpolateConfig | None = None,
    *,
    caption_store: str | Path | EmbeddingStore | None = None,
) -> Interpolation:
    """Write the weights between two models that suit other images best.

    The models differ in vision tower, text adapter, projections or temperature; their LLM is the
    same. If the projections of the first one are random, those of the second are kept, and the
    vision tower alone is interpolated.

    Args:
        before: Folder or Hub id of the model before the training.
        after: That of the model after it.
        data: Captioned images that neither was trained on; the first caption of each is used.
        output: New folder of the model.
        config: Options; None for the defaults.
        caption_store: Caption embeddings of these records by this LLM, which otherwise runs once
            per share.

    Returns:
        The scores of all shares. That of the chosen one is on the model's card.

    Raises:
        ValueError: The models have other LLMs or other networks, or equal weights.
        FileExistsError: The output exists.

    Examples:
        >>> interpolate("aligned/model", "tuned-tower/model", held_out, "between")  # doctest: +SKIP
    """
    config = config or InterpolateConfig()
    require_new_folder(Path(output))
    first, last = find_model_folder(before), find_model_folder(after)
    labeled = None if config.zero_shot is None else load_labeled_images(config.zero_shot)
    if not isinstance(caption_store, EmbeddingStore | None):
        caption_store = EmbeddingStore.open(caption_store)
    _require_one_llm(first, last, caption_store)
    records, processor = RecordTable.from_records(data), LLM2CLIPProcessor.from_pretrained(last)
    dataset = AlignmentDataset(records, processor, caption_store=caption_store)
    held_out = HeldOutImages(dataset, np.arange(len(records)))
    zero_shot = None if labeled is None else ZeroShotImages(labeled, last, processor)
    start, model = (_load(one, with_llm=caption_store is None) for one in (first, last))
    ends = _list_ends(start, model, only_tower=not start.config.projections_trained)
    model.to(choose_device(config.device))  # type: ignore[arg-type]
    scores: dict[float, HeldOutScores] = {}
    with float32_as_such():
        for step in range(config.num_shares + 1):
            share = step / config.num_shares
            set_between(model, *ends, share)
            scores[share] = _measure(model, held_out, zero_shot)
        by_accuracy = config.choose_by == "zero_shot"
        chosen = min(scores, key=lambda share: rank_scores(scores[share], by_accuracy))
        set_between(model, *ends, chosen)
    found = Interpolation(scores, chosen, None if labeled is None else labeled.name)
    with TemporaryDirectory() as scratch:
        weights = name_as_saved(
            model, {name: model.get_parameter(name) for name in ends[1]}, scratch
        )
    save_trained_model(
        last,
        weights,
        output,
        text_adapter_trained=model.config.text_adapter_trained,
        measure=lambda _: (found.list_card_results(), None),
    )
    return found


def _require_one_llm(first: Path, last: Path, store: EmbeddingStore | None) -> None:
    one, other = fingerprint_text(first), fingerprint_text(last)
    if one != other:
        differing = sorted(name for name in one if one[name] != other.get(name))
        raise ValueError(
            f"{first} and {last} have different language models: {', '.join(differing)} differ. "
            "Interpolate models of one."
        )
    if store is not None:
        store.require_fingerprint(other)


def _load(folder: Path, *, with_llm: bool) -> AlignmentModel:
    """Load a model in float32, in which weights between two others are exact."""
    model: AlignmentModel = AlignmentModel.from_pretrained(
        folder, local_files_only=True, with_llm=with_llm, with_vision_tower=True
    )
    model.loss = ContrastiveLoss()
    model.trains_vision = True  # its images are encoded anew with each share
    return model.float().eval()  # type: ignore[no-any-return, no-untyped-call]


def _list_ends(
    start: AlignmentModel, end: AlignmentModel, *, only_tower: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """List the weights that differ, at both ends of the way."""
    first, last = dict(start.named_parameters()), dict(end.named_parameters())
    shapes = [{name: p.shape for name, p in of.items()} for of in (first, last)]
    if shapes[0] != shapes[1]:
        differing = sorted(n for n in {*first, *last} if shapes[0].get(n) != shapes[1].get(n))
        raise ValueError(
            f"The models are different networks: {len(differing)} weights differ in name or shape, "
            f"such as {differing[0]}."
        )
    names = [
        name
        for name, value in last.items()
        if (name.startswith(_TOWER) or not only_tower) and not torch.equal(value, first[name])
    ]
    if not names:
        raise ValueError("The models have the same weights, and nothing is between them.")
    return tuple({n: of[n].detach().clone() for n in names} for of in (first, last))  # type: ignore[return-value]


def _measure(
    model: AlignmentModel, held_out: HeldOutImages, zero_shot: ZeroShotImages | None
) -> HeldOutScores:
    scores = held_out.score(
        model.loss, embed_batches(model, held_out.iterate_batches(), model.device)
    )
    if zero_shot is None:
        return scores
    return replace(scores, zero_shot=zero_shot.measure(model))
