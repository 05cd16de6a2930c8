"""Tag images with the labels that have the highest cosine similarity."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from .._suggestions import counted, list_first
from ..configs.encoding_config import IndexConfig, TagConfig
from ..data.labels import Label
from ..encoding.encode import TorchEncoder, average_prompts
from ..encoding.encoder_interface import Encoder
from ..encoding.tokenized_texts import TokenizedTexts
from ..heads_llm2clip import LogitRule
from ..model_folders.model_loading import load_model
from ..model_folders.training_images import ImageTally, describe_far_images
from .image_encoding import encode_readable_images
from .image_files import list_images, split_by_unicode
from .image_index import ImageIndex
from .index_database import require_place
from .index_update import build_index
from .model_identity import find_whole_model
from .search_results import make_csv_row


@dataclass(frozen=True)
class Tag:
    """One label of an image; `/v1/classify` returns these fields unchanged.

    Attributes:
        label: Name of the label.
        cosine: Cosine similarity of image and label.
        probability: Softmax of the scaled cosines over all labels, as in the pipeline
            `zero-shot-image-classification`.
    """

    label: str
    cosine: float
    probability: float


EmbeddedImages: TypeAlias = tuple[Sequence[Path], Tensor]
TaggedImage: TypeAlias = tuple[Path, Sequence[Tag]]
"""An image and its labels, best first; empty if no cosine reaches the threshold."""
Report: TypeAlias = Callable[[str], object]

_COLUMNS = ("image", "rank", "label", "cosine", "probability")


def tag_folder(
    model: str | Path,
    image_dir: Path,
    labels: Sequence[Label],
    *,
    top_k: int,
    threshold: float | None,
    config: TagConfig,
    report: Report,
) -> Iterator[TaggedImage]:
    """Label the images of a folder in order; labels are computed lazily, on iteration."""
    if config.index is not None:
        require_place(config.index, is_new=True)
    files = list_images(image_dir)
    if skipped := files.describe_skipped():
        report(skipped)
    images, unnamed = split_by_unicode(files.readable)
    if unnamed:
        problem = f"{counted(len(unnamed), 'image')} not named in Unicode: {list_first(unnamed)}."
        if not (config.skip_invalid and images):
            raise ValueError(f"{problem} Rename these files, or skip them (--skip-invalid).")
        report(f"Skipped {problem} Rename the files.")
    folder = find_whole_model(model)
    loaded, processor = load_model(folder, device=config.device, precision=config.precision)
    encoder = TorchEncoder(loaded, processor)
    prompts = TokenizedTexts(processor, [prompt for label in labels for prompt in label.prompts])
    parts: Iterable[EmbeddedImages]
    if config.index is None:
        tally = ImageTally()
        parts = [_encode(encoder, images, config, report, tally)]
        if far := describe_far_images(folder, tally):
            report(far)
    else:
        index_config = IndexConfig(
            device=config.device, precision=config.precision, batch_size=config.batch_size,
            show_progress=config.show_progress,
        )  # fmt: skip
        database, _ = build_index(
            model, image_dir, config.index, index_config,
            updates_ann=False, skip_invalid=config.skip_invalid, report=report,
        )  # fmt: skip
        index = ImageIndex(database)
        parts = ((paths, torch.tensor(embeds)) for paths, embeds in index.iterate_embeddings())

    @torch.inference_mode()
    def label_images() -> Iterator[TaggedImage]:
        num_prompts = [len(label.prompts) for label in labels]
        label_embeds = average_prompts(encoder.encode_texts(prompts), num_prompts)
        rule = encoder.logit_rule
        assert rule is not None  # a whole model has one
        for paths, embeds in parts:
            ranked = rank_labels(embeds, label_embeds, labels, rule=rule, top_k=top_k)
            for path, tags in zip(paths, ranked, strict=True):
                yield path, [tag for tag in tags if threshold is None or tag.cosine >= threshold]

    if num_truncated := prompts.num_truncated:
        report(
            f"Truncated {num_truncated:,} of {counted(len(prompts), 'prompt')} to the model's "
            f"limit of {processor.longest_text} tokens."
        )
    return label_images()


def _encode(
    encoder: Encoder,
    paths: Sequence[Path],
    config: TagConfig,
    report: Report,
    tally: ImageTally,
) -> EmbeddedImages:
    """Encode a folder's images; skip broken images, or raise ValueError if they are not allowed."""
    with tqdm(total=len(paths), unit=" images", disable=not config.show_progress) as progress:
        encoded = encode_readable_images(
            encoder, paths, progress=progress,
            batch_size=config.batch_size, tally=tally,
        )  # fmt: skip
    if encoded.errors:
        broken = f"{len(encoded.errors)} of {counted(len(paths), 'image')}:\n" + list_first(
            encoded.errors.values(), "\n"
        )
        if not config.skip_invalid:
            raise ValueError(
                f"Cannot read {broken}\nRepair or remove these files, or skip them "
                "(--skip-invalid)."
            )
        report(f"Skipped {broken}")
    if not encoded.paths:
        raise ValueError(f"No image can be read (of {len(paths)}).")
    return encoded.paths, encoded.embeds


def write_tags(tagged: Iterable[TaggedImage], file: IO[str], style: str) -> tuple[int, int]:
    """Write tags as CSV, one line per label, or as JSON lines, one line per image.

    An image without labels also gets a line; in CSV, every column except `image` is empty. Return
    the number of images and the number of images without labels.
    """
    num_images = num_untagged = 0
    if style == ".csv":
        file.write(make_csv_row(_COLUMNS) + "\n")
    for path, tags in tagged:
        num_images += 1
        num_untagged += not tags
        labels = [
            {
                "label": tag.label,
                "cosine": round(tag.cosine, 6),
                "probability": round(tag.probability, 6),
            }
            for tag in tags
        ]
        if style == ".csv":
            ranked = [(rank, *label.values()) for rank, label in enumerate(labels, start=1)]
            file.writelines(make_csv_row((str(path), *row)) + "\n" for row in ranked or [("",) * 4])
        else:
            record = {"image": str(path), "labels": labels}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return num_images, num_untagged


def rank_labels(
    image_embeds: Tensor,
    label_embeds: Tensor,
    labels: Sequence[Label],
    *,
    rule: LogitRule,
    top_k: int,
) -> list[list[Tag]]:
    """Return the `top_k` labels with the highest cosine for each image, best first.

    Embeddings have unit length, and `rule` turns cosines into logits. If there are fewer than
    `top_k` labels, all labels are returned.
    """
    cosines = image_embeds @ label_embeds.T
    probabilities = rule.from_cosines(cosines).softmax(dim=-1)
    best = cosines.topk(min(top_k, len(labels)))
    return [
        [
            Tag(labels[number].name, cosine, probability)
            for number, cosine, probability in zip(numbers, scores, shares, strict=True)
        ]
        for numbers, scores, shares in zip(
            best.indices.tolist(),
            best.values.tolist(),
            probabilities.gather(1, best.indices).tolist(),
            strict=True,
        )
    ]
