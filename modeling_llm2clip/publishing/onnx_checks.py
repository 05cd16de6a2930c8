"""Checks ONNX graphs against the model that they came from, before their folder gets its name.

N texts or images, P `projection_dim`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.images.image_sources import open_image
from ..data.records.record_loading import find_example_data, load_records
from ..data.records.records import CaptionedImage
from ..encoding.encode import encode_images, encode_texts
from ..encoding.onnx_encoding import IMAGE_INPUT, OnnxEncoder
from ..evaluation.metrics.correspondence import Correspondence
from ..evaluation.metrics.ranking import rank_retrieval
from ..evaluation.metrics.scores import hit_rate_at
from ..model_folders.golden_embeddings import (
    GOLDEN_TEXTS,
    find_tolerance,
    measure_distances,
    read_golden,
    render_golden_images,
)
from ..processing_llm2clip import LLM2CLIPProcessor

NUM_CAPTIONS = 200
NUM_IMAGES = 50
_NUM_LONG = 12
_LONGEST_CAPTION = 64  # captions in one text, which most models truncate
# Rounding of 8-bit weights; an unrelated text has a cosine far below.
MIN_COSINE_8_BITS = 0.999
# Pillow and torchvision resize with other rounding: at most one of 255 steps for most pixels.
MIN_COSINE_OF_SCRIPT = 0.999
_SEED = 0


@dataclass(frozen=True)
class CheckInputs:
    """What graphs are checked on.

    Attributes:
        captions: One of each record.
        texts: The captions, and texts of several of them, up to beyond the model's maximum.
        images: Image of each record.
        data: Where they come from, for the record of the export.
    """

    captions: Sequence[str]
    texts: Sequence[str]
    images: Sequence[Any]
    data: str


@dataclass
class Reference:
    """The model itself, and what it gives for the check's inputs; each is computed once.

    Attributes:
        model: The model, in float32 on the CPU.
        processor: Its processor.
        inputs: What it is asked.
        folder: Its folder, which may have golden embeddings.
        dtype: Dtype in which it was saved, and these computed.
    """

    model: Any
    processor: LLM2CLIPProcessor
    inputs: CheckInputs
    folder: Path
    dtype: torch.dtype = torch.float32
    _known: dict[str, Tensor] = field(default_factory=dict)

    @property
    def golden_limit(self) -> float:
        """How far golden embeddings may be, which another machine computed."""
        return find_tolerance(self.dtype, other_machine=True)

    def embed_texts(self) -> Tensor:
        """Return the embeddings of all texts, (N, P)."""
        if "texts" not in self._known:
            self._known["texts"] = encode_texts(self.model, self.processor, self.inputs.texts)
        return self._known["texts"]

    def embed_images(self) -> Tensor:
        """Return the embeddings of all images, (N, P)."""
        if "images" not in self._known:
            self._known["images"] = encode_images(self.model, self.processor, self.inputs.images)
        return self._known["images"]


def load_check_inputs(data: str | None) -> CheckInputs:
    """Choose captioned images at random, one of each group, always the same ones.

    Args:
        data: Captioned images; None for the embedded photographs and emoji.

    Returns:
        200 records, or as many as there are.

    Raises:
        ValueError: There are fewer than two groups, or records have errors.
    """
    sources = (
        [data] if data else [find_example_data() / "photographs", find_example_data() / "emoji"]
    )
    first: dict[str, CaptionedImage] = {}
    for source in sources:
        for record in load_records(source):
            if data or record.lang == "en":
                first.setdefault(record.group_id, record)
    if len(first) < 2:
        raise ValueError(f"{data} has images of one group; the check needs those of at least two.")
    groups = list(first)
    if len(groups) > NUM_CAPTIONS:
        groups = sorted(random.Random(_SEED).sample(groups, NUM_CAPTIONS))
    captions = [first[group].captions[0] for group in groups]
    return CheckInputs(
        captions=captions,
        texts=[*captions, *_join_captions(captions)],
        images=[open_image(first[group].image) for group in groups],
        data=data or "embedded photographs and emoji",
    )


def _join_captions(captions: Sequence[str]) -> list[str]:
    """Join 2, 3, … captions to texts of all lengths."""
    counts = [2 + (_LONGEST_CAPTION - 2) * i // (_NUM_LONG - 1) for i in range(_NUM_LONG)]
    repeated = [*captions] * (1 + _LONGEST_CAPTION // len(captions))
    return [". ".join(repeated[:count]) for count in counts]


def check_texts(encoder: OnnxEncoder, reference: Reference) -> dict[str, Any]:
    """Compare a float32 text graph with the model, and with its golden embeddings.

    Args:
        encoder: The graph.
        reference: The model.

    Returns:
        Figures for the record of the export.

    Raises:
        ValueError: They differ by more than rounding.
    """
    limit = find_tolerance(torch.float32)
    wanted = reference.embed_texts()
    texts = reference.inputs.texts
    found = encoder.encode_texts(texts)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    alone = [order[0], order[len(order) // 2], order[-1]]
    one_by_one = torch.cat([encoder.encode_texts([texts[row]]) for row in alone])
    figures = {
        "texts": len(texts),
        "max_distance": _compare("texts", found, wanted, limit),
        "max_distance_alone": _compare("single texts", one_by_one, wanted[alone], limit),
        "min_cosine": _round(measure_cosines(found, wanted).min()),
    }
    golden = read_golden(reference.folder)
    if golden is not None and "text_embeds" in golden[1]:
        found = encoder.encode_texts(golden[0])
        figures["max_distance_from_golden"] = _compare(
            "golden texts", found, golden[1]["text_embeds"], reference.golden_limit
        )
    return figures


def check_images(encoder: OnnxEncoder, reference: Reference, *, any_size: bool) -> dict[str, Any]:
    """Compare a vision graph with the model, and with its golden embeddings.

    Args:
        encoder: The graph.
        reference: The model.
        any_size: Whether the graph is for images of any size.

    Returns:
        Figures for the record of the export.

    Raises:
        ValueError: They differ by more than rounding.
    """
    limit = find_tolerance(torch.float32)
    wanted = reference.embed_images()[:NUM_IMAGES]
    images = list(reference.inputs.images[:NUM_IMAGES])
    found = encoder.encode_images(images)
    alone = encoder.encode_images(images[:1])
    figures = {
        "images": len(images),
        "max_distance": _compare("images", found, wanted, limit),
        "max_distance_alone": _compare("a single image", alone, wanted[:1], limit),
    }
    if any_size:
        figures["max_distance_at_other_sizes"] = _check_other_sizes(encoder, reference, images[:2])
    golden = read_golden(reference.folder)
    if golden is not None and "image_embeds" in golden[1]:
        found = encoder.encode_images(render_golden_images())
        figures["max_distance_from_golden"] = _compare(
            "golden images", found, golden[1]["image_embeds"], reference.golden_limit
        )
    return figures


def compare_rounded_texts(
    encoder: OnnxEncoder, reference: Reference, *, with_recall: bool
) -> dict[str, Any]:
    """Measure how far a text graph with rounded weights is from the model.

    Args:
        encoder: The graph.
        reference: The model.
        with_recall: Whether text to image R@1 is measured too, which needs a model with both
            towers.

    Returns:
        Figures for the record of the export.
    """
    found = encoder.encode_texts(reference.inputs.texts)
    cosines = measure_cosines(found, reference.embed_texts())
    figures = {
        "texts": len(cosines),
        "texts_below_0.999": int((cosines < MIN_COSINE_8_BITS).sum()),
        "min_cosine": _round(cosines.min()),
        "mean_cosine": _round(cosines.mean()),
    }
    if with_recall:
        images, count = reference.embed_images(), len(reference.inputs.captions)
        figures["recall_at_1"] = measure_recall(found[:count], images)
        figures["recall_at_1_of_the_model"] = measure_recall(
            reference.embed_texts()[:count], images
        )
    return figures


def require_near_texts(figures: Mapping[str, Any]) -> None:
    """Refuse 8-bit weights with which a text is too far from the model's own embedding.

    Args:
        figures: From `compare_rounded_texts`.

    Raises:
        ValueError: A text has a cosine below 0.999.
    """
    if low := figures["texts_below_0.999"]:
        raise ValueError(
            f"8-bit weights change this model too much: {low} of {figures['texts']} texts have a "
            f"cosine below {MIN_COSINE_8_BITS} with the model's own embeddings, the smallest "
            f"{figures['min_cosine']}, even if half of the layers stay float32. Leave int8 out of "
            "onnx_weights."
        )


def require_recall(figures: Mapping[str, Any], inputs: CheckInputs, *, max_loss: float) -> None:
    """Refuse 4-bit weights that cost more recall than accepted.

    Args:
        figures: From `compare_rounded_texts`, with recall.
        inputs: What it was measured on.
        max_loss: Largest loss of text to image R@1 that is accepted, as a share.

    Raises:
        ValueError: More is lost; the message has the figures, and the option that accepts them.
    """
    before, after = figures["recall_at_1_of_the_model"], figures["recall_at_1"]
    loss = round(before - after, 6)
    if loss > max_loss:
        raise ValueError(
            f"4-bit weights cost {100 * loss:.1f} points of text to image R@1: {100 * after:.1f} "
            f"instead of {100 * before:.1f} % on {len(inputs.captions)} captions ({inputs.data}); "
            f"smallest cosine {figures['min_cosine']}. Accept it with "
            f"max_recall_loss={math.ceil(1000 * loss) / 1000:g}, or leave int4 out of onnx_weights."
        )


def check_script(folder: Path, encoder: OnnxEncoder, text_graph: Path | None) -> str | None:
    """Compare the script that needs no torch with the processor, on the golden inputs.

    Args:
        folder: Complete folder of ONNX graphs.
        encoder: The same graphs.
        text_graph: File of its text graph.

    Returns:
        Why the script cannot be used; None where it gives the same embeddings.

    Raises:
        ValueError: Its texts get other embeddings: the tokenizer's file is not the tokenizer.
    """
    from ..encoding import encode_onnx  # imports onnxruntime

    if text_graph is not None:
        found = encode_onnx.encode_texts(list(GOLDEN_TEXTS), text_graph.stem, folder)
        wanted = encoder.encode_texts(GOLDEN_TEXTS)
        _compare(
            "the script's texts", torch.from_numpy(found), wanted, find_tolerance(torch.float32)
        )
    if "image" not in encoder.modalities:
        return None
    images = render_golden_images()
    try:
        found = torch.from_numpy(encode_onnx.encode_images(images, folder))
    except (KeyError, TypeError) as error:
        return f"its image processor has other settings ({error!r})"
    lowest = float(measure_cosines(found, encoder.encode_images(images)).min())
    if lowest < MIN_COSINE_OF_SCRIPT:
        return f"it prepares images otherwise than the image processor (cosine {lowest:.4f})"
    return None


def measure_recall(text_embeds: Tensor, image_embeds: Tensor) -> float:
    """Compute text to image R@1, where text i belongs to image i alone.

    Args:
        text_embeds: (N, P).
        image_embeds: (N, P).

    Returns:
        Share of the texts that find their image first; ties count against them.
    """
    rows = torch.arange(len(text_embeds))
    ranks = rank_retrieval(
        image_embeds, text_embeds, Correspondence(len(rows), len(rows), rows, rows)
    )
    return _round(hit_rate_at(ranks.t2i, k=1))


def measure_cosines(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the cosine of each row with its counterpart, (N,) float64.

    Args:
        found: (N, P) embeddings.
        wanted: (N, P) embeddings.
    """
    return torch.nn.functional.cosine_similarity(found.double(), wanted.double())


