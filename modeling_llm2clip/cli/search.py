"""`llm2clip search`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._extras import require
from ..search.result_formats import FORMATS, render_search_results
from .extras import list_needs_of_model
from .image_folder import (
    EncodedFolder,
    add_folder_arguments,
    add_folder_flags,
    encode_folder,
    report_truncated,
    require_folder,
    tell,
)

if TYPE_CHECKING:
    from ..search.results_page import SearchResult

_NOTE = "The number under an image is its cosine with the query."


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    search = commands.add_parser(
        "search",
        help="the images of a folder that fit a sentence, or an image, best",
        examples=(
            'llm2clip search aligned/model my-images "a dog in the snow" --output found',
            "llm2clip search aligned/model my-images --image dog.jpg --format json",
        ),
    )
    add_folder_arguments(search)
    sentences = search.add_argument(
        "sentences", nargs="+", default=[], metavar="sentence",
        help="what the images should show; may be left out with --image",
    )  # fmt: skip
    # With --image there may be none. Of nargs="*", argparse would take none before a flag.
    sentences.required = False
    search.add_argument(
        "--image", action="append", type=Path, default=[], metavar="FILE",
        help="query image, instead of a sentence or beside it; repeatable; default: none",
    )  # fmt: skip
    search.add_argument("--count", type=int, default=6, help="images a query")
    search.add_argument(
        "--format", choices=FORMATS, default="table", help="of the results on stdout"
    )
    search.add_argument(
        "--output", type=Path, help="new folder for search.png and search.html; default: none"
    )
    add_folder_flags(search)
    search.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    require(*list_needs_of_model(arguments.model))
    from ..model_folders.atomic_folder import require_new_folder
    from ..model_folders.model_types import require_own_model

    if arguments.count < 1:
        raise ValueError(f"--count {arguments.count} finds nothing. Give at least 1.")
    _require_queries(arguments)
    if arguments.output is not None:
        require_new_folder(arguments.output)
    require_folder(arguments)
    require_own_model(arguments.model)
    _check_queries(arguments.sentences, arguments.image)  # before what takes long
    found = _search(encode_folder(arguments), arguments)
    print(render_search_results(found, arguments.format))
    if arguments.output is not None:
        _write(found, arguments.output)
    return 0


def _require_queries(arguments: argparse.Namespace) -> None:
    """Raise ValueError where no query or no such file is given, before anything is imported."""
    if not arguments.sentences and not arguments.image:
        raise ValueError("There is nothing to search for. Give a sentence, or --image FILE.")
    if missing := [file for file in arguments.image if not file.exists()]:
        raise ValueError("\n".join(f"--image {file}: no such image." for file in missing))


def _check_queries(sentences: list[str], images: list[Path]) -> None:
    from ..data.image_sources import find_unreadable_images, register_heif_reader
    from ..processing_llm2clip import clean_list

    if sentences:
        clean_list(sentences)
    register_heif_reader()
    if unreadable := find_unreadable_images(images):
        raise ValueError("\n".join(f"--image {error}" for error in unreadable.values()))


def _search(encoded: EncodedFolder, arguments: argparse.Namespace) -> list[SearchResult]:
    from ..encoding.image_encoding import encode_images
    from ..search.gallery import find_images, find_similar_images, make_gallery

    model, processor, gallery = encoded.model, encoded.processor, encoded.gallery
    found: list[SearchResult] = []
    if arguments.sentences:
        report_truncated(processor, arguments.sentences, "sentences")
        found += find_images(model, processor, gallery, arguments.sentences, count=arguments.count)
    if arguments.image:
        vision_embeds = encode_images(model, processor, arguments.image)
        queries = make_gallery(model, arguments.image, vision_embeds)
        found += find_similar_images(gallery, queries, count=arguments.count)
    return found


def _write(found: list[SearchResult], output: Path) -> None:
    from ..search.results_page import write_contact_sheet, write_page

    output.mkdir(parents=True, exist_ok=True)
    write_contact_sheet(found, output / "search.png")
    write_page(found, output / "search.html", title="Images by query", note=_NOTE)
    tell(f"Wrote {output / 'search.png'} and {output / 'search.html'}.")
