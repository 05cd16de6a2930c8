"""Retrieval in a folder of one's own, in any format that the package reads."""

from __future__ import annotations

from functools import partial

from ..dataset_spec import DatasetSpec
from ..readers.own_records import find_own_languages, read_own_folder
from ..retrieval_dataset import build_retrieval_dataset

_FILES = "captions.jsonl and images, or Parquet, tar shards, COCO captions"
_TEXTS = "white space at the ends removed, line breaks made spaces"


def _own(name: str, title: str, *, long: bool) -> DatasetSpec:
    return DatasetSpec(
        name=name,
        title=title,
        kind="retrieval",
        languages=(),
        counts={},
        license="yours",
        citation="none",
        source="your disk",
        files=_FILES,
        protocol={
            "split": "all",
            "fields": "long_captions" if long else "captions",
            "correspondence": "images of one group share their captions",
            "texts": _TEXTS,
        },
        build=partial(build_retrieval_dataset, read=partial(read_own_folder, long=long)),
        find_languages=find_own_languages,
    )


DATASETS = (
    _own("folder", "Your own images with captions", long=False),
    _own("folder-long", "Your own images with their long captions", long=True),
)
