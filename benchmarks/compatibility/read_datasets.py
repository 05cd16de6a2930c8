"""Reads whole evaluation datasets from their folders: what is in them, and how long it takes.

    python -m benchmarks.compatibility.read_datasets \
        --dataset sugarcrepe-text FOLDER "SugarCrepe and COCO val2017 captions" \
        --dataset folder FOLDER "a public dataset's name"

Every language is read and every image decoded. A dataset without its images is read for its
captions with `--captions-only`; one that cannot be read without them, such as ImageNet or
Winoground, with blank images under their names and `--images-by-name`, which decodes none.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.shared.provenance import describe_run, write_result
from modeling_llm2clip.evaluation.datasets.dataset_registry import (
    find_dataset,
    find_languages,
    load_dataset,
)
from modeling_llm2clip.evaluation.datasets.dataset_spec import ReadingCache

_COUNTED = ("images", "classes", "captions", "items", "captions_of_several_images")


def main() -> None:
    """Read the datasets and put their rows into the results, replacing rows of the same title."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--dataset", nargs=3, action="append", required=True, metavar=("NAME", "FOLDER", "TITLE")
    )
    parser.add_argument("--captions-only", action="store_true")
    parser.add_argument("--images-by-name", action="store_true")
    parser.add_argument("--ignore-fields", nargs="*", default=[])
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "datasets_read.json")
    arguments = parser.parse_args()
    rows = [
        {"title": title, **_read(name, Path(folder), arguments)}
        for name, folder, title in arguments.dataset
    ]
    known = json.loads(arguments.output.read_text("utf-8")) if arguments.output.is_file() else []
    titles = {row["title"] for row in rows}
    rows = [row for row in known if row["title"] not in titles] + rows
    write_result(arguments.output, rows)


def _read(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Read every language of one dataset."""
    cache = ReadingCache()
    shared: dict[str, Any] = {
        "ignore_fields": arguments.ignore_fields,
        "require_images": not arguments.captions_only,
        "cache": cache,
    }
    if find_dataset(name).dataset_type in ("choice", "captions"):
        shared["require_images"] = True  # these decide themselves
    started = time.monotonic()
    counts: Counter[str] = Counter()
    languages = find_languages(name, folder, **shared)
    for lang in languages:
        protocol = load_dataset(
            name,
            folder,
            lang=lang,
            check_images=not arguments.images_by_name,
            **shared,
        ).protocol
        counts.update({what: protocol[what] for what in _COUNTED if what in protocol})
    return {
        "dataset": name,
        "languages": len(languages),
        "summed_over_languages": dict(counts),
        "images_decoded": len(cache.checked),
        "checksums": protocol.get("checksums", {}),
        "seconds": round(time.monotonic() - started, 1),
        **describe_run(),
    }


if __name__ == "__main__":
    main()
