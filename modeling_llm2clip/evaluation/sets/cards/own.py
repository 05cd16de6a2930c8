"""Retrieval in a folder of one's own, in any format that the package reads."""

from __future__ import annotations

from functools import partial

from ..card import SetCard
from ..readers.own_folder import find_own_languages, read_own_folder
from ..retrieval import build_retrieval_set

_FILES = "captions.jsonl and pictures, or Parquet, tar shards, COCO captions"
_TEXTS = "white space at the ends removed, line breaks made spaces"


def _own(name: str, title: str, *, long: bool) -> SetCard:
    return SetCard(
        name=name,
        title=title,
        kind="retrieval",
        languages=(),
        counts={},
        licence="yours",
        citation="none",
        source="your disk",
        files=_FILES,
        protocol={
            "split": "all",
            "fields": "long_captions" if long else "captions",
            "correspondence": "pictures with the same key share their captions",
            "texts": _TEXTS,
        },
        build=partial(build_retrieval_set, read=partial(read_own_folder, long=long)),
        find_languages=find_own_languages,
    )


CARDS = (
    _own("folder", "Your own pictures with captions", long=False),
    _own("folder-long", "Your own pictures with their long captions", long=True),
)
