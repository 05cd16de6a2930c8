"""Checks ONNX graphs against the exported model, before the folder of graphs is published.

N is the number of texts or images, P `projection_dim`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
_LONGEST_CAPTION = 64  # captions joined into the longest text, which most models truncate
# Minimum cosine with 8-bit weights; that of an unrelated text is far lower.
MIN_COSINE_8_BITS = 0.999
# Pillow and torchvision round differently when resizing: by at most 1 of 255 for most pixels.
MIN_COSINE_OF_SCRIPT = 0.999


@dataclass(frozen=True)
class CheckInputs:
    """The captions and images to check graphs on: one caption and one image per image group.

    `texts` are the captions, plus longer texts joined from several captions; the longest exceed
    most models' maximum length.
    """

    captions: Sequence[str]
    texts: Sequence[str]
    images: Sequence[Any]
    data: str


@dataclass
class Reference:
    """The model in float32 on the CPU, and the model's embeddings of the check inputs.

    The folder's golden embeddings, if it has any, were computed in `dtype`.
    """

    model: Any
    processor: LLM2CLIPProcessor
    inputs: CheckInputs
    folder: Path
    dtype: torch.dtype = torch.float32

    @cached_property
    def text_embeds(self) -> Tensor:
        """The model's embeddings of the check texts, (N, P)."""
        return encode_texts(self.model, self.processor, self.inputs.texts)

    @cached_property
    def image_embeds(self) -> Tensor:
        """The model's embeddings of the check images, (N, P)."""
        return encode_images(self.model, self.processor, self.inputs.images)

    def compare_golden(
        self, kind: str, encode: Callable[[Any], Tensor], inputs: Sequence[Any] | None = None
    ) -> dict[str, float]:
        """Compare a graph with the folder's golden embeddings, if any, by the largest distance.

        The golden texts are stored in the folder. The golden images are not; pass them as `inputs`.
        """
        golden = read_golden(self.folder)
        if golden is None or f"{kind}_embeds" not in golden[1]:
            return {}
        embeds, expected = (
            encode(golden[0] if inputs is None else inputs),
            golden[1][f"{kind}_embeds"],
        )
        limit = find_tolerance(self.dtype, other_machine=True)  # they may be from another machine
        largest = _compare(f"golden {kind}s", embeds, expected, limit)
        return {"max_distance_from_golden": largest}


