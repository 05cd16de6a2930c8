"""The encoding of a folder of images, for `search` and `tag`.

The results of these commands go to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.search_config import IndexConfig
from .chosen_device import choose_device

if TYPE_CHECKING:
    from ..modeling_llm2clip import LLM2CLIPModel
    from ..processing_llm2clip import LLM2CLIPProcessor
    from ..search.gallery import Gallery
    from ..search.image_index import KeptEmbeddings


@dataclass(frozen=True)
class EncodedFolder:
    """A model, and a folder of images that it encoded."""

    model: LLM2CLIPModel
    processor: LLM2CLIPProcessor
    gallery: Gallery


def require_image_folder(image_dir: Path) -> None:
    """Raise ValueError where there is no folder of images, before anything is imported.

    Args:
        image_dir: Folder of images.
    """
    if not image_dir.is_dir():
        raise ValueError(f"{image_dir}: no such folder. Give one that holds images.")


def encode_folder(
    source: str, image_dir: Path, config: IndexConfig, *, purpose: str
) -> EncodedFolder:
    """Find, check and encode the images, and report on stderr what is skipped, known and kept.

    Args:
        source: Hub id or folder of the model.
        image_dir: Folder of images.
        config: How they are encoded, and where their embeddings are kept.
        purpose: What the model is used for, in the error for an untrained one.

    Raises:
        ValueError: There is no such device, no image, an image is broken and they are not
            skipped, or the model was never trained.
    """
    from ..configuration_llm2clip import LLM2CLIPConfig
    from ..model_folders.model_folder import find_model_folder
    from ..model_folders.training_state import require_trained
    from ..modeling_llm2clip import LLM2CLIPModel
    from ..processing_llm2clip import LLM2CLIPProcessor
    from ..search.gallery import make_gallery
    from ..search.image_files import find_image_files

    device = choose_device(config.device)
    files = find_image_files(image_dir)
    if files.skipped:
        report(files.describe_skipped())
    folder = find_model_folder(source)
    require_trained(LLM2CLIPConfig.from_pretrained(folder), purpose=purpose, source=source)
    kept = _open_kept(folder, image_dir, config)
    paths = _leave_out_errors(files.readable, kept, allowed=config.skip_invalid)
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    model = LLM2CLIPModel.from_pretrained(folder)
    model = model.to(device)
    try:
        vision_embeds = kept.encode(
            model,
            processor,
            paths,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            show_progress=config.show_progress,
        )
    except KeyboardInterrupt:
        if kept.file is not None:
            report(f"What was encoded is kept in {kept.file}; the same command goes on from there.")
        raise
    return EncodedFolder(model, processor, make_gallery(model, paths, vision_embeds))


def report(text: str) -> None:
    """Print to stderr, so that stdout holds nothing but results.

    Args:
        text: One or several lines.
    """
    print(text, file=sys.stderr, flush=True)


def report_truncated(processor: LLM2CLIPProcessor, texts: list[str], what: str) -> None:
    """Report how many texts are longer than the model reads.

    Args:
        processor: Of the model.
        texts: What it will read.
        what: Word for them.
    """
    from ..encoding.encode import measure_texts

    if count := int(measure_texts(processor, texts)[1].sum()):
        report(
            f"Truncated {count:,} of {len(texts):,} {what} to the {processor.longest_text} tokens "
            "that the model reads."
        )


def _open_kept(model_folder: Path, image_dir: Path, config: IndexConfig) -> KeptEmbeddings:
    from ..model_folders.fingerprint import fingerprint_vision
    from ..search.image_index import KeptEmbeddings, find_default_file, require_writable

    if not config.keep_index:
        return KeptEmbeddings()
    fingerprint = fingerprint_vision(model_folder)
    if config.index is not None:
        return KeptEmbeddings(config.index, fingerprint)
    file = find_default_file(image_dir, fingerprint)
    try:
        require_writable(file)
    except ValueError as error:  # nobody asked for this file, so the search goes on
        report(f"The image embeddings are not kept: {error}")
        return KeptEmbeddings()
    return KeptEmbeddings(file, fingerprint)


def _leave_out_errors(paths: list[Path], kept: KeptEmbeddings, *, allowed: bool) -> list[Path]:
    from ..data.image_sources import find_unreadable_images

    new = kept.find_new(paths, show_progress=True)
    place = f"embeddings in {kept.file}" if kept.file else "embeddings are not kept"
    report(f"{len(paths):,} images, {len(paths) - len(new):,} of them known; {place}.")
    unreadable = find_unreadable_images(new, show_progress=bool(new))
    if not unreadable:
        return paths
    errors = list(unreadable.values())
    shown = "\n".join(errors[:8]) + ("\n…" if len(errors) > 8 else "")
    readable = [path for path in paths if path not in unreadable]
    if not allowed or not readable:
        raise ValueError(
            f"{len(errors)} of {len(paths)} images cannot be read:\n{shown}\nMend or remove "
            "them, or leave them out with --skip-invalid."
        )
    report(f"Left out {len(errors)} of {len(paths)} images:\n{shown}")
    return readable
