"""`llm2clip search`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from .._extras import require
from ..configs.config_fields import Range
from ..configs.search_config import IndexConfig
from .command import Repeated, command
from .extras import list_needs_of_model
from .image_folder import build_index, report, report_truncated, require_image_folder

if TYPE_CHECKING:
    from ..search.image_index import SearchResult

_NOTE = "The number under an image is its cosine with the query."


@command(
    group="Use",
    examples=(
        'llm2clip search aligned/model my-images "a dog in the snow" --output found',
        "llm2clip search aligned/model my-images --image dog.jpg --format json",
    ),
)
def search(
    model: str,
    image_dir: Path,
    /,
    *queries: str,
    image: Annotated[tuple[Path, ...], Repeated] = (),
    top_k: Annotated[int, Range(min=1)] = 6,
    format: Literal["table", "json", "csv"] = "table",
    output: Path | None = None,
    config: IndexConfig,
) -> int:
    """Finds the images of a folder that fit a sentence, or an image, best.

    Args:
        model: Hub id or folder of an LLM2CLIP model.
        image_dir: Folder of images; subfolders are included.
        queries: What the images should show; may be left out with --image.
        image: Query image, instead of a sentence or beside it; repeatable. Default: none.
        top_k: Images per query.
        format: Format of the results on stdout.
        output: New folder for search.png and search.html. Default: none.
        config: How the folder is encoded.
    """
    require(*list_needs_of_model(model))
    from ..model_folders.atomic_folder import require_new_folder
    from ..model_folders.model_types import require_own_model

    _require_queries(queries, image)
    if output is not None:
        require_new_folder(output)
    require_image_folder(image_dir)
    require_own_model(model)
    from ..search.results_page import render_search_results

    _check_queries(queries, image)  # before what takes long
    index = build_index(model, image_dir, config)
    if queries:
        report_truncated(index.processor, list(queries), "sentences")
    found = index.search([*queries, *image], top_k=top_k)
    print(render_search_results(found, format))
    if output is not None:
        _write(found, output)
    return 0


def _require_queries(queries: Sequence[str], images: Sequence[Path]) -> None:
    """Raise ValueError where no query or no such file is given, before anything is imported."""
    if not queries and not images:
        raise ValueError("There is nothing to search for. Give a sentence, or --image FILE.")
    if missing := [file for file in images if not file.exists()]:
        raise ValueError("\n".join(f"--image {file}: no such image." for file in missing))


def _check_queries(queries: Sequence[str], images: Sequence[Path]) -> None:
    from ..data.images.image_sources import find_unreadable_images, register_heif_reader
    from ..processing_llm2clip import clean_list

    if queries:
        clean_list(list(queries))
    register_heif_reader()
    if unreadable := find_unreadable_images(list(images)):
        raise ValueError("\n".join(f"--image {error}" for error in unreadable.values()))


def _write(found: list[SearchResult], output: Path) -> None:
    from ..search.results_page import write_results_page, write_results_sheet

    output.mkdir(parents=True, exist_ok=True)
    write_results_sheet(found, output / "search.png")
    write_results_page(found, output / "search.html", title="Images by query", note=_NOTE)
    report(f"Wrote {output / 'search.png'} and {output / 'search.html'}.")
