"""Weights between those before and after a training (WiSE-FT, arXiv:2109.01903).

What a training of the vision tower wins and what it forgets change at different rates, so that some
share of the way often keeps most of both. Nothing is trained here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from ..._suggestions import counted, list_first
from ...configs.align_config import InterpolateConfig
from ...data.atomic_files import (
    FREE_TEMPORARY_FOLDER,
    explain_full_disk,
    require_new_folder,
    temporary_folder,
)
from ...data.records.record_table import RecordTable
from ...data.records.records import CaptionedImage
from ...data.store.embedding_store import EmbeddingStore
from ...encoding.float32 import float32_as_such
from ...model_folders.fingerprint import fingerprint_text, fingerprint_vision
from ...model_folders.model_card import CardResult, read_card_data
from ...model_folders.model_folder import find_model_folder
from ...model_folders.model_writing import require_intact, save_trained_model
from ...model_folders.training_images import TRAINING_IMAGES_FILE
from ...processing_llm2clip import LLM2CLIPProcessor
from ...scheduling.processes import choose_device
from ..losses.pairs import ContrastiveLoss
from .align_checks import check_data
from .alignment_data import AlignmentDataset
from .alignment_fit import name_as_saved
from .alignment_model import AlignmentModel
from .alignment_report import CHOSE, NEAR_CHANCE_ON_CARD, make_accuracy, make_recalls
from .best_weights import rank_scores, set_between
from .held_out import (
    HeldOutImages,
    HeldOutScores,
    ZeroShotImages,
    embed_batches,
    load_labeled_images,
)

_TOWER = "vision_model."
_OF_IMAGES = ("architecture", "image_processor", "pooling")


@dataclass(frozen=True)
class Interpolation:
    """Scores of the weights between two models.

    Attributes:
        scores: Scores by share of the way, from 0 (before) to 1 (after), in float32.
        chosen: The share that was written.
    """

    scores: Mapping[float, HeldOutScores]
    chosen: float

    def __str__(self) -> str:
        """Show a line per share."""
        rows = [
            (f"{share:.0%}", f"{scores.loss:.3f}", f"{scores.t2i_r1:.1%}", f"{scores.i2t_r1:.1%}",
             "" if scores.zero_shot is None else f"{scores.zero_shot:.1%}",
             "chosen" if share == self.chosen else "")
            for share, scores in self.scores.items()
        ]  # fmt: skip
        headers = ("share", "loss", "t2i R@1", "i2t R@1", "zero-shot", "")
        table: str = tabulate(rows, headers, tablefmt="plain", disable_numparse=True)
        return table


def interpolate(
    before: str | Path,
    after: str | Path,
    data: Sequence[CaptionedImage],
    output: str | Path,
    config: InterpolateConfig | None = None,
    *,
    caption_store: str | Path | EmbeddingStore | None = None,
) -> Interpolation:
    """Write the weights between two models that score best on other images.

    The models differ in vision tower, text adapter, projections or temperature; their LLM is the
    same. If the projections of the first one are random, those of the second are kept, and the
    vision tower alone is interpolated.

    Args:
        before: Folder or Hub id of the model before the training.
        after: That of the model after it.
        data: Captioned images that neither was trained on, which is not checked; the first caption
            of each is used.
        output: New folder of the model.
        config: Options; None for the defaults.
        caption_store: Caption embeddings of these records by this LLM, which otherwise runs once
            per share.

    Returns:
        The scores of all shares. Those of the written folder are on its card.

    Raises:
        ValueError: The models have other LLMs, networks, image processors or statistics of batch
            normalization, or equal weights; or one is not as it was written.
        FileExistsError: The output exists.

    Examples:
        >>> records = load_records("other-images")  # doctest: +SKIP
        >>> interpolate("aligned/model", "tuned/model", records, "between")  # doctest: +SKIP
    """
    config = config or InterpolateConfig()
    require_new_folder(Path(output))
    first, last = find_model_folder(before), find_model_folder(after)
    labeled = None if config.zero_shot is None else load_labeled_images(config.zero_shot)
    if not isinstance(caption_store, EmbeddingStore | None):
        caption_store = EmbeddingStore.open(caption_store)
    of_images = _require_same_parts(first, last, caption_store)
    require_intact(first, with_llm=False)  # the last one, whose LLM it has, when it is written anew
    records, processor = RecordTable.from_records(data), LLM2CLIPProcessor.from_pretrained(last)
    check_data(records)
    dataset = AlignmentDataset(records, processor, caption_store=caption_store)
    held_out = HeldOutImages(dataset, np.arange(len(records)))
    zero_shot = None if labeled is None else ZeroShotImages(labeled, last, processor)
    start, model = (_load(end, with_llm=caption_store is None) for end in (first, last))
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
    weights: dict[str, Tensor] = {name: model.get_parameter(name) for name in ends[1]}
    with explain_full_disk(temporary_folder(), "for the weights", FREE_TEMPORARY_FOLDER):
        weights = name_as_saved(model, weights, temporary_folder())

    def measure(folder: Path) -> tuple[list[CardResult], str | None]:
        if fingerprint_vision(folder) != of_images:  # the summary is by other weights
            (folder / TRAINING_IMAGES_FILE).unlink(missing_ok=True)
        written = _load(folder, with_llm=caption_store is None).to(model.device)  # type: ignore[arg-type]
        with float32_as_such():
            measured = _measure(written, held_out, zero_shot)
        dataset = counted(measured.num_images, "image") + ("" if by_accuracy else CHOSE)
        results = [make_recalls(measured, dataset)]
        if zero_shot is not None:
            labels = {**zero_shot.identify(), "accuracy": measured.zero_shot}
            results.append(make_accuracy(labels, has_chosen=by_accuracy))
        return results, NEAR_CHANCE_ON_CARD if measured.is_near_chance else None

    of_texts = first if start.config.projections_trained and not chosen else last
    save_trained_model(
        last, weights, output,
        text_adapter_trained=model.config.text_adapter_trained,
        projections_trained=model.config.projections_trained,
        kept_texts=read_card_data(of_texts).kept_texts,
        measure=measure,
    )  # fmt: skip
    return Interpolation(scores, chosen)


def _require_same_parts(first: Path, last: Path, store: EmbeddingStore | None) -> dict[str, str]:
    """Refuse models that differ in more than the weights behind the LLM.

    Returns the fingerprint of the last model's vision tower.
    """
    texts, images = (
        (find_fingerprint(first), find_fingerprint(last))
        for find_fingerprint in (fingerprint_text, fingerprint_vision)
    )
    differing = [
        f"{name} of the {tower}"
        for tower, (before, after), names in (
            ("text tower", texts, texts[0]), ("vision tower", images, _OF_IMAGES),
        )
        for name in names
        if before[name] != after[name]
    ]  # fmt: skip
    if differing:
        raise ValueError(
            f"{first} and {last} differ in {', '.join(differing)}. Interpolate models that differ "
            "in the weights of the vision tower, the text adapter and the projections alone."
        )
    if store is not None:
        store.require_fingerprint(texts[1])
    return images[1]


def _load(folder: Path, *, with_llm: bool) -> AlignmentModel:
    """Load a model in float32, so that weights between two models are not rounded."""
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
    statistics = dict(start.named_buffers())
    setting = "normalize_text_before_adapter"
    differing = sorted(
        name
        for name in {*first, *last}
        if name not in first or name not in last or first[name].shape != last[name].shape
    )
    differing += [
        name
        for name, buffer in end.named_buffers()
        if name not in statistics or not torch.equal(buffer, statistics[name])
    ]
    if getattr(start.config, setting) != getattr(end.config, setting):
        differing.append(setting)
    if differing:
        raise ValueError(
            f"The models differ in {list_first(differing)}, and nothing is between them. "
            "Interpolate models of one network and its settings, with the same statistics of batch "
            "normalization, which align does not change."
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
    inputs = embed_batches(model, held_out.iterate_batches(), model.device)
    accuracy = None if zero_shot is None else zero_shot.measure(model)
    return replace(held_out.score(model.loss, inputs), zero_shot=accuracy)
