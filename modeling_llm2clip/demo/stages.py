"""What the demo does with pictures: encode once, hold some out, align, evaluate, search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.captioned_images import CaptionedImage
from ..data.splits import choose_test_rows
from ..encoding.captions import encode_captions
from ..encoding.pictures import encode_pictures
from ..evaluation.metrics.correspondence import Correspondence
from ..evaluation.metrics.ranking import rank_both_ways
from ..evaluation.metrics.scores import hit_rate_at
from ..modeling_llm2clip import LLM2CLIPModel
from ..processing_llm2clip import LLM2CLIPProcessor
from ..search.contact_sheet import SearchResult
from ..search.gallery import find_pictures, make_gallery
from ..training.closed_form_start import start_from_canonical_correlation
from ..training.feature_alignment import AlignmentArguments, AlignmentPairs, align_features


@dataclass(frozen=True)
class EncodedPictures:
    """Stored vectors of pictures and captions.

    Attributes:
        records: one a picture.
        vision_embeds: (pictures, D') float32.
        caption_embeds: (different captions, D) float32.
        captions_of_picture: for each picture, rows of its captions; the first one tests it.
    """

    records: list[CaptionedImage]
    vision_embeds: Tensor
    caption_embeds: Tensor
    captions_of_picture: list[list[int]]

    def rows(self, keys: set[str], *, inside: bool) -> list[int]:
        """Pictures whose key is among these, or is not."""
        return [i for i, r in enumerate(self.records) if (r.key in keys) == inside]


def list_training_texts(record: CaptionedImage) -> list[str]:
    """The captions as they are, and once more with the picture's keywords behind the first."""
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
) -> EncodedPictures:
    """Run both towers over every picture and every different caption.

    Args:
        vision_embeds: of the same pictures by the same tower, where they are at hand.
    """
    if vision_embeds is None:
        print(f"Encoding {len(records)} pictures …", flush=True)
        paths = [record.path for record in records]
        vision_embeds = encode_pictures(model, processor, paths, show_progress=True)
    rows: dict[str, int] = {}
    captions_of_picture = [
        [rows.setdefault(text, len(rows)) for text in list_training_texts(record)]
        for record in records
    ]
    print(f"Encoding {len(rows)} captions …", flush=True)
    captions = encode_captions(model, processor, list(rows), show_progress=True)
    return EncodedPictures(records, vision_embeds, captions.caption_embeds, captions_of_picture)


def align(
    model: LLM2CLIPModel,
    pictures: EncodedPictures,
    held_out: set[str],
    arguments: AlignmentArguments,
) -> list[float]:
    """Train on all but the held-out keys, in place; returns the loss of every step."""
    rows = pictures.rows(held_out, inside=False)
    pairs = AlignmentPairs(
        pictures.caption_embeds,
        pictures.vision_embeds[rows],
        [pictures.captions_of_picture[row] for row in rows],
        [pictures.records[row].key for row in rows],
    )
    start_from_canonical_correlation(model, *pairs.pair_rows())
    losses = align_features(model, pairs, arguments, show_progress=True)
    model.config.text_adapter_trained = model.config.projections_trained = True
    return losses


@torch.inference_mode()
def evaluate(
    model: LLM2CLIPModel, pictures: EncodedPictures, held_out: set[str]
) -> dict[str, float]:
    """Compare one picture of each held-out key with its first caption."""
    rows = choose_test_rows(pictures.records, held_out)
    keys = [pictures.records[row].key for row in rows]
    captions = [pictures.captions_of_picture[row][0] for row in rows]
    caption_embeds = pictures.caption_embeds[captions].to(model.device)
    text_embeds = model.project_caption_embeds(caption_embeds).cpu()
    image_embeds = model.project_vision_embeds(pictures.vision_embeds[rows].to(model.device)).cpu()
    ranking = rank_both_ways(image_embeds, text_embeds, Correspondence.from_keys(keys, keys))
    return {
        "unseen_text_to_image_r1": hit_rate_at(ranking.text_to_image, k=1),
        "unseen_text_to_image_r10": hit_rate_at(ranking.text_to_image, k=10),
        "unseen_image_to_text_r1": hit_rate_at(ranking.image_to_text, k=1),
        "chance_r1": 1 / len(keys),
    }


def search(
    model: LLM2CLIPModel,
    processor: LLM2CLIPProcessor,
    pictures: EncodedPictures,
    gallery: list[CaptionedImage],
    sentences: Sequence[str],
) -> list[SearchResult]:
    """Answer the sentences from one picture a key, and the gallery that was never trained on."""
    rows = list({r.key: i for i, r in enumerate(pictures.records)}.values())
    paths = [pictures.records[row].path for row in rows]
    vision_embeds = pictures.vision_embeds[rows]
    if gallery:
        extra = encode_pictures(model, processor, [record.path for record in gallery])
        vision_embeds = torch.cat([vision_embeds, extra])
        paths += [record.path for record in gallery]
    return find_pictures(model, processor, make_gallery(model, paths, vision_embeds), sentences)