@torch.no_grad()
def _check_other_sizes(encoder: OnnxEncoder, reference: Reference, images: list[Any]) -> float:
    """Compare at twice the width, and at twice the height, of what the processor gives."""
    model, pixels = reference.model, reference.processor(images=images)[IMAGE_INPUT]
    largest = 0.0
    for repeats in ((1, 1, 1, 2), (1, 1, 2, 1)):
        other = pixels.repeat(*repeats)
        wanted = model.to_image_embeds(model.get_vision_embeds(other))
        what = f"images of {other.shape[2]} × {other.shape[3]} pixels"
        limit = find_tolerance(torch.float32)
        largest = max(largest, _compare(what, encoder.encode_pixels(other), wanted, limit))
    return largest


def _compare(what: str, found: Tensor, wanted: Tensor, limit: float) -> float:
    """Return the largest distance of two rows, or raise ValueError if it is above the limit."""
    distances = measure_distances(found, wanted)
    largest = float(distances.max())
    if largest > limit:
        worst = int(distances.argmax())
        raise ValueError(
            f"The ONNX graph does not give the model's embeddings of {what}: "
            f"{int((distances > limit).sum())} of {len(distances)} differ by more than {limit:g}, "
            f"number {worst} by {largest:.2g}. Nothing was written."
        )
    return float(f"{largest:.2g}")


def _round(value: Any) -> float:
    return round(float(value), 6)
