"""Tags images with the labels of the greatest cosines."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from .._suggestions import counted
from ..configs.encoding_config import IndexConfig, TagConfig
from ..data.images.image_sources import find_unreadable_images
from ..encoding.devices import find_device
from ..encoding.encode import TorchEncoder
from ..encoding.encoder_interface import Encoder
from ..encoding.tokenized_texts import TokenizedText, TokenizedTexts
from ..model_folders.model_loading import load_model
from ..model_folders.training_images import ImageTally, describe_far_images
from ..modeling_llm2clip import LLM2CLIPModel
from .image_encoding import encode_readable_images
from .image_files import list_images
from .image_index import ImageIndex
from .label_ranking import Tag, average_prompts, rank_labels
from .model_identity import find_whole_model
from .search_results import require_top_k
from .tag_labels import Label

EmbeddedImages: TypeAlias = tuple[Sequence[Path], Tensor]
Report: TypeAlias = Callable[[str], object]

_COLUMNS = ("image", "rank", "label", "cosine", "probability")
_SHOWN = 8


@dataclass(frozen=True)
class TaggedImage:
    """An image and its labels.

    Attributes:
        path: The image.
        tags: Its labels, best first; none where no cosine reaches the threshold.
    """

    path: Path
    tags: Sequence[Tag]


@dataclass(frozen=True)
class TaggedFolder:
    """The images of a folder with their labels.

    Attributes:
        images: Each image, labeled as it is taken from here.
        num_truncated: Prompts of the labels that are longer than the model reads.
        max_text_length: Maximum tokens per prompt.
    """

    images: Iterator[TaggedImage]
    num_truncated: int
    max_text_length: int


def tag_folder(
    model: str | Path,
    image_dir: Path,
    labels: Sequence[Label],
    *,
    top_k: int = 3,
    threshold: float | None = None,
    config: TagConfig | None = None,
    report: Report | None = None,
) -> TaggedFolder:
    """Label the images of a folder, in order, as they are taken from the result."""
    config = config or TagConfig()
    require_top_k(top_k)
    find_device(config.device)  # before what takes long
    files = list_images(image_dir)
    say = report or _warn
    if skipped := files.describe_skipped():
        say(skipped)
    folder = find_whole_model(model)
    loaded, processor = load_model(folder, device=config.device)
    assert isinstance(loaded, LLM2CLIPModel)  # as `find_whole_model` has checked
    encoder = TorchEncoder(loaded, processor)
    prompts = TokenizedTexts(processor, [prompt for label in labels for prompt in label.prompts])
    parts: Iterable[EmbeddedImages]
    if config.index is None:
        tally = ImageTally()
        parts = [_encode(encoder, files.readable, config, say, tally)]
        if far := describe_far_images(folder, tally):
            say(far)
    else:
        parts = _read_index(model, image_dir, config, report)
    images = tag_images(encoder, parts, labels, prompts, top_k=top_k, threshold=threshold)
    return TaggedFolder(images, prompts.num_truncated, processor.longest_text)


def _encode(
    encoder: Encoder,
    paths: Sequence[Path],
    config: TagConfig,
    report: Report,
    tally: ImageTally,
) -> EmbeddedImages:
    """Encode the images of a folder, and skip or refuse broken ones."""
    with tqdm(total=len(paths), unit=" images", disable=not config.show_progress) as progress:
        encoded = encode_readable_images(
            encoder, paths, progress=progress,
            batch_size=config.batch_size, num_workers=config.num_workers, tally=tally,
        )  # fmt: skip
    if encoded.errors:
        find_unreadable_images(encoded.errors)  # ends the run where it is the disk that fails
        _judge_errors(list(encoded.errors.values()), len(paths), config, report)
    if not encoded.paths:
        raise ValueError(f"No image of {len(paths)} can be read.")
    return encoded.paths, encoded.embeds


def _judge_errors(errors: Sequence[str], total: int, config: TagConfig, report: Report) -> None:
    shown = "\n".join(errors[:_SHOWN]) + ("\n…" if len(errors) > _SHOWN else "")
    if not config.skip_invalid:
        raise ValueError(
            f"Cannot read {len(errors)} of {counted(total, 'image')}:\n{shown}\nRepair or remove "
            "what is named, or skip it (--skip-invalid)."
        )
    report(f"Skipped {len(errors)} of {counted(total, 'image')}:\n{shown}")


def _read_index(
    model: str | Path, image_dir: Path, config: TagConfig, report: Report | None
) -> Iterator[EmbeddedImages]:
    """Update the index, and yield its embeddings."""
    assert config.index is not None
    index = ImageIndex.build(
        model,
        image_dir,
        config.index,
        IndexConfig(
            device=config.device, batch_size=config.batch_size, num_workers=config.num_workers,
            show_progress=config.show_progress, ann="never",
        ),
        report=report,
    )  # fmt: skip
    for paths, embeds in index.iterate_embeddings():
        yield paths, torch.tensor(embeds)


@torch.inference_mode()
def tag_images(
    encoder: Encoder,
    parts: Iterable[EmbeddedImages],
    labels: Sequence[Label],
    prompts: Sequence[TokenizedText],
    *,
    top_k: int = 3,
    threshold: float | None = None,
) -> Iterator[TaggedImage]:
    """Yield the labels of each image; embeddings are (images, P) of unit length."""
    label_embeds = average_prompts(encoder.encode_texts(prompts), labels)
    rule = encoder.logit_rule
    assert rule is not None  # a whole model has one
    for paths, embeds in parts:
        found = rank_labels(embeds, label_embeds, labels, rule=rule, top_k=top_k)
        for path, tags in zip(paths, found, strict=True):
            yield TaggedImage(
                path, [tag for tag in tags if threshold is None or tag.cosine >= threshold]
            )


def write_tags(tagged: Iterable[TaggedImage], file: IO[str], style: str) -> tuple[int, int]:
    """Write tags as CSV, a line per label, or as JSON lines, a line per image.

    An image without a label has a line, too; in CSV its other columns are empty. Returns the number
    of images, and the number of images without a label.
    """
    num_images = num_untagged = 0
    writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
    if style == ".csv":
        writer.writeheader()
    for image in tagged:
        num_images += 1
        num_untagged += not image.tags
        labels = [
            {
                "label": tag.label,
                "cosine": round(tag.cosine, 6),
                "probability": round(tag.probability, 6),
            }
            for tag in image.tags
        ]
        if style == ".csv":
            ranked = [{"rank": rank, **label} for rank, label in enumerate(labels, start=1)]
            writer.writerows({"image": image.path, **row} for row in ranked or [{}])
        else:
            record = {"image": str(image.path), "labels": labels}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return num_images, num_untagged


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)
