"""What the demo does with images: encode once, hold some out, align, evaluate, search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.records import CaptionedImage
from ..data.splits import choose_test_rows, split_records
from ..encoding.encode import encode_images, encode_texts, project_captions, project_images
from ..evaluation.metrics.correspondence import Correspondence
from ..evaluation.metrics.ranking import rank_retrieval
from ..evaluation.metrics.scores import hit_rate_at
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from ..search.image_index import ImageIndex, SearchResult
from ..training.alignment.cca_init import init_projections_by_cca
from .feature_alignment import AlignmentArguments, AlignmentPairs, align_features

_MOST_HELD_OUT = 300


def hold_out(records: Sequence[CaptionedImage], *, seed: int) -> set[str]:
    """Choose the groups that the demo tests on: a fifth of them, 300 at most.

    Args:
        records: images of one language.
        seed: another seed chooses others.

    Returns:
        Their group ids.

    Raises:
        ValueError: there are fewer than ten groups, or a caption is on both sides of the split.
    """
    num_groups = len({record.group_id for record in records})
    size = min(_MOST_HELD_OUT, num_groups // 5)
    return {record.group_id for record in split_records(records, test_size=size, seed=seed)[1]}


@dataclass(frozen=True)
class EncodedImages:
    """Stored embeddings of images and captions.

    Attributes:
        records: one an image.
        vision_embeds: (images, D') float32.
        caption_embeds: (different captions, D) float32.
        captions_of_image: for each image, rows of its captions; the first one tests it.
    """

    records: list[CaptionedImage]
    vision_embeds: Tensor
    caption_embeds: Tensor
    captions_of_image: list[list[int]]

    def rows(self, group_ids: set[str], *, inside: bool) -> list[int]:
        """Images whose group is among these, or is not."""
        return [i for i, r in enumerate(self.records) if (r.group_id in group_ids) == inside]


def list_training_texts(record: CaptionedImage) -> list[str]:
    """The captions as they are, and once more with the image's keywords behind the first."""
    texts = list(record.captions)
    if record.keywords:
        texts.append(f"{record.captions[0]}: {', '.join(record.keywords)}")
    return texts


def encode_records(
    model: LLM2CLIPModel,
    processor: LLM2CLIPProcessor,
    records: list[CaptionedImage],
    *,
    vision_embeds: Tensor | None = None,
) -> EncodedImages:
    """Run both towers over every image and every different caption.

    Args:
        vision_embeds: of the same images by the same tower, where they are at hand.
    """
    if vision_embeds is None:
        print(f"Encoding {len(records)} images …", flush=True)
        paths = [record.path for record in records]
        vision_embeds = encode_images(model, processor, paths, project=False, show_progress=True)
    rows: dict[str, int] = {}
    captions_of_image = [
        [rows.setdefault(text, len(rows)) for text in list_training_texts(record)]
        for record in records
    ]
    print(f"Encoding {len(rows)} captions …", flush=True)
    caption_embeds = encode_texts(model, processor, list(rows), project=False, show_progress=True)
    return EncodedImages(records, vision_embeds, caption_embeds, captions_of_image)


def align(
    model: LLM2CLIPModel,
    images: EncodedImages,
    held_out: set[str],
    arguments: AlignmentArguments,
) -> list[float]:
    """Train on all but the held-out groups, in place; returns the loss of every step."""
    rows = images.rows(held_out, inside=False)
    pairs = AlignmentPairs(
        images.caption_embeds,
        images.vision_embeds[rows],
        [images.captions_of_image[row] for row in rows],
        [images.records[row].group_id for row in rows],
    )
    init_projections_by_cca(model, *pairs.pair_rows())
    losses = align_features(model, pairs, arguments, show_progress=True)
    model.config.text_adapter_trained = model.config.projections_trained = True
    return losses


@torch.inference_mode()
def evaluate(model: LLM2CLIPModel, images: EncodedImages, held_out: set[str]) -> dict[str, float]:
    """Compare one image of each held-out group with its first caption."""
    rows = choose_test_rows(images.records, held_out)
    group_ids = [images.records[row].group_id for row in rows]
    captions = [images.captions_of_image[row][0] for row in rows]
    text_embeds = project_captions(model, images.caption_embeds[captions])
    image_embeds = project_images(model, images.vision_embeds[rows])
    ranking = rank_retrieval(
        image_embeds, text_embeds, Correspondence.from_group_ids(group_ids, group_ids)
    )
    return {
        "unseen_t2i_r1": hit_rate_at(ranking.t2i, k=1),
        "unseen_t2i_r10": hit_rate_at(ranking.t2i, k=10),
        "unseen_i2t_r1": hit_rate_at(ranking.i2t, k=1),
        "chance_r1": 1 / len(group_ids),
    }


def search(
    model: LLM2CLIPModel,
    processor: LLM2CLIPProcessor,
    images: EncodedImages,
    gallery: list[CaptionedImage],
    sentences: Sequence[str],
) -> list[SearchResult]:
    """Answer the sentences from one image per group, and the gallery that was never trained on."""
    rows = list({r.group_id: i for i, r in enumerate(images.records)}.values())
    paths = [images.records[row].path for row in rows]
    vision_embeds = images.vision_embeds[rows]
    if gallery:
        paths_of_gallery = [record.path for record in gallery]
        extra = encode_images(model, processor, paths_of_gallery, project=False)
        vision_embeds = torch.cat([vision_embeds, extra])
        paths += [record.path for record in gallery]
    index = ImageIndex(model, processor, paths, project_images(model, vision_embeds))
    return index.search(sentences)
