"""The flags of commands that encode a folder of images, and the encoding of it.

What these commands find goes to stdout; all else that they say goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parser import add_device_flag, choose_device

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


def add_folder_arguments(parser: Any) -> None:
    """Add MODEL and IMAGES."""
    parser.add_argument("model", help="Hub id or folder of a whole model")
    parser.add_argument("images", type=Path, help="folder of images; subfolders are included")


def add_folder_flags(parser: Any) -> None:
    """Add the flags that say how the folder is encoded."""
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--embeddings", type=Path, metavar="FILE",
        help="keep the image embeddings in this safetensors file, so that the next call encodes "
        "only new images; default: a file in the cache, one per model and folder",
    )  # fmt: skip
    kept.add_argument("--no-keep", action="store_true", help="do not keep the image embeddings")
    parser.add_argument(
        "--skip-invalid", action="store_true", help="leave broken images out, and count them"
    )
    parser.add_argument("--batch-size", type=int, help="images of a batch; default: by device")
    parser.add_argument("--num-workers", type=int, default=1, help="threads that decode images")
    add_device_flag(parser)


def require_folder(arguments: argparse.Namespace) -> None:
    """Raise ValueError where there is no folder of images, before anything is imported."""
    if not arguments.images.is_dir():
        raise ValueError(f"{arguments.images}: no such folder. Give one that holds images.")


def encode_folder(arguments: argparse.Namespace) -> EncodedFolder:
    """Find, check and encode the images, and tell on stderr what is skipped, known and kept.

    Raises:
        ValueError: the device is not there, there is no image, one is broken and
            `--skip-invalid` is not given, or the model was never trained.
    """
    from ..configuration_llm2clip import LLM2CLIPConfig
    from ..model_folders.model_folder import find_model_folder
    from ..model_folders.training_state import require_trained
    from ..modeling_llm2clip import LLM2CLIPModel
    from ..processing_llm2clip import LLM2CLIPProcessor
    from ..search.gallery import make_gallery
    from ..search.image_files import find_image_files

    device = choose_device(arguments)
    files = find_image_files(arguments.images)
    if files.skipped:
        tell(files.describe_skipped())
    folder = find_model_folder(arguments.model)
    config = LLM2CLIPConfig.from_pretrained(folder)
    require_trained(config, purpose=arguments.command, source=arguments.model)
    kept = _open_kept(arguments, folder)
    paths = _leave_out_errors(files.readable, kept, allowed=arguments.skip_invalid)
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    model = LLM2CLIPModel.from_pretrained(folder)
    model = model.to(device)
    try:
        vision_embeds = kept.encode(
            model,
            processor,
            paths,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            show_progress=True,
        )
    except KeyboardInterrupt:
        if kept.file is not None:
            tell(f"What was encoded is kept in {kept.file}; the same command goes on from there.")
        raise
    return EncodedFolder(model, processor, make_gallery(model, paths, vision_embeds))


def tell(text: str) -> None:
    """Print to stderr, so that stdout holds nothing but results."""
    print(text, file=sys.stderr, flush=True)


def report_truncated(processor: LLM2CLIPProcessor, texts: list[str], what: str) -> None:
    """Tell how many texts are longer than the model reads."""
    if count := processor.list_ids(texts)[1]:
        tell(
            f"Truncated {count:,} of {len(texts):,} {what} to the {processor.longest_text} tokens "
            "that the model reads."
        )


def _open_kept(arguments: argparse.Namespace, model_folder: Path) -> KeptEmbeddings:
    from ..model_folders.fingerprint import fingerprint_vision
    from ..search.image_index import KeptEmbeddings, find_default_file, require_writable

    if arguments.no_keep:
        return KeptEmbeddings()
    fingerprint = fingerprint_vision(model_folder)
    if arguments.embeddings is not None:
        return KeptEmbeddings(arguments.embeddings, fingerprint)
    file = find_default_file(arguments.images, fingerprint)
    try:
        require_writable(file)
    except ValueError as error:  # nobody asked for this file, so the search goes on
        tell(f"The image embeddings are not kept: {error}")
        return KeptEmbeddings()
    return KeptEmbeddings(file, fingerprint)


def _leave_out_errors(paths: list[Path], kept: KeptEmbeddings, *, allowed: bool) -> list[Path]:
    from ..data.image_sources import find_unreadable_images

    new = kept.find_new(paths, show_progress=True)
    place = f"embeddings in {kept.file}" if kept.file else "embeddings are not kept"
    tell(f"{len(paths):,} images, {len(paths) - len(new):,} of them known; {place}.")
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
    tell(f"Left out {len(errors)} of {len(paths)} images:\n{shown}")
    return readable
