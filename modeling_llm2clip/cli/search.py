"""`llm2clip search`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Interval
from cyclopts import Parameter

from .._extras import list_needs_of_index, require
from .._suggestions import counted, escape_controls
from ..configs.config_fields import ImageLimitsConfig
from ..configs.encoding_config import SearchConfig
from .command import Repeated, command
from .options import report, report_truncated, use_device, use_image_limits

if TYPE_CHECKING:
    from ..search.index_encoding import Query
    from ..search.search_results import SearchResult

_NOTE = "The number under each image is its cosine similarity to the query."


@command(
    group="Use",
    examples=(
        'llm2clip search my-index "a dog in the snow" --output found',
        "llm2clip search my-index --image dog.jpg --where \"taken > date '2024-01-01'\" --top-k 9",
        'llm2clip search my-index "at night" --image bridge.jpg --combine',
        'llm2clip search my-index "a beach" --not people --threshold 0.1',
    ),
)
def search(
    db: str,
    /,
    *queries: str,
    image: Annotated[tuple[Path, ...], Repeated] = (),
    combine: bool = False,
    negative: Annotated[tuple[str, ...], Repeated, Parameter(name="--not")] = (),
    top_k: Annotated[int, Interval(ge=1)] = 6,
    threshold: Annotated[float, Interval(ge=-1, le=1)] | None = None,
    where: str | None = None,
    exact: bool = False,
    format: Literal["table", "json", "csv"] = "table",
    output: Path | None = None,
    model: str | None = None,
    image_dir: Path | None = None,
    limits: ImageLimitsConfig,
    config: SearchConfig,
) -> int:
    """Finds the images in an index that best match a sentence or an image.

    Args:
        db: Database from llm2clip index: a folder, or a URI such as s3://bucket/index.
        queries: Descriptions of the images to find; optional with --image.
        image: Query image, instead of a sentence or in addition to it; repeatable. Default: none.
        combine: Combine all sentences and images into one query by averaging their embeddings.
        negative: Sentence about what the images should not show; repeatable. Half of the mean
            embedding of these sentences is subtracted from each query. Default: none.
        top_k: Number of images per query.
        threshold: Lowest cosine of the images to show. Default: none.
        where: SQL condition on the columns path, sha256, bytes, modified, width, height and taken.
            Default: none.
        exact: Compare with every image, even if there is an approximate index.
        format: Format of the results on stdout.
        output: Folder to write search.png and search.html to, replacing the files of an earlier
            search. Default: none.
        model: Folder of the model, if it has moved since indexing; or of its ONNX export, which
            starts in half the time but accepts only sentences. Default: the model used for
            indexing.
        image_dir: Folder of the images, if it has moved since indexing. Default: the indexed
            folder.
        limits: Limits on the images to decode.
        config: Device to run on, and precision.
    """
    use_image_limits(limits)
    require(*list_needs_of_index(db))
    _require_queries(queries, image)
    if output is not None:
        _require_page_folder(output)
    from ..search.index_database import require_place

    require_place(db)
    from ..data.images.image_sources import register_heif_reader
    from ..model_folders.model_folder import holds_graphs
    from ..search.image_index import ImageIndex
    from ..search.search_results import render_search_results

    register_heif_reader()
    if not holds_graphs(model):  # else torch is not imported
        use_device(config.device, config.precision)
    index = ImageIndex.open(
        db, model=model, image_dir=image_dir, device=config.device, precision=config.precision
    )
    parts: list[str | Path] = [*queries, *image]
    asked: list[Query] = [parts] if combine else [*parts]
    results = index.search(
        asked, negative=negative or None, top_k=top_k, threshold=threshold, where=where, exact=exact
    )
    if count := index.encoder.num_truncated:
        total, longest = len(queries + negative), index.encoder.max_text_length
        report_truncated(count, total, "sentence", longest=longest)
    rendered = render_search_results(results, format)
    print(rendered if format == "csv" else escape_controls(rendered))
    for result in results:
        if result.note and format != "table":  # the table shows the note
            report(f"{result.query}: {result.note}")
    _report_missing(results)
    if output is not None:
        _write(results, output)
    return 0


def _require_page_folder(folder: Path) -> None:
    """Raise an error if the folder is not writable or has files other than search results."""
    from ..data.atomic_files import require_new_folder, require_writable
    from ..search.search_results import is_results_file

    require_writable(folder)
    paths = folder.iterdir() if folder.is_dir() else []
    if not all(map(is_results_file, paths)):
        require_new_folder(folder)


def _require_queries(queries: Sequence[str], images: Sequence[Path]) -> None:
    """Raise ValueError if there is no query or an image is missing, before heavy imports."""
    if not queries and not images:
        raise ValueError("There is nothing to search for. Pass a sentence or --image FILE.")
    for text in queries:
        if Path(text).suffix and Path(text).is_file():
            report(f"{text!r} is treated as a sentence. To search by image: --image {text}")
    if missing := [file for file in images if not file.exists()]:
        raise ValueError("\n".join(f"--image {file}: no such image." for file in missing))


def _report_missing(results: Sequence[SearchResult]) -> None:
    from ..data.atomic_files import hash_file

    hits = {path: row["sha256"] for result in results
            for (path, _), row in zip(result.hits, result.columns, strict=True)}  # fmt: skip
    missing = [path for path in hits if not path.is_file()]
    changed = [path for path in hits.keys() - missing if hash_file(path) != hits[path]]
    for paths, problem in (
        (missing, "no longer there"),
        (sorted(changed), "changed since it was indexed"),
    ):
        if paths:
            report(
                f"{counted(len(paths), 'image')} found but {problem}: "
                f"{', '.join(map(str, paths))}. Update the index with llm2clip index. If the "
                "folder was moved, pass --image-dir."
            )


def _write(results: list[SearchResult], output: Path) -> None:
    from ..data.atomic_files import lock_folder
    from ..search.search_results import RESULTS_FILES, write_results_page, write_results_sheet

    sheet, page = (output / name for name in RESULTS_FILES)
    with lock_folder(output):  # so both files come from one search
        write_results_sheet(results, sheet)
        write_results_page(results, page, title="Images by query", note=_NOTE)
    report(f"Wrote {sheet} and {page}.")