def load_check_inputs(data: str | None) -> CheckInputs:
    """Sample captioned images from 200 groups, or all groups if fewer, with a fixed seed.

    Without data, sample from the bundled photographs and emoji.
    """
    embedded = [find_example_data() / name for name in ("photographs", "emoji")]
    first: dict[str, CaptionedImage] = {}
    for source in [data] if data else embedded:
        for record in load_records(source):
            if data or record.lang == "en":
                first.setdefault(record.group_id, record)
    if len(first) < 2:
        raise ValueError(
            f"{data} has images of fewer than two groups, too few to check recall. Use a larger "
            "dataset for onnx_data."
        )
    groups = list(first)
    if len(groups) > NUM_CAPTIONS:
        groups = sorted(random.Random(0).sample(groups, NUM_CAPTIONS))
    captions = [first[group].captions[0] for group in groups]
    counts = [2 + (_LONGEST_CAPTION - 2) * i // (_NUM_LONG - 1) for i in range(_NUM_LONG)]
    repeated = [*captions] * (1 + _LONGEST_CAPTION // len(captions))
    return CheckInputs(
        captions=captions,
        texts=[*captions, *(". ".join(repeated[:count]) for count in counts)],
        images=[open_image(first[group].image) for group in groups],
        data=data or "embedded photographs and emoji",
    )


def check_text_graph(encoder: OnnxEncoder, reference: Reference) -> dict[str, Any]:
    """Compare a float32 text graph with the model and its golden embeddings."""
    expected = reference.text_embeds
    texts = reference.inputs.texts
    embeds = encoder.encode_texts(texts)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    alone = [order[0], order[len(order) // 2], order[-1]]
    one_by_one = torch.cat([encoder.encode_texts([texts[row]]) for row in alone])
    return {
        "texts": len(texts),
        "max_distance": _compare("texts", embeds, expected),
        "max_distance_alone": _compare("single texts", one_by_one, expected[alone]),
        "min_cosine": _round(measure_cosines(embeds, expected).min()),
        **reference.compare_golden("text", encoder.encode_texts),
    }


def check_image_graph(
    encoder: OnnxEncoder, reference: Reference, *, any_size: bool
) -> dict[str, Any]:
    """Compare a vision graph with the model and its golden embeddings."""
    expected = reference.image_embeds[:NUM_IMAGES]
    images = list(reference.inputs.images[:NUM_IMAGES])
    embeds = encoder.encode_images(images)
    alone = encoder.encode_images(images[:1])
    figures = {
        "images": len(images),
        "max_distance": _compare("images", embeds, expected),
        "max_distance_alone": _compare("a single image", alone, expected[:1]),
    }
    if any_size:
        figures["max_distance_at_other_sizes"] = _check_other_sizes(encoder, reference, images[:2])
    golden = reference.compare_golden("image", encoder.encode_images, render_golden_images())
    return {**figures, **golden}


def compare_rounded_texts(encoder: OnnxEncoder, reference: Reference) -> dict[str, Any]:
    """Measure a quantized text graph's distance from the model, and the graph's recall."""
    embeds = encoder.encode_texts(reference.inputs.texts)
    cosines = measure_cosines(embeds, reference.text_embeds)
    figures = {
        "texts": len(cosines),
        "texts_below_0.999": int((cosines < MIN_COSINE_8_BITS).sum()),
        "min_cosine": _round(cosines.min()),
        "mean_cosine": _round(cosines.mean()),
    }
    if hasattr(reference.model, "vision_model"):
        images, count = reference.image_embeds, len(reference.inputs.captions)
        figures["recall_at_1"] = measure_recall(embeds[:count], images)
        figures["recall_at_1_of_the_model"] = measure_recall(reference.text_embeds[:count], images)
    return figures


def require_near_texts(figures: Mapping[str, Any]) -> None:
    if low := figures["texts_below_0.999"]:
        raise ValueError(
            f"8-bit weights change this model too much: {low} of {figures['texts']} texts have a "
            f"cosine below {MIN_COSINE_8_BITS} with the model's own embeddings (minimum "
            f"{figures['min_cosine']}). Remove int8 from onnx_weights."
        )


def require_recall(figures: Mapping[str, Any], inputs: CheckInputs, *, max_loss: float) -> None:
    before, after = figures["recall_at_1_of_the_model"], figures["recall_at_1"]
    loss = round(before - after, 6)
    if loss > max_loss:
        raise ValueError(
            f"4-bit weights cost {100 * loss:.1f} points of text to image R@1: {100 * after:.1f} "
            f"instead of {100 * before:.1f} % on {len(inputs.captions)} captions ({inputs.data}); "
            f"minimum cosine {figures['min_cosine']}. Accept this with "
            f"max_recall_loss={math.ceil(1000 * loss) / 1000:g}, or remove int4 from onnx_weights."
        )


def check_script(folder: Path, encoder: OnnxEncoder, text_graph: Path | None) -> str | None:
    """Compare the exported encode.py, which needs no torch, with the processor on golden inputs.

    Returns why the script cannot be used; None if its embeddings match. Raises ValueError if text
    embeddings differ, because then tokenizer.json does not match the tokenizer.
    """
    from ..encoding import encode_onnx  # imports onnxruntime

    if text_graph is not None:
        embeds = encode_onnx.encode_texts(list(GOLDEN_TEXTS), text_graph.stem, folder)
        expected = encoder.encode_texts(GOLDEN_TEXTS)
        _compare("the script's texts", torch.from_numpy(embeds), expected)
    if "image" not in encoder.modalities:
        return None
    images = render_golden_images()
    try:
        embeds = torch.from_numpy(encode_onnx.encode_images(images, folder))
    except Exception as error:  # from NumPy, or ONNX Runtime, whose errors have no common class
        return f"it does not support the image processor's settings ({error!r})"
    lowest = float(measure_cosines(embeds, encoder.encode_images(images)).min())
    if lowest < MIN_COSINE_OF_SCRIPT:
        return f"it prepares images differently from the image processor (cosine {lowest:.4f})"
    return None


def measure_recall(text_embeds: Tensor, image_embeds: Tensor) -> float:
    """Compute text to image R@1 if text i matches only image i; ties count as misses."""
    pairing = Correspondence.from_image_of_text(range(len(text_embeds)), len(text_embeds))
    return _round(hit_rate_at(rank_retrieval(image_embeds, text_embeds, pairing).t2i, k=1))


def measure_cosines(embeds: Tensor, expected: Tensor) -> Tensor:
    """Return the cosine of each row with its counterpart, (N,) float64."""
    return torch.nn.functional.cosine_similarity(embeds.double(), expected.double())


@torch.no_grad()
def _check_other_sizes(encoder: OnnxEncoder, reference: Reference, images: list[Any]) -> float:
    """Compare on images with twice the processor's width, and with twice the height."""
    model, pixels = reference.model, reference.processor(images=images)[IMAGE_INPUT]
    largest = 0.0
    for repeats in ((1, 1, 1, 2), (1, 1, 2, 1)):
        other = pixels.repeat(*repeats)
        expected = model.to_image_embeds(model.get_vision_embeds(other))
        what = f"images of {other.shape[2]} × {other.shape[3]} pixels"
        largest = max(largest, _compare(what, encoder.encode_pixels(other), expected))
    return largest


def _compare(
    what: str, embeds: Tensor, expected: Tensor, limit: float = find_tolerance(torch.float32)
) -> float:
    """Return the largest distance between matching rows; raise ValueError if above the limit."""
    distances = measure_distances(embeds, expected)
    largest = float(distances.max())
    if largest > limit:
        worst = int(distances.argmax())
        raise ValueError(
            f"The ONNX graph does not reproduce the model's embeddings of {what}: "
            f"{int((distances > limit).sum())} of {len(distances)} differ by more than {limit:g}, "
            f"the worst, number {worst}, by {largest:.2g}. Nothing was written."
        )
    return float(f"{largest:.2g}")


def _round(value: Any) -> float:
    return round(float(value), 6)
