"""`llm2clip search`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._extras import require
from ..search.result_formats import FORMATS
from .extras import list_needs_of_model
from .image_folder import (
    EncodedFolder,
    add_folder_arguments,
    add_folder_flags,
    encode_folder,
    require_folder,
    tell,
    tell_truncated,
)

if TYPE_CHECKING:
    from ..search.contact_sheet import SearchResult

_NOTE = "The number under a picture is its cosine with the query."


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    search = commands.add_parser(
        "search", help="the pictures of a folder that fit a sentence, or an image, best"
    )
    add_folder_arguments(search)
    sentences = search.add_argument("sentences", nargs="+", default=[], metavar="sentence")
    # With --image there may be none. Of nargs="*", argparse would take none before a flag.
    sentences.required = False
    search.add_argument(
        "--image", action="append", type=Path, default=[], metavar="FILE",
        help="query image, instead of a sentence or beside it; may be given several times",
    )  # fmt: skip
    search.add_argument("--count", type=int, default=6, help="pictures a query")
    search.add_argument(
        "--format", choices=FORMATS, default="table", help="of the results on stdout"
    )
    search.add_argument("--output", type=Path, help="new folder for search.png and search.html")
    add_folder_flags(search)
    search.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    require(*list_needs_of_model(arguments.model))
    from ..encoding.model_types import require_own_model
    from ..hub.new_folder import require_new_folder
    from ..search.result_formats import render_search_results

    if arguments.count < 1:
        raise ValueError(f"--count {arguments.count} finds nothing. Give at least 1.")
    _check_queries(arguments.sentences, arguments.image)  # before what takes long
    if arguments.output is not None:
        require_new_folder(arguments.output)
    require_folder(arguments)
    require_own_model(arguments.model)
    found = _search(encode_folder(arguments), arguments)
    print(render_search_results(found, arguments.format))
    if arguments.output is not None:
        _write(found, arguments.output)
    return 0


def _check_queries(sentences: list[str], images: list[Path]) -> None:
    from ..data.picture_checks import find_unreadable
    from ..data.pictures import register_heif_reader
    from ..processing_llm2clip import clean_list

    if not sentences and not images:
        raise ValueError("There is nothing to search for. Give a sentence, or --image FILE.")
    if sentences:
        clean_list(sentences)
    register_heif_reader()
    if unreadable := find_unreadable(images):
        raise ValueError("\n".join(f"--image {fault}" for fault in unreadable.values()))


def _search(encoded: EncodedFolder, arguments: argparse.Namespace) -> list[SearchResult]:
    from ..encoding.pictures import encode_pictures
    from ..search.gallery import find_pictures, find_similar_images, make_gallery

    model, processor, gallery = encoded.model, encoded.processor, encoded.gallery
    found: list[SearchResult] = []
    if arguments.sentences:
        tell_truncated(processor, arguments.sentences, "sentences")
        found += find_pictures(
            model, processor, gallery, arguments.sentences, count=arguments.count
        )
    if arguments.image:
        vision_embeds = encode_pictures(model, processor, arguments.image)
        queries = make_gallery(model, arguments.image, vision_embeds)
        found += find_similar_images(gallery, queries, count=arguments.count)
    return found


def _write(found: list[SearchResult], output: Path) -> None:
    from ..search.contact_sheet import write_contact_sheet, write_page

    output.mkdir(parents=True, exist_ok=True)
    write_contact_sheet(found, output / "search.png")
    write_page(found, output / "search.html", title="Pictures by query", note=_NOTE)
    tell(f"Wrote {output / 'search.png'} and {output / 'search.html'}.")
